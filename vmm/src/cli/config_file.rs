// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The file of `--config`: a VM's configuration as JSON or TOML, whose parts options replace.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::config::names::with_keys;
use crate::error::{Error, Kind};

/// Maximum size of the file, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Time limit for a pipe or a terminal, such as /dev/stdin, to reach its end.
const PATIENCE: Duration = Duration::from_secs(10);

/// An error from a configuration file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigFileError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}; name a readable file", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file is a pipe or a terminal, and its end does not arrive.
    #[error(
        "cannot read the configuration {}: its end did not arrive within {} s; check the program \
         that writes it, or name a file",
        path.display(), within.as_secs()
    )]
    Late {
        /// The file.
        path: PathBuf,
        /// The time that it was given.
        within: Duration,
    },
    /// The file is too large to be a configuration.
    #[error(
        "cannot read the configuration {}: it is larger than {MAX_BYTES} bytes; name a \
         configuration of a VM",
        path.display()
    )]
    Large {
        /// The file.
        path: PathBuf,
    },
    /// The content is no configuration.
    #[error(
        "cannot use the configuration {}: {place}{what}; correct it there",
        path.display()
    )]
    Content {
        /// The file.
        path: PathBuf,
        /// The line, the column and the key of the fault, as far as they are known.
        place: Place,
        /// The fault.
        what: String,
    },
    /// Neither the file nor the command line gives a part that is needed.
    #[error("no {key} is given; give --{key}, or {key} in the file of --config")]
    Missing {
        /// The part's key, which is its option's name, too.
        key: String,
    },
    /// An option names a path that JSON cannot hold.
    #[error("cannot use --{key}: its path is not UTF-8; rename the file")]
    NotText {
        /// The option's name.
        key: String,
    },
    /// The options do not go together.
    #[error("cannot use the options together: {0}; correct one of them")]
    Options(#[source] serde_json::Error),
}

impl From<ConfigFileError> for Error {
    fn from(error: ConfigFileError) -> Self {
        let kind = match error {
            ConfigFileError::Read { .. } | ConfigFileError::Late { .. } => Kind::Failed,
            ConfigFileError::Large { .. }
            | ConfigFileError::Content { .. }
            | ConfigFileError::Missing { .. }
            | ConfigFileError::NotText { .. }
            | ConfigFileError::Options(_) => Kind::Usage,
        };
        Error::of(kind, error)
    }
}

/// A place in a configuration file.
#[derive(Debug)]
pub struct Place {
    /// Line and column, from 1. Column 0 is that of a line without a character.
    position: Option<(usize, usize)>,
    /// The key, as in `devices[0].queues`; `.` for the whole document, and `?` at its end for one
    /// that is not known, because the text ends before it.
    key: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.position {
            Some((line, 0)) => write!(f, "line {line}: ")?,
            Some((line, column)) => write!(f, "line {line}, column {column}: ")?,
            None => {}
        }
        match self.key.strip_suffix('?').unwrap_or(&self.key).trim_end_matches('.') {
            "" => Ok(()),
            key => write!(f, "{key}: "),
        }
    }
}

/// The parts of a configuration that options give.
#[derive(Debug, Default)]
pub(crate) struct GivenParts {
    parts: Map<String, Value>,
    /// The first option that has no JSON form.
    unfit: Option<String>,
}

impl GivenParts {
    /// Adds a part, if it is given.
    pub(crate) fn put(&mut self, key: &str, part: Option<impl Serialize>) {
        match part.map(serde_json::to_value) {
            Some(Ok(value)) => drop(self.parts.insert(key.to_owned(), value)),
            // Only a path that is not UTF-8 has none.
            Some(Err(_)) => drop(self.unfit.get_or_insert_with(|| key.to_owned())),
            None => {}
        }
    }

    /// Returns an error that names the parts as they were given: by their options, and with a file
    /// all others by their keys.
    pub(crate) fn named_as_given(&self, error: Error, file: Option<&Path>) -> Error {
        match file {
            Some(_) => error.map_line(|line| with_keys(line, |key| !self.parts.contains_key(key))),
            None => error,
        }
    }

