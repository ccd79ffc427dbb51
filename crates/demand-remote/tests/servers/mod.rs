// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Servers of the tests: programs from packages, on loopback, ended with their handles.
#![allow(dead_code, reason = "each test program uses some of them")]

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A server process.
#[derive(Debug)]
pub struct Server {
    child: Child,
    pub port: u16,
}

impl Server {
    /// Starts a server, and waits until it accepts connections.
    pub fn start(mut command: Command, port: u16) -> Server {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let mut server = Server { child, port };
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none(), "the server ended with {ended:?}");
            assert!(begun.elapsed() < Duration::from_secs(20), "the server does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns a port that no server has now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Returns the path of a program, or tells that the test is skipped.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin".into(), "/usr/local/sbin".into()];
    let found = std::env::split_paths(&path).chain(usual).map(|folder| folder.join(name));
    let found = found.into_iter().find(|path| path.is_file());
    if found.is_none() {
        println!("SKIPPED: {name} is not installed (rust-vmm-ci/setup --tests)");
    }
    found
}

/// An nginx that serves the files of a folder.
pub struct Web {
    folder: PathBuf,
    program: PathBuf,
    pub port: u16,
    server: Option<Server>,
}

impl Web {
    /// Starts the server on `folder`; `settings` are those of its only location.
    pub fn start(folder: &Path, settings: &str) -> Option<Web> {
        let program = program("nginx")?;
        let port = free_port();
        let mut web = Web { folder: folder.into(), program, port, server: None };
        web.restart(settings);
        Some(web)
    }

    pub fn stop(&mut self) {
        self.server = None;
    }

    pub fn restart(&mut self, settings: &str) {
        self.stop();
        let folder = self.folder.display();
        let temporary = self.folder.join("nginx");
        fs::create_dir_all(&temporary).unwrap();
        let at = temporary.display();
        let port = self.port;
        let text = format!(
            "daemon off; master_process off; pid {at}/pid; error_log stderr error;
            events {{ }}
            http {{
                access_log {at}/access.log;
                client_body_temp_path {at}/a; proxy_temp_path {at}/b; fastcgi_temp_path {at}/c;
                uwsgi_temp_path {at}/d; scgi_temp_path {at}/e;
                server {{
                    listen 127.0.0.1:{port};
                    location / {{ root {folder}; {settings} }}
                }}
            }}"
        );
        let config = temporary.join("config");
        fs::write(&config, text).unwrap();
        let mut command = Command::new(&self.program);
        command.arg("-c").arg(&config).arg("-p").arg(&temporary).arg("-e").arg("stderr");
        self.server = Some(Server::start(command, port));
    }

    /// Returns the requests that the server has answered: status and range of each.
    pub fn requests(&self) -> Vec<String> {
        let log = fs::read_to_string(self.folder.join("nginx/access.log")).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }

    pub fn url(&self, file: &str) -> String {
        format!("http://127.0.0.1:{}/{file}", self.port)
    }
}
