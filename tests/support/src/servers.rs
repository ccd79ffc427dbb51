// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Servers of the tests: programs from packages, on loopback, ended with their handles.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::child;
use crate::host::skip;

/// A server process, which is killed when this is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// The port of 127.0.0.1 on which it listens.
    pub port: u16,
}

impl Server {
    /// Starts a server, and waits until it accepts connections.
    ///
    /// # Panics
    ///
    /// If it does not within 20 seconds.
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

/// Returns a port of 127.0.0.1 that no server has now.
///
/// # Panics
///
/// If there is none.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Returns the path of a program; skips the test if it is not installed.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin".into(), "/usr/local/sbin".into()];
    let found = std::env::split_paths(&path).chain(usual).map(|folder| folder.join(name));
    let found = found.into_iter().find(|path| path.is_file());
    if found.is_none() {
        skip(&format!(
            "{name} is not installed (rust-vmm-ci/setup --tests, rust-vmm-ci/servers --garage)"
        ));
    }
    found
}

/// An nginx that serves the files of a folder.
#[derive(Debug)]
pub struct Web {
    folder: PathBuf,
    /// A folder of its own, for its configuration and log.
    own: tempfile::TempDir,
    program: PathBuf,
    port: u16,
    server: Option<Server>,
}

impl Web {
    /// Starts the server on `folder`; `settings` are those of its only location. Returns `None` if
    /// nginx is not installed.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn start(folder: &Path, settings: &str) -> Option<Web> {
        let program = program("nginx")?;
        let port = free_port();
        let own = tempfile::tempdir().unwrap();
        let mut web = Web { folder: folder.into(), own, program, port, server: None };
        web.restart(settings);
        Some(web)
    }

    /// Kills the server.
    pub fn stop(&mut self) {
        self.server = None;
    }

    /// Starts the server anew, on the same port.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn restart(&mut self, settings: &str) {
        self.stop();
        let folder = self.folder.display();
        let own = self.own.path();
        let at = own.display();
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
        let config = own.join("config");
        fs::write(&config, text).unwrap();
        let mut command = Command::new(&self.program);
        command.arg("-c").arg(&config).arg("-p").arg(own).arg("-e").arg("stderr");
        self.server = Some(Server::start(command, port));
    }

    /// Returns the requests that the server has answered: status and range of each.
    pub fn requests(&self) -> Vec<String> {
        let log = fs::read_to_string(self.own.path().join("access.log")).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }

    /// Returns the server's port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the URL of a file.
    pub fn url(&self, file: &str) -> String {
        format!("http://127.0.0.1:{}/{file}", self.port)
    }
}

/// An s3s-fs that serves the folders of a folder as buckets, with one pair of keys. It reads an
/// object whole for each request, unless that was put there by a request; and it is a debug build.
/// The lab is too slow for both.
#[derive(Debug)]
pub struct S3 {
    server: Server,
}

impl S3 {
    /// The id of the key.
    pub const KEY: &str = "AKIAEXAMPLE";
    /// The secret part.
    pub const SECRET: &str = "hidden/secret";

    /// Starts the server. Returns `None` if it is not installed.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn start(folder: &Path) -> Option<S3> {
        S3::start_at(folder, free_port())
    }

    /// Like [`start`](Self::start), on this port.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn start_at(folder: &Path, port: u16) -> Option<S3> {
        let mut command = Command::new(program("s3s-fs")?);
        command.args(["--host", "127.0.0.1", "--port", &port.to_string()]);
        command.args(["--access-key", S3::KEY, "--secret-key", S3::SECRET]).arg(folder);
        command.env("RUST_LOG", "off");
        Some(S3 { server: Server::start(command, port) })
    }

    /// Returns the server's port.
    pub fn port(&self) -> u16 {
        self.server.port
    }

    /// Returns the variables with which a client finds the server.
    pub fn variables(&self) -> [(&'static str, String); 3] {
        S3::variables_at("127.0.0.1", self.port())
    }

    /// Returns the variables with which a client finds the server at an address that leads to it.
    pub fn variables_at(host: &str, port: u16) -> [(&'static str, String); 3] {
        [
            ("AWS_ACCESS_KEY_ID", S3::KEY.into()),
            ("AWS_SECRET_ACCESS_KEY", S3::SECRET.into()),
            ("AWS_ENDPOINT_URL", format!("http://{host}:{port}")),
        ]
    }

    /// Returns the port on which clients of this process find a server, by its variables.
    ///
    /// # Panics
    ///
    /// If there are none.
    pub fn port_of_variables() -> u16 {
        let url = std::env::var("AWS_ENDPOINT_URL").unwrap();
        url.rsplit(':').next().unwrap().parse().unwrap()
    }

    /// Runs this test of this program in a new process whose clients find a server on this port.
    ///
    /// # Panics
    ///
    /// If the test fails there.
    pub fn run_client(test: &str, port: u16) {
        let variables = S3::variables_at("127.0.0.1", port);
        child::run(test, &variables.each_ref().map(|(name, value)| (*name, &**value)));
    }
}