    /// Returns the configuration that these parts and the file give; where both give a part, the
    /// file's is replaced.
    ///
    /// # Errors
    ///
    /// One that names the file and the place in it, or the missing part.
    pub(crate) fn over<T: DeserializeOwned>(
        self,
        file: Option<&Path>,
    ) -> Result<T, ConfigFileError> {
        if let Some(key) = self.unfit {
            return Err(ConfigFileError::NotText { key });
        }
        let mut parts = file.map(read::<T>).transpose()?.unwrap_or_default();
        parts.extend(self.parts);
        serde_json::from_value(Value::Object(parts)).map_err(|error| {
            match missing_key(&error.to_string()) {
                Some(key) => ConfigFileError::Missing { key: key.into() },
                None => ConfigFileError::Options(error),
            }
        })
    }
}

/// Returns the key that serde misses, according to its message.
fn missing_key(message: &str) -> Option<&str> {
    message.strip_prefix("missing field `")?.split('`').next()
}

/// Reads the parts of a configuration: TOML if the file's name ends with `.toml`, otherwise JSON.
/// They must fit `T`, in which parts may be missing.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Map<String, Value>, ConfigFileError> {
    let text = read_text(path, PATIENCE)?;
    let parse = match path.extension().is_some_and(|ending| ending == "toml") {
        true => (parse_toml::<T> as Parse<T>, parse_toml::<Map<String, Value>> as Parse<_>),
        false => (parse_json::<T> as Parse<T>, parse_json::<Map<String, Value>> as Parse<_>),
    };
    let parts = match (parse.0)(&text) {
        // The type has examined all keys that there are.
        Err((place, what)) if place.key == "." && missing_key(&what).is_some() => (parse.1)(&text),
        Err(fault) => Err(fault),
        Ok(_) => (parse.1)(&text),
    };
    parts.map_err(|(place, what)| ConfigFileError::Content { path: path.into(), place, what })
}

/// Returns the text of a file. One that is not a regular file gets `patience` to reach its end: a
/// pipe (`/dev/stdin`, `<(command)`) may have a slow writer, or none.
fn read_text(path: &Path, patience: Duration) -> Result<String, ConfigFileError> {
    let failed = |source| ConfigFileError::Read { path: path.into(), source };
    let late = || ConfigFileError::Late { path: path.into(), within: patience };
    let nonblock = OFlags::NONBLOCK.bits().cast_signed();
    // Opening a pipe without a writer would block, too.
    let mut file = File::options().read(true).custom_flags(nonblock).open(path).map_err(failed)?;
    let waits = !file.metadata().map_err(failed)?.is_file();
    let deadline = Instant::now() + patience;
    let mut bytes = Vec::new();
    loop {
        if waits && !is_readable(&file, deadline).map_err(failed)? {
            return Err(late());
        }
        let room = MAX_BYTES + 1 - bytes.len() as u64;
        match (&mut file).take(room).read_to_end(&mut bytes) {
            Ok(_) if bytes.len() as u64 > MAX_BYTES => {
                return Err(ConfigFileError::Large { path: path.into() });
            }
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed(error)),
        }
    }
    String::from_utf8(bytes)
        .map_err(|error| failed(io::Error::new(ErrorKind::InvalidData, error.utf8_error())))
}

