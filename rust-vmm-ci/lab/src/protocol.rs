// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The protocol between the host and the agent: each message is one line of JSON on a virtio port.

use std::ffi::OsString;
use std::io::{self, BufRead, Write};

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Name of the port that carries these messages.
pub(crate) const CONTROL_PORT: &str = "lab.control";
/// Name of the port that carries the command's standard output.
pub(crate) const STDOUT_PORT: &str = "lab.stdout";
/// Name of the port that carries the command's standard error.
pub(crate) const STDERR_PORT: &str = "lab.stderr";
/// Mount tag of the host's root.
pub(crate) const ROOT_TAG: &str = "root";
/// Mount tag of the writable shared folder.
pub(crate) const OUT_TAG: &str = "out";

/// Message from the host to the agent: the command to run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// The complete environment.
    pub environment: Vec<(OsString, OsString)>,
    /// The working directory.
    pub directory: OsString,
    /// The writable shared folder.
    pub out: OsString,
    /// Whether the machine has a network card.
    pub network: bool,
    /// Number of 2M huge pages that the kernel should have reserved.
    pub hugepages: u64,
    /// Number of 1G huge pages that the kernel should have reserved.
    pub gigapages: u64,
}

/// Message from the agent to the host: the state of the command.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The command is being started.
    Started,
    /// The command has ended, and all its output has been sent.
    Ended {
        /// Exit status as in a shell: 128 + n for signal n.
        status: u8,
        /// Bytes sent to [`STDOUT_PORT`].
        stdout: u64,
        /// Bytes sent to [`STDERR_PORT`].
        stderr: u64,
        /// The kernel log, if it contains a WARN, BUG or oops.
        complaint: Option<String>,
    },
    /// The agent failed, with this error.
    Failed(String),
}

/// Sends one message.
pub(crate) fn send(mut port: impl Write, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    port.write_all(&line).context("a message was not sent")
}

/// Sends bytes that are not a message, for the sake of the interrupt that they cause. The agent
/// drops everything after its job.
pub(crate) fn nudge(mut port: impl Write) -> io::Result<()> {
    port.write_all(b"\n")
}

/// Receives one message, or returns `None` if the other side has closed the connection.
pub(crate) fn receive<T: DeserializeOwned>(port: &mut impl BufRead) -> Result<Option<T>> {
    let mut line = Vec::new();
    match port.read_until(b'\n', &mut line) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
        Err(error) => return Err(error).context("no message could be read"),
    }
    if line.is_empty() {
        return Ok(None);
    }
    ensure!(line.ends_with(b"\n"), "a message was cut short");
    Ok(Some(serde_json::from_slice(&line)?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn messages_come_through_whole() {
        let odd = OsString::from_vec(b"not \xff utf-8\n".to_vec());
        let job = Job {
            command: vec!["cmd".into(), odd.clone()],
            environment: vec![("NAME".into(), odd.clone())],
            directory: "/".into(),
            out: "/out".into(),
            network: true,
            hugepages: 1,
            gigapages: 0,
        };
        let mut wire = Vec::new();
        send(&mut wire, &job).expect("sent");
        send(&mut wire, &Report::Started).expect("sent");
        let mut wire = wire.as_slice();
        let job: Job = receive(&mut wire).expect("read").expect("there");
        assert_eq!(job.command[1], odd);
        assert_eq!(job.environment[0].1, odd);
        assert!(matches!(receive(&mut wire), Ok(Some(Report::Started))));
        assert!(matches!(receive::<Report>(&mut wire), Ok(None)));
    }

    #[test]
    fn half_a_message_is_an_error() {
        let mut wire = b"\"Started\"".as_slice();
        assert!(receive::<Report>(&mut wire).is_err());
    }
}
