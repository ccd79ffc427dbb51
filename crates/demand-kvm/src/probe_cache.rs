// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The outcomes of a probe's trials, kept in a file for as long as the kernel runs.

use std::ffi::{OsStr, OsString};
use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};

use crate::features::{Scope, Trials};
use crate::probe::probe_with;
use crate::scratch::{Ending, Userfault};
use crate::{EngineChoice, Probe, Trial, found};

/// The most that is read of a file, in bytes.
const MOST: u64 = 4096;

/// A file that keeps the outcomes of trying engines, for later starts of the same program under the
/// same kernel.
///
/// The caller names the file, and it belongs to one program: the library chooses no place, and
/// creates no directory. Only outcomes that cannot change are kept: whether KVM has an engine, and
/// whether KVM's own accesses respect the bitmap. What depends on this process or on the moment,
/// such as the access to `/dev/kvm` or a lack of memory, is found anew each time.
///
/// The file counts only if it was written by the same program, in the same boot of the same kernel,
/// with KVM's module loaded only once. A file that says otherwise is ignored, and so is one that
/// cannot be read, is not complete, or belongs to another user: the trials are then made, and the
/// file is replaced. The file and its directory must belong to this process's user, with no
/// permission for others to write to either. Nothing that guards the guest relies on the file
/// alone: if it says that KVM stops vCPUs at missing pages, a trial confirms that on another
/// thread, for which the first memslot waits. If it does not, that memslot is refused
/// ([`SlotError::Unverified`](crate::SlotError::Unverified) or
/// [`Unarmed`](crate::SlotError::Unarmed)), and the file is removed. Errors of writing are logged
/// (`debug`) and have no other effect. Any number of processes may use the same file at once.
///
/// # Examples
///
/// ```
/// use demand_kvm::{EngineChoice, ProbeCache, resolve};
///
/// let folder = tempfile::tempdir().unwrap();
/// let cache = ProbeCache::new(folder.path().join("probe"));
/// for _ in 0..2 {
///     // The second time, the start waits for no trial.
///     match resolve(EngineChoice::Auto, &cache.probe_for(EngineChoice::Auto)) {
///         Ok(engine) => println!("pages are caught by {engine}"),
///         Err(error) => eprintln!("{error}"),
///     }
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeCache {
    path: PathBuf,
}

impl ProbeCache {
    /// Uses the file at `path`, which need not exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        ProbeCache { path: path.into() }
    }

    /// Returns the file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tests all capabilities of this host, now, as [`probe`](crate::probe) does, and replaces the
    /// file.
    pub fn probe(&self) -> Probe {
        let mut trials = Trials::default();
        let probe = probe_with(&mut trials, Scope::ALL, Ending::Here);
        if let Some(key) = Key::current() {
            self.keep(&key, trials);
        }
        probe
    }

    /// Returns the capabilities of this host on which [`resolve`](crate::resolve) depends for this
    /// choice, as [`probe_for`](crate::probe_for) does. Trials whose outcome the file has are not
    /// made again; the outcomes of others are added to it.
    pub fn probe_for(&self, choice: EngineChoice) -> Probe {
        let scope = Scope::of(choice);
        if scope == Scope::NONE {
            return probe_with(&mut Trials::default(), scope, Ending::Beside);
        }
        let key = Key::current();
        let kept = key.as_ref().and_then(|key| self.load(key)).unwrap_or_default();
        let mut trials = kept;
        if let Some(known) = found::known() {
            // This process knows better.
            trials.userfault = known;
        } else if scope.userfault && kept.userfault.trial.works() {
            let cache = self.clone();
            if !found::check_beside(kept.userfault, move || cache.forget()) {
                trials.userfault = Userfault::UNTRIED;
            }
        }
        let probe = probe_with(&mut trials, scope, Ending::Beside);
        if let Some(key) = key.filter(|_| lasting(trials) != kept) {
            self.keep(&key, trials);
        }
        probe
    }

    /// Removes the file, which is wrong.
    fn forget(&self) {
        log::warn!("{}: the kept probe is wrong; removing it", self.path.display());
        let removed = self.open_directory().and_then(|(directory, name)| {
            Ok(rustix::fs::unlinkat(&directory, name, AtFlags::empty())?)
        });
        if let Err(error) = removed {
            log::debug!("{}: {error}", self.path.display());
        }
    }

    /// Returns the kept outcomes, if there are any for this key.
    fn load(&self, key: &Key) -> Option<Trials> {
        match self.read() {
            Ok(text) => {
                let trials = parse(&text, key);
                if trials.is_none() {
                    log::debug!("{}: not of this kernel and program", self.path.display());
                }
                trials
            }
            Err(error) => {
                log::debug!("{}: {error}", self.path.display());
                None
            }
        }
    }

    fn keep(&self, key: &Key, trials: Trials) {
        if let Err(error) = self.write(&format(key, lasting(trials))) {
            log::debug!("cannot keep the probe in {}: {error}", self.path.display());
        }
    }

    /// Opens the directory, and returns it with the file's name.
    fn open_directory(&self) -> io::Result<(OwnedFd, &OsStr)> {
        let name = self.path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, directory, flags, Mode::empty())?;
        expect_own(&rustix::fs::fstat(&directory)?, "the directory")?;
        Ok((directory, name))
    }

    fn read(&self) -> io::Result<String> {
        let (directory, name) = self.open_directory()?;
        // A FIFO would block without NONBLOCK.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&directory, name, flags, Mode::empty())?;
        let status = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
            return Err(io::Error::other("it is not a regular file"));
        }
        expect_own(&status, "it")?;
        let mut text = String::new();
        File::from(file).take(MOST).read_to_string(&mut text)?;
        Ok(text)
    }

    /// Replaces the file at once: another process sees all of the old one, or all of the new one.
    fn write(&self, text: &str) -> io::Result<()> {
        let (directory, name) = self.open_directory()?;
        let mut unfinished = OsString::from(name);
        // Two threads of a process use the same name, and one of them fails.
        unfinished.push(format!(".{}", std::process::id()));
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = match rustix::fs::openat(&directory, &unfinished, flags, mode) {
            // A process with this number was killed as it wrote. The next start tries again.
            Err(rustix::io::Errno::EXIST) => {
                rustix::fs::unlinkat(&directory, &unfinished, AtFlags::empty())?;
                return Err(rustix::io::Errno::EXIST.into());
            }
            file => file?,
        };
        let written = File::from(file).write_all(text.as_bytes());
        let moved = written
            .and_then(|()| Ok(rustix::fs::renameat(&directory, &unfinished, &directory, name)?));
        if moved.is_err() {
            let _ = rustix::fs::unlinkat(&directory, &unfinished, AtFlags::empty());
        }
        moved
    }
}