/// Waits until the file has data or has ended. Returns whether it has before the deadline.
fn is_readable(file: &File, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(file, PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A parser, and the place and text of the fault that it finds.
type Parse<T> = fn(&str) -> Result<T, (Place, String)>;

fn parse_json<T: DeserializeOwned>(text: &str) -> Result<T, (Place, String)> {
    let mut json = serde_json::Deserializer::from_str(text);
    let parsed = serde_path_to_error::deserialize(&mut json);
    let parsed = parsed.map_err(|error| (error.path().to_string(), error.into_inner()));
    let whole = parsed
        .and_then(|parsed| json.end().map(|()| parsed).map_err(|error| (".".to_owned(), error)));
    whole.map_err(|(key, error)| {
        let position = Some((error.line(), error.column()));
        // The text ends with the position.
        let what = error.to_string();
        let end = what.rfind(" at line ").unwrap_or(what.len());
        (Place { position, key }, what[..end].to_owned())
    })
}

fn parse_toml<T: DeserializeOwned>(text: &str) -> Result<T, (Place, String)> {
    let failed = |key: String, error: toml::de::Error| {
        let position = error.span().and_then(|span| text.get(..span.start)).map(|before| {
            let line = before.rsplit('\n').next().unwrap_or("");
            (before.matches('\n').count() + 1, line.chars().count() + 1)
        });
        (Place { position, key }, error.message().to_owned())
    };
    let toml = toml::Deserializer::parse(text).map_err(|error| failed(".".into(), error))?;
    serde_path_to_error::deserialize(toml)
        .map_err(|error| failed(error.path().to_string(), error.into_inner()))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::io::Write;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    use crate::config::device_kind::DeviceKind;
    use crate::config::vm::{RestoreConfig, VmConfig};

    fn of<T: DeserializeOwned>(name: &str, text: &str) -> Result<T, ConfigFileError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        GivenParts::default().over(Some(&path))
    }

    #[test]
    fn json_and_toml_say_the_same() {
        let json = r#"{
            "source": "s",
            "memory": {"size": "256M", "backing": "hugetlb-2m", "reserve": false},
            "cpus": 2, "engine": "uffd", "fill": {"rate": "64M"}, "clock": "host",
            "devices": [{"type": "net", "socket": "a,b", "mac": "02:00:00:00:00:01"}],
            "serial": {"file": "c"}
        }"#;
        let toml = r#"
            source = "s"
            cpus = 2
            engine = "uffd"
            serial.file = "c"
            fill.rate = 67108864
            clock = "host"
            memory = { size = 268435456, backing = "hugetlb-2m", reserve = false }
            [[devices]]
            type = "net"
            socket = "a,b"
            mac = "02:00:00:00:00:01"
        "#;
        let config: RestoreConfig = of("vm.json", json).unwrap();
        assert_eq!(config.devices[0].mac, Some([2, 0, 0, 0, 0, 1]));
        assert_eq!(config, of("vm.toml", toml).unwrap());
    }

    #[test]
    fn example_gives_every_part() {
        let docs = |name| Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
        let parts = read::<VmConfig>(&docs("vm.toml")).unwrap();
        let config: VmConfig = GivenParts { parts: parts.clone(), unfit: None }.over(None).unwrap();
        let Value::Object(all) = serde_json::to_value(&config).unwrap() else { panic!("no map") };
        assert!(all.keys().all(|key| parts.contains_key(key)), "{all:?}, and not {parts:?}");
        let kinds = [DeviceKind::Blk, DeviceKind::Net, DeviceKind::Vsock];
        assert_eq!(config.devices.iter().map(|device| device.kind).collect::<Vec<_>>(), kinds);
        let parts = read::<RestoreConfig>(&docs("restore.toml")).unwrap();
        let config: RestoreConfig =
            GivenParts { parts: parts.clone(), unfit: None }.over(None).unwrap();
        let Value::Object(all) = serde_json::to_value(&config).unwrap() else { panic!("no map") };
        assert!(all.keys().all(|key| parts.contains_key(key)), "{all:?}, and not {parts:?}");
        assert!(config.cpus.is_some() && config.source_limit_s.is_some());
    }

    #[test]
    fn pipe_is_read_to_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        let pipe = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, pipe, 0).unwrap();
        let short = Duration::from_millis(200);
        for outcome in [read_text(&path, short), {
            // A writer that writes nothing more, and does not end.
            let _silent = File::options().read(true).write(true).open(&path).unwrap();
            read_text(&path, short)
        }] {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("its end did not arrive within 0 s; check"), "{error}");
        }
        let to = path.clone();
        let writer = std::thread::spawn(move || {
            let mut pipe = File::options().write(true).open(to).unwrap();
            for part in ["{\"source\": ", "\"s\"}"] {
                std::thread::sleep(Duration::from_millis(50));
                pipe.write_all(part.as_bytes()).unwrap();
            }
        });
        let config: RestoreConfig = GivenParts::default().over(Some(&path)).unwrap();
        assert_eq!(config.source.directory(), Some(Path::new("s")));
        writer.join().unwrap();
        let endless = read_text(Path::new("/dev/zero"), PATIENCE).unwrap_err().to_string();
        assert!(endless.contains("larger than 1048576 bytes"), "{endless}");
    }

    #[test]
    fn error_names_parts_as_given() {
        let error = || Error::usage("--cpus: 0 vCPUs; see --vhost-user");
        let mut parts = GivenParts::default();
        parts.put("cpus", Some(0));
        let file = Path::new("vm.json");
        let line = |file| parts.named_as_given(error(), file).to_string();
        assert_eq!(line(None), "--cpus: 0 vCPUs; see --vhost-user");
        assert_eq!(line(Some(file)), "--cpus: 0 vCPUs; see devices");
        let of_file = GivenParts::default().named_as_given(error(), Some(file));
        assert_eq!(of_file.to_string(), "cpus: 0 vCPUs; see devices");
        assert_eq!(of_file.kind(), Kind::Usage);
    }

    #[test]
    fn path_that_is_no_text_is_refused() {
        let mut parts = GivenParts::default();
        parts.put("kernel", Some(Path::new(OsStr::from_bytes(b"k\xff"))));
        let error = parts.over::<VmConfig>(None).unwrap_err().to_string();
        assert!(error.starts_with("cannot use --kernel: its path is not UTF-8"), "{error}");
    }

    #[test]
    fn fault_is_named_with_its_place() {
        let unknown = r#"{"devices": [{"type": "blk", "socket": "s", "queus": 1}]}"#;
        let wrong = r#"{"devices": [{"type": "blk", "socket": "s", "queues": 0}]}"#;
        for (name, text, words) in [
            ("a.json", "{\n \"cpu\": 2}", &["line 2, column 6: cpu: unknown field `cpu`"][..]),
            ("a.json", unknown, &["devices[0].queus: unknown field"]),
            ("a.json", wrong, &["devices[0]: a device needs at least one queue"]),
            ("a.json", "{\"devices\": [{\"type\": \"blk\"}]}", &["devices[0]: missing", "socket"]),
            ("a.json", "{\"memory\": {\"size\": \"1Q\"}}", &["memory.size: '1Q' is not a size"]),
            ("a.json", "{\"fill\": {\"rate\": 0}}", &["fill", "use off"]),
            ("a.json", "{} x", &["line 1, column 4: trailing characters"]),
            ("a.json", "{}", &["no source is given; give --source, or source in"]),
            ("a.json", "{\"source\": \"s\"} x", &["line 1, column 17: trailing characters"]),
            ("a.json", "", &["a.json: line 1: EOF"]),
            (
                "a.json",
                "{\"cpus\":\n",
                &["a.json: line 2: cpus: EOF while parsing a value; correct"],
            ),
            ("a.json", "{\"memory\": {\n\"size", &["line 2, column 5: memory: EOF"]),
            ("a.json", "3", &["line 1, column 1: invalid type"]),
            ("a.toml", "cpus = 2\ncpu = 3\n", &["line 2, column 1: cpu: unknown field `cpu`"]),
            ("a.toml", "cpus = \n", &["line 1, column "]),
            ("a.toml", "\nengine = \"magic\"\n", &["line 2, column 10: engine: "]),
            ("a.toml", "memory.size = -1", &["line 1, column 15: memory.size: invalid value"]),
        ] {
            let error = of::<RestoreConfig>(name, text).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{text}: {error}");
        }
    }
}
