// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A back-end in a separate process: the test binary is started again and runs vhost-user-backend
//! there. It reads the guest addresses that a test requests, each on a separate thread.

use std::env;
use std::io::{BufRead, BufReader, Result, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;

use test_support::wait::{A_WHILE, PATIENCE, listens, until};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// A guest address, and the channel to the test that waits for its word.
type Asked = (u64, Sender<u64>);
type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The answer where no memory is.
pub(crate) const NOTHING: u64 = u64::MAX;

const SOCKET: &str = "DEMAND_VHOST_TEST_SOCKET";

/// Runs the back-end if this is its process. Call it from a top-level test named `back_end`, which
/// is the test that [`Process::start`] runs.
pub(crate) fn run_if_asked() {
    let Ok(socket) = env::var(SOCKET) else { return };
    let memory = Memory::new(GuestMemoryMmap::new());
    let control = UnixStream::connect(format!("{socket}.control")).unwrap();
    let reads = control.try_clone().unwrap();
    let seen = memory.clone();
    thread::spawn(move || read_what_is_asked(reads, &seen));
    let device = Arc::new(Mutex::new(Device { memory: memory.clone() }));
    let mut daemon = VhostUserDaemon::new("test".into(), device, memory).unwrap();
    let _ = daemon.serve(&socket);
    // Threads that still wait for a page end with the process.
    std::process::exit(0);
}

/// Answers each line that contains a guest address with the address and the word there.
fn read_what_is_asked(control: UnixStream, memory: &Memory) {
    let answers = Arc::new(Mutex::new(control.try_clone().unwrap()));
    for line in BufReader::new(control).lines() {
        let Ok(address) = line.unwrap_or_default().parse::<u64>() else { return };
        let (memory, answers) = (memory.clone(), answers.clone());
        thread::spawn(move || {
            let word = memory.memory().read_obj(GuestAddress(address)).unwrap_or(NOTHING);
            writeln!(answers.lock().unwrap(), "{address} {word}").unwrap();
        });
    }
}

struct Device {
    memory: Memory,
}

impl VhostUserBackendMut for Device {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }
    fn max_queue_size(&self) -> usize {
        256
    }
    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::PAGEFAULT
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }
    fn set_event_idx(&mut self, _: bool) {}
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        (offset..offset + size).map(|byte| byte.to_le_bytes()[0]).collect()
    }
    fn set_config(&mut self, _: u32, _: &[u8]) -> Result<()> {
        Ok(())
    }
    fn update_memory(&mut self, memory: Memory) -> Result<()> {
        self.memory = memory;
        Ok(())
    }
    fn handle_event(
        &mut self,
        _: u16,
        _: EventSet,
        vrings: &[VringRwLock],
        _: usize,
    ) -> Result<()> {
        vrings[0].signal_used_queue()
    }
}

/// The test's handle to the back-end's process.
pub(crate) struct Process {
    pub(crate) socket: PathBuf,
    _directory: tempfile::TempDir,
    child: Child,
    control: UnixStream,
    waiting: Arc<Mutex<Vec<Asked>>>,
}

impl Process {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let listener = UnixListener::bind(directory.path().join("s.control")).unwrap();
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "back_end", "--nocapture", "--test-threads=1"])
            .env(SOCKET, &socket)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (control, _) = listener.accept().unwrap();
        let waiting = Arc::new(Mutex::new(Vec::<Asked>::new()));
        let (lines, told) = (control.try_clone().unwrap(), waiting.clone());
        thread::spawn(move || {
            for line in BufReader::new(lines).lines() {
                let line = line.unwrap_or_default();
                let Some((address, word)) = line.split_once(' ') else { return };
                let address: u64 = address.parse().unwrap();
                let mut waiting = told.lock().unwrap();
                let index = waiting.iter().position(|(asked, _)| *asked == address).unwrap();
                let _ = waiting.swap_remove(index).1.send(word.parse().unwrap());
            }
        });
        until("the back-end listens", || listens(child.id()));
        Process { socket, _directory: directory, child, control, waiting }
    }

    /// Requests a read of the word at a guest address.
    pub(crate) fn read(&self, address: u64) -> Receiver<u64> {
        let (sender, receiver) = mpsc::channel();
        self.waiting.lock().unwrap().push((address, sender));
        writeln!(&self.control, "{address}").unwrap();
        receiver
    }

    /// Requests a read of the word at a guest address, and compares the result.
    pub(crate) fn expect(&self, address: u64) {
        expect(&self.read(address), address);
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

pub(crate) fn expect(reader: &Receiver<u64>, address: u64) {
    let word = reader
        .recv_timeout(PATIENCE)
        .unwrap_or_else(|_| panic!("the read of {address:#x} was not served"));
    assert_eq!(word, super::word_of(address), "the word at {address:#x}");
}

pub(crate) fn expect_blocked(reader: &Receiver<u64>) {
    if let Ok(word) = reader.recv_timeout(A_WHILE) {
        panic!("read {word:#x} before its page had arrived");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The process may already have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
