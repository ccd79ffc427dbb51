// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A proxy from TCP to a server's Unix socket, which can cut its connections.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// A proxy on a free port of the loopback interface. Its threads end with their connections.
pub(crate) struct Proxy {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Proxy {
    /// Starts a proxy. `limit` returns the number of bytes after which a connection, by its number,
    /// is cut.
    pub(crate) fn start(socket: PathBuf, limit: fn(usize) -> u64) -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let proxy = Proxy { address: listener.local_addr().unwrap(), connections: Arc::default() };
        let connections = proxy.connections.clone();
        thread::spawn(move || {
            for client in listener.incoming() {
                let number = connections.fetch_add(1, Ordering::SeqCst);
                let server = UnixStream::connect(&socket);
                let (Ok(client), Ok(server)) = (client, server) else { continue };
                client.set_nodelay(true).unwrap();
                forward(client, server, limit(number));
            }
        });
        proxy
    }

    pub(crate) fn url(&self) -> String {
        format!("nbd://{}/", self.address)
    }

    /// Returns the number of connections that were made.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

fn forward(client: TcpStream, server: UnixStream, limit: u64) {
    let (mut from_client, mut to_server) =
        (client.try_clone().unwrap(), server.try_clone().unwrap());
    thread::spawn(move || {
        let _ = io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Both);
    });
    thread::spawn(move || {
        let (mut from_server, mut to_client) = (server.take(limit), client);
        let mut bytes = [0; 16 << 10];
        while let Ok(count @ 1..) = from_server.read(&mut bytes) {
            if to_client.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        let _ = to_client.shutdown(Shutdown::Both);
        let _ = from_server.into_inner().shutdown(Shutdown::Both);
    });
}