/// Checks that a file belongs to this process's user, and that no other user can write to it.
fn expect_own(status: &rustix::fs::Stat, which: &str) -> io::Result<()> {
    if status.st_uid != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other(format!("{which} belongs to user {}", status.st_uid)));
    }
    if status.st_mode & 0o022 != 0 {
        return Err(io::Error::other(format!("other users may write to {which}")));
    }
    Ok(())
}

/// The properties on which the outcomes depend: lines of text.
#[derive(Debug, PartialEq, Eq)]
struct Key(String);

impl Key {
    /// Returns the key of this program under this kernel; `None` if a part of it cannot be found
    /// out, as in a sandbox without /proc or /sys.
    fn current() -> Option<Self> {
        let kernel = rustix::system::uname();
        let [release, version, machine] =
            [kernel.release(), kernel.version(), kernel.machine()].map(|part| part.to_str());
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        // The directory is created when KVM's module is loaded, and the kernel does not use the
        // number of such a directory again.
        let kvm = fs::metadata("/sys/devices/virtual/misc/kvm").ok()?.ino();
        // Patches of the running kernel, of which most have none.
        let mut patches: Vec<_> = fs::read_dir("/sys/kernel/livepatch")
            .map(|entries| entries.flatten().map(|entry| entry.file_name()).collect())
            .unwrap_or_default();
        patches.sort_unstable();
        let program = fs::metadata("/proc/self/exe").ok()?;
        let (device, file, size) = (program.dev(), program.ino(), program.size());
        let (changed, ns) = (program.mtime(), program.mtime_nsec());
        Some(Key(format!(
            "demand-kvm {}, trials of engines\n\
             program {device}:{file}, {size} bytes, of {changed}.{ns:09}\n\
             kernel {} {} {}\n\
             boot {}\n\
             kvm {kvm}, patches {patches:?}\n",
            env!("CARGO_PKG_VERSION"),
            release.ok()?,
            version.ok()?,
            machine.ok()?,
            boot.trim(),
        )))
    }
}

/// Returns those outcomes that another trial would have as well.
fn lasting(trials: Trials) -> Trials {
    let Trials { userfault, attributes, protected_vm, guest_memfd: _ } = trials;
    let attributes = if attributes.is_lasting() { attributes } else { Trial::Untried };
    Trials {
        userfault: if userfault.is_known() { userfault } else { Userfault::UNTRIED },
        attributes,
        protected_vm: protected_vm && attributes != Trial::Untried,
        guest_memfd: Trial::Untried,
    }
}

/// A trial, as the file has it.
struct Word(Trial);

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Trial::Works => f.write_str("works"),
            Trial::Refused { errno } => write!(f, "refused {errno}"),
            Trial::Ignored => f.write_str("ignored"),
            Trial::Untried => f.write_str("untried"),
        }
    }
}

impl Word {
    fn parse(text: &str) -> Option<Trial> {
        let trial = match text {
            "works" => Trial::Works,
            "ignored" => Trial::Ignored,
            "untried" => return Some(Trial::Untried),
            _ => Trial::Refused { errno: text.strip_prefix("refused ")?.parse().ok()? },
        };
        Some(trial).filter(|trial| trial.is_lasting())
    }
}

fn format(key: &Key, trials: Trials) -> String {
    let mut text = key.0.clone();
    let own = match trials.userfault.own_accesses {
        Some(true) => "stop",
        Some(false) => "pass",
        None => "unknown",
    };
    let vm = if trials.protected_vm { "created" } else { "none" };
    let (userfault, attributes) = (Word(trials.userfault.trial), Word(trials.attributes));
    write!(
        text,
        "userfault {userfault}\nown accesses {own}\nattributes {attributes}\nprotected VM {vm}\n\
         end\n"
    )
    .expect("writing to a String cannot fail");
    text
}

/// Returns the outcomes, if the text was written for this key and is complete.
fn parse(text: &str, key: &Key) -> Option<Trials> {
    let mut lines = text.strip_prefix(&key.0)?.split('\n');
    let mut value = |name| lines.next()?.strip_prefix(name);
    let trials = Trials {
        userfault: Userfault {
            trial: Word::parse(value("userfault ")?)?,
            own_accesses: match value("own accesses ")? {
                "stop" => Some(true),
                "pass" => Some(false),
                "unknown" => None,
                _ => return None,
            },
        },
        attributes: Word::parse(value("attributes ")?)?,
        protected_vm: match value("protected VM ")? {
            "created" => true,
            "none" => false,
            _ => return None,
        },
        guest_memfd: Trial::Untried,
    };
    let is_whole = value("end") == Some("") && value("") == Some("") && lines.next().is_none();
    // Anything else was not written by `format`.
    (is_whole && lasting(trials) == trials).then_some(trials)
}
