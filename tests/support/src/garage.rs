// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A cluster of three nodes of Garage, an object store: each object is on all of them, and requests
//! succeed while two are up. `rust-vmm-ci/servers --garage` builds it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::servers::{Server, free_port, program};
use crate::wait::until;

/// The number of nodes.
const NODES: usize = 3;
/// The key of the nodes among each other.
const SECRET: &str = "1799bccfd7411eddcf9ebd316bc1f5287ad12a68094e1c6ac6abde7e6feae1ec";

/// A running cluster on loopback, with the bucket `store`. Its processes end with this value.
#[derive(Debug)]
pub struct Garage {
    program: PathBuf,
    folder: TempDir,
    /// The ports on which the nodes are object stores.
    ports: [u16; NODES],
    nodes: [Option<Server>; NODES],
    kills: usize,
}

impl Garage {
    /// The id of the key to the bucket.
    pub const KEY: &str = "GK0123456789abcdef01234567";
    /// The secret part.
    pub const KEY_SECRET: &str = "b892c0665f0ada8a4755dae98baa3b133590e11dae3bcc1f9d769d67f16c3835";

    /// Starts a cluster, the first node of which is an object store on this port. Returns `None` if
    /// Garage is not installed.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn start(port: u16) -> Option<Garage> {
        let program = program("garage")?;
        let folder = tempfile::tempdir().unwrap();
        let ports = [port, free_port(), free_port()];
        let mut garage =
            Garage { program, folder, ports, nodes: [const { None }; NODES], kills: 0 };
        (0..NODES).for_each(|node| garage.configure(node));
        (0..NODES).for_each(|node| garage.restart(node));
        let ids: Vec<_> = (0..NODES).map(|node| garage.tell(node, &["node", "id", "-q"])).collect();
        for id in &ids {
            garage.tell(0, &["node", "connect", id.trim()]);
        }
        for id in &ids {
            let id = id.split('@').next().unwrap();
            garage.tell(0, &["layout", "assign", id, "-z", "here", "-c", "1G"]);
        }
        garage.tell(0, &["layout", "apply", "--version", "1"]);
        garage.tell(0, &["key", "import", Self::KEY, Self::KEY_SECRET, "--yes"]);
        garage.tell(0, &["bucket", "create", "store"]);
        let allow = ["bucket", "allow", "--read", "--write", "store", "--key", Self::KEY];
        garage.tell(0, &allow);
        Some(garage)
    }

    /// Returns the variables with which a client finds a node on this port.
    pub fn variables_at(port: u16) -> [(&'static str, String); 3] {
        [
            ("AWS_ACCESS_KEY_ID", Self::KEY.into()),
            ("AWS_SECRET_ACCESS_KEY", Self::KEY_SECRET.into()),
            ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
        ]
    }

    /// Kills a node.
    pub fn kill(&mut self, node: usize) {
        self.nodes[node] = None;
        self.kills += 1;
    }

    /// Returns the number of nodes that were killed so far.
    pub fn kills(&self) -> usize {
        self.kills
    }

    /// Starts a node.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn restart(&mut self, node: usize) {
        let mut command = self.command(node);
        command.arg("server").env("RUST_LOG", "error").stderr(Stdio::null());
        self.nodes[node] = Some(Server::start(command, self.ports[node]));
    }

    fn configuration(&self, node: usize) -> PathBuf {
        self.folder.path().join(format!("{node}.toml"))
    }

    fn configure(&self, node: usize) {
        let at = |name: &str| -> PathBuf { self.folder.path().join(format!("{node}-{name}")) };
        let shown = |path: &Path| path.display().to_string();
        let (rpc, admin, port) = (free_port(), free_port(), self.ports[node]);
        let text = format!(
            "metadata_dir = '{}'\ndata_dir = '{}'\ndb_engine = 'lmdb'\nreplication_factor = 3\n\
             rpc_bind_addr = '127.0.0.1:{rpc}'\nrpc_public_addr = '127.0.0.1:{rpc}'\n\
             rpc_secret = '{SECRET}'\n\
             [s3_api]\ns3_region = 'us-east-1'\napi_bind_addr = '127.0.0.1:{port}'\n\
             [admin]\napi_bind_addr = '127.0.0.1:{admin}'\n",
            shown(&at("meta")),
            shown(&at("data")),
        );
        fs::write(self.configuration(node), text).unwrap();
    }

    fn command(&self, node: usize) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("-c").arg(self.configuration(node));
        command
    }

    /// Gives a node a command until it succeeds: the nodes may not know each other yet. Returns what
    /// it prints.
    fn tell(&self, node: usize, arguments: &[&str]) -> String {
        let mut printed = String::new();
        until(&arguments.join(" "), || {
            let output = self.command(node).args(arguments).output().unwrap();
            printed = String::from_utf8_lossy(&output.stdout).into_owned();
            if !output.status.success() {
                println!("{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
            }
            output.status.success()
        });
        printed
    }
}
