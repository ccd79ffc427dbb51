// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The self-verifying work: memory, a journal and clocks, until stopped.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use guest_work::{Beat, Command, Journal as Kind, Line, Prove};
use rustix::system::RebootCommand;

use crate::clock::{Beats, Reading};
use crate::console::{self, say, wrong};
use crate::echo::Echo;
use crate::file::LargeFile;
use crate::journal::Journal;
use crate::memory::Memory;
use crate::{kernel_log, setup};

/// Works until stopped, or until the requested number of beats; then verifies everything.
pub(crate) fn run(asked: &Prove, commands: &Receiver<Command>) {
    if asked.journal != Kind::None {
        setup::await_path(asked.device.as_ref())
            .unwrap_or_else(|why| wrong("disk", &format!("{why:#}")));
    }
    let beat = Duration::from_millis(asked.beat_ms);
    let late = Duration::from_millis(asked.jump_ms);
    let memory = Memory::start(asked.memory, Duration::from_micros(asked.rest_us));
    let journal = Journal::start(asked).unwrap_or_else(|why| wrong("disk", &format!("{why:#}")));
    let file = LargeFile::start(asked).unwrap_or_else(|why| wrong("disk", &format!("{why:#}")));
    let echo = Echo::start(asked).unwrap_or_else(|why| wrong("net", &format!("{why:#}")));
    say(&setup::ready());
    let mut beats =
        Beats::start(beat.saturating_add(late)).unwrap_or_else(|why| wrong("clock", &why));
    let records = || journal.as_ref().map_or(0, Journal::records);
    let echoes = || echo.as_ref().map_or((0, 0), Echo::echoes);
    let mut number = 0;
    while asked.beats == 0 || number < asked.beats {
        match commands.recv_timeout(beat) {
            Ok(Command::Stop) => break,
            Ok(Command::Reset(by)) => console::reset(by),
            Ok(Command::Panic) => console::panic(),
            Ok(Command::Halt) => console::end(RebootCommand::Halt),
            Ok(Command::Jump) => beats.announce(),
            Ok(Command::Poke) => memory.poke(),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => wrong("work", "commands are no longer read"),
        }
        let now = Reading::now().unwrap_or_else(|why| wrong("clock", &why));
        if let Some(jump) = beats.check(now).unwrap_or_else(|why| wrong("clock", &why)) {
            say(&jump);
        }
        number += 1;
        let (echoes, lost) = echoes();
        say(&Line::Beat(Beat {
            number,
            pages: memory.pages(),
            records: records(),
            echoes,
            lost,
            mono_us: now.mono_us,
            real_us: now.real_us.cast_unsigned(),
        }));
    }
    let (pages, records) = (memory.pages(), records());
    memory.finish();
    // Before the journal, which unmounts the disk.
    if let Some(file) = file {
        file.finish();
    }
    if let Some(journal) = journal {
        journal.finish();
    }
    let (echoes, lost) = echo.map_or((0, 0), Echo::finish);
    say(&Line::Done { pages, records, echoes, lost, complaints: kernel_log::complaints() });
}
