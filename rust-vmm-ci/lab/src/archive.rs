// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds and downloads the newest version of a Debian package. The machine's configuration is not
//! changed: if its package sources lack a package, the lab uses its own package lists.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::cache;

/// Debian's archive keyring, for sources that name no keyring.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The suite of Debian that has the newest kernels, which are for a later release than this one.
const NEWEST: &str = "trixie-backports";

/// A set of package lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sources {
    /// The machine's lists.
    System,
    /// The lab's own lists of suites of this system's release.
    Neighbours,
    /// The lab's own list of the suite with the newest kernels.
    Backports,
}

impl Sources {
    /// Returns the cache's folder for lists of the lab's own, or `None` for the machine's.
    fn state(self) -> Result<Option<PathBuf>> {
        Ok(match self {
            Self::System => None,
            Self::Neighbours => Some(cache::folder("apt")?),
            Self::Backports => Some(cache::folder("apt-backports")?),
        })
    }
}

/// Returns the cache's folder for package files. Files that the user puts there are used, too.
pub(crate) fn folder() -> Result<PathBuf> {
    cache::folder("packages")
}

/// A package, without a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    /// The package's name.
    pub name: String,
    /// Approximate download size, for messages.
    pub size: &'static str,
}

impl Package {
    /// Returns the newest version in these lists, without network access.
    pub(crate) fn newest(&self, sources: Sources) -> Result<Option<String>> {
        Ok(candidate(&ask(sources, "policy", &self.name)?))
    }

    /// Returns the versions whose files are in the cache.
    pub(crate) fn cached(&self) -> Result<Vec<String>> {
        let mut versions = Vec::new();
        for entry in fs::read_dir(folder()?)? {
            if let Some(version) = self.version_of(&entry?.file_name().to_string_lossy()) {
                versions.push(version);
            }
        }
        Ok(versions)
    }

    /// Returns the path of a version's file in the cache.
    pub(crate) fn file(&self, version: &str) -> Result<PathBuf> {
        let folder = folder()?;
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let name = entry.file_name();
            if self.version_of(&name.to_string_lossy()).as_deref() == Some(version) {
                return Ok(entry.path());
            }
        }
        bail!("{} {version} is not in {}", self.name, folder.display())
    }

    /// Downloads a version to the cache, unless it is there.
    fn download(&self, sources: Sources, version: &str) -> Result<()> {
        if self.file(version).is_ok() {
            return Ok(());
        }
        eprintln!("lab: fetching {} {version} (about {}, once)", self.name, self.size);
        // apt verifies the download before it renames the file to its final name.
        let mut apt = Command::new("apt-get");
        apt.args(options(sources)?)
            .args(["--quiet=2", "download", &format!("{}={version}", self.name)])
            .current_dir(folder()?);
        run(&mut apt)?;
        self.file(version)?;
        // One version is enough to work without the network.
        for old in self.cached()?.iter().filter(|old| *old != version) {
            fs::remove_file(self.file(old)?)?;
        }
        Ok(())
    }

    /// Returns the version in the name of a package file, or `None` if it is another package's.
    fn version_of(&self, name: &str) -> Option<String> {
        let rest = name.strip_prefix(&self.name)?.strip_prefix('_')?;
        let version = rest.strip_suffix(".deb")?.rsplit_once('_')?.0;
        // apt encodes the colon of an epoch.
        Some(version.replace("%3a", ":"))
    }
}

/// Downloads a package to the cache; `find` chooses it from the lists, which are asked in this
/// order. The machine's own come first: they may be old or lack the package, so the lab's own,
/// which are refreshed here, come next.
pub(crate) fn fetch<T>(
    name: &str,
    lists: [Sources; 2],
    find: impl Fn(Sources) -> Result<Option<(Package, T)>>,
) -> Result<(Package, T)>
where
    T: AsRef<str>,
{
    let mut problem = None;
    for sources in lists {
        let refreshed = refresh(sources);
        let Some((package, version)) = find(sources)? else {
            problem = refreshed.err().or(problem);
            continue;
        };
        match package.download(sources, version.as_ref()) {
            Ok(()) => return Ok((package, version)),
            Err(error) => problem = Some(error),
        }
    }
    match problem {
        Some(error) => Err(error),
        None => bail!(
            "{name} is in none of apt's sources: the lab needs a Debian archive, or the package's file in {}",
            folder()?.display()
        ),
    }
}

/// Returns the package that the newest version of a metapackage depends on.
pub(crate) fn meant_by(name: &str, sources: Sources) -> Result<Option<String>> {
    Ok(dependency(&ask(sources, "depends", name)?, name))
}

/// Returns the names of the packages in these lists that start so.
pub(crate) fn names(start: &str, sources: Sources) -> Result<Vec<String>> {
    Ok(ask(sources, "pkgnames", start)?.lines().map(str::to_owned).collect())
}

