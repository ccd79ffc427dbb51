// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Debian's kernel source package: which version is newest, and having its file.
//! Nothing on the machine is reconfigured: what its own package sources lack is
//! looked for with lists that the lab keeps for itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::cache;

/// The package with the kernel's source.
pub const PACKAGE: &str = "linux-source-6.12";
/// Where Debian keeps the keys of its archive, should a source not say.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Whose package lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sources {
    /// The machine's.
    System,
    /// The lab's own.
    Private,
}

/// The folder of source packages; a file that is put there is used, too.
pub fn folder() -> Result<PathBuf> {
    cache::folder("packages")
}

/// The newest version that those lists know; asks no network.
pub fn newest(sources: Sources) -> Result<Option<String>> {
    let mut apt = Command::new("apt-cache");
    apt.args(options(sources)?).args(["policy", PACKAGE]);
    // Without apt there is no list, which need not be the end: see `cached`.
    let Ok(output) = apt.env("LC_ALL", "C").output() else {
        return Ok(None);
    };
    Ok(candidate(&String::from_utf8_lossy(&output.stdout)))
}

/// Versions whose package is in the cache.
pub fn cached() -> Result<Vec<String>> {
    let mut versions = Vec::new();
    for entry in fs::read_dir(folder()?)? {
        if let Some(version) = version_of(&entry?.file_name().to_string_lossy()) {
            versions.push(version);
        }
    }
    Ok(versions)
}

/// The file of a version that is in the cache.
pub fn package(version: &str) -> Result<PathBuf> {
    let folder = folder()?;
    for entry in fs::read_dir(&folder)? {
        let entry = entry?;
        if version_of(&entry.file_name().to_string_lossy()).as_deref() == Some(version) {
            return Ok(entry.path());
        }
    }
    bail!("{PACKAGE} {version} is not in {}", folder.display())
}

/// Has that version in the cache.
pub fn download(sources: Sources, version: &str) -> Result<()> {
    if package(version).is_ok() {
        return Ok(());
    }
    eprintln!("lab: fetching {PACKAGE} {version} (about 150 MB, once)");
    // apt checks what it fetched before the file gets its name.
    let mut apt = Command::new("apt-get");
    apt.args(options(sources)?)
        .args(["--quiet=2", "download", &format!("{PACKAGE}={version}")])
        .current_dir(folder()?);
    run(&mut apt)?;
    package(version)?;
    // One is enough to build without the network.
    for old in cached()?.iter().filter(|old| *old != version) {
        fs::remove_file(package(old)?)?;
    }
    Ok(())
}

/// Fetches the lab's own lists: of the suites beside those that the machine's
/// sources name, at the same addresses. An error need not be the end: apt has one
/// for every suite that an address does not have, and goes on to the next.
pub fn refresh() -> Result<()> {
    let sources = source_lines(&targets()?, &codename()?);
    ensure!(!sources.is_empty(), "none of apt's sources is an archive of this system's release");
    let state = cache::folder("apt")?;
    for folder in ["lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(state.join(folder))?;
    }
    fs::write(state.join("sources.list"), sources)?;
    let mut apt = Command::new("apt-get");
    // Otherwise apt says that all went well if it could reach nobody.
    let strict = ["-o", "APT::Update::Error-Mode=any"];
    apt.args(options(Sources::Private)?).args(strict).args(["--quiet=2", "update"]);
    run(&mut apt)?;
    Ok(())
}

/// Options by which apt uses those lists, and downloads as whoever runs it.
fn options(sources: Sources) -> Result<Vec<String>> {
    let mut options = vec!["APT::Sandbox::User=root".to_owned()];
    if sources == Sources::Private {
        let state = cache::folder("apt")?;
        let state = state.display();
        options.extend([
            format!("Dir::Etc::SourceList={state}/sources.list"),
            "Dir::Etc::SourceParts=-".to_owned(),
            format!("Dir::State::Lists={state}/lists"),
            format!("Dir::Cache={state}/cache"),
        ]);
    }
    Ok(options.into_iter().flat_map(|o| ["-o".to_owned(), o]).collect())
}

fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().display().to_string();
    let output = command
        .env("LC_ALL", "C")
        .output()
        .with_context(|| format!("{program} could not be run"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.lines().find(|line| line.starts_with("E:"));
        bail!("{program}: {}", line.unwrap_or("failed without a word"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What an update of the machine's own lists would fetch; there need be none yet.
fn targets() -> Result<String> {
    run(Command::new("apt-get").args(["update", "--print-uris"]))
}

fn codename() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("/etc/os-release is unreadable")?;
    release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release names no release")
}

/// Lines of a source list: for each address of the release's, the suites in which
/// newer kernels come.
fn source_lines(targets: &str, codename: &str) -> String {
    let mut addresses: Vec<String> = Vec::new();
    for line in targets.lines() {
        // 'address/dists/suite/InRelease' and more
        let Some((address, rest)) = line.trim_start_matches('\'').split_once("/dists/") else {
            continue;
        };
        if rest.split(['-', '/']).next() == Some(codename) {
            addresses.push(address.to_owned());
            // By convention the security archive is a neighbour of the main one.
            if address.ends_with("/debian") {
                addresses.push(format!("{address}-security"));
            }
        }
    }
    addresses.sort();
    addresses.dedup();
    let signed =
        if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
    let mut lines = String::new();
    for address in addresses {
        let suite = if address.ends_with("-security") { "security" } else { "backports" };
        lines += &format!("deb {signed}{address} {codename}-{suite} main\n");
    }
    lines
}

/// The candidate in the output of `apt-cache policy`.
fn candidate(policy: &str) -> Option<String> {
    policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))
        .filter(|version| *version != "(none)")
        .map(str::to_owned)
}

/// The version in the name of a package's file.
fn version_of(name: &str) -> Option<String> {
    let rest = name.strip_prefix(PACKAGE)?.strip_prefix('_')?;
    let version = rest.strip_suffix(".deb")?.rsplit_once('_')?.0;
    // apt writes the colon of an epoch so.
    Some(version.replace("%3a", ":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_candidate_is_found() {
        let policy = "linux-source-6.12:\n  Installed: (none)\n  Candidate: 6.12.117-1~deb12u1\n";
        assert_eq!(candidate(policy).as_deref(), Some("6.12.117-1~deb12u1"));
        assert_eq!(candidate("x:\n  Candidate: (none)\n"), None);
        assert_eq!(candidate(""), None);
    }

    #[test]
    fn files_name_their_version() {
        let name = "linux-source-6.12_6.12.117-1~deb12u1_all.deb";
        assert_eq!(version_of(name).as_deref(), Some("6.12.117-1~deb12u1"));
        assert_eq!(version_of("linux-source-6.1_6.1.1-1_all.deb"), None);
        assert_eq!(version_of("partial"), None);
    }

    #[test]
    fn neighbours_of_the_machines_sources_are_asked() {
        let targets = "'http://mirror.example/debian/dists/bookworm/InRelease' a 0\n\
                       'http://mirror.example/debian/dists/bookworm-updates/InRelease' b 0\n\
                       'http://other.example/tool/dists/nodistro/InRelease' c 0\n";
        let lines = source_lines(targets, "bookworm");
        assert_eq!(lines.lines().count(), 2, "{lines}");
        assert!(lines.contains("http://mirror.example/debian bookworm-backports main"));
        assert!(lines.contains("http://mirror.example/debian-security bookworm-security main"));
    }
}