/// Runs an apt-cache query about a package.
fn ask(sources: Sources, what: &str, name: &str) -> Result<String> {
    let mut apt = Command::new("apt-cache");
    apt.args(options(sources)?).args([what, name]);
    // Without apt there are no lists, but the cache may still contain a usable version.
    Ok(match apt.env("LC_ALL", "C").output() {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(_) => String::new(),
    })
}

/// Downloads the lab's own lists, at the addresses of the machine's sources. An error is not
/// necessarily fatal: apt reports one for each suite that an address lacks, and continues with the
/// next. The machine's own lists are left as they are.
fn refresh(sources: Sources) -> Result<()> {
    let Some(state) = sources.state()? else { return Ok(()) };
    let lines = source_lines(sources, &targets()?, &codename()?);
    ensure!(!lines.is_empty(), "none of apt's sources is an archive of this system's release");
    for folder in ["lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(state.join(folder))?;
    }
    fs::write(state.join("sources.list"), lines)?;
    let mut apt = Command::new("apt-get");
    // Otherwise apt reports success even if it reached no server.
    let strict = ["-o", "APT::Update::Error-Mode=any"];
    apt.args(options(sources)?).args(strict).args(["--quiet=2", "update"]);
    run(&mut apt)?;
    Ok(())
}

/// Returns the options that make apt use these lists and download as the current user.
fn options(sources: Sources) -> Result<Vec<String>> {
    let mut options = vec!["APT::Sandbox::User=root".to_owned()];
    if let Some(state) = sources.state()? {
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

/// Returns the URIs that an update of the machine's own lists would download; the lists themselves
/// need not exist yet.
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

/// Returns the lines of a source list: for each address of the release, the suites that contain
/// newer kernels.
fn source_lines(sources: Sources, targets: &str, codename: &str) -> String {
    let mut addresses: Vec<String> = Vec::new();
    for line in targets.lines() {
        // The format is 'address/dists/suite/InRelease', followed by more fields.
        let Some((address, rest)) = line.trim_start_matches('\'').split_once("/dists/") else {
            continue;
        };
        if rest.split(['-', '/']).next() == Some(codename) {
            // By convention the security archive is next to the main one.
            if address.ends_with("/debian") {
                addresses.push(format!("{address}-security"));
            }
            addresses.push(address.to_owned());
        }
    }
    addresses.sort();
    addresses.dedup();
    let signed =
        if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
    let mut lines = String::new();
    for address in addresses {
        let suite = match (sources, address.ends_with("-security")) {
            (Sources::Backports, true) => continue,
            (Sources::Backports, false) => NEWEST.to_owned(),
            (_, true) => format!("{codename}-security"),
            (_, false) => format!("{codename}-backports"),
        };
        lines += &format!("deb {signed}{address} {suite} main\n");
    }
    lines
}

/// Returns the candidate version in the output of `apt-cache policy`.
fn candidate(policy: &str) -> Option<String> {
    policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))
        .filter(|version| *version != "(none)")
        .map(str::to_owned)
}

/// Returns the first dependency in the output of `apt-cache depends`.
fn dependency(depends: &str, name: &str) -> Option<String> {
    depends
        .lines()
        .skip_while(|line| *line != name)
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::to_owned)
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
        let package = Package { name: "linux-source-6.12".into(), size: "" };
        let name = "linux-source-6.12_6.12.117-1~deb12u1_all.deb";
        assert_eq!(package.version_of(name).as_deref(), Some("6.12.117-1~deb12u1"));
        assert_eq!(package.version_of("linux-source-6.1_6.1.1-1_all.deb"), None);
        assert_eq!(package.version_of("partial"), None);
    }

    #[test]
    fn dependency_of_a_metapackage_is_found() {
        let depends = "linux-image-x\n  Depends: linux-image-6.1.0-48-x\n";
        let found = dependency(depends, "linux-image-x");
        assert_eq!(found.as_deref(), Some("linux-image-6.1.0-48-x"));
        assert_eq!(dependency("", "linux-image-x"), None);
    }

    #[test]
    fn neighbours_of_the_machines_sources_are_asked() {
        let targets = "'http://mirror.example/debian/dists/bookworm/InRelease' a 0\n\
                       'http://mirror.example/debian/dists/bookworm-updates/InRelease' b 0\n\
                       'http://other.example/tool/dists/nodistro/InRelease' c 0\n";
        let lines = source_lines(Sources::Backports, targets, "bookworm");
        assert_eq!(lines.lines().count(), 1, "{lines}");
        assert!(lines.contains("http://mirror.example/debian trixie-backports main"));
        let lines = source_lines(Sources::Neighbours, targets, "bookworm");
        assert_eq!(lines.lines().count(), 2, "{lines}");
        assert!(lines.contains("http://mirror.example/debian bookworm-backports main"));
        assert!(lines.contains("http://mirror.example/debian-security bookworm-security main"));
    }
}
