// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Builds the kernel from Debian's source package, the patches and the config fragment. The source
//! tree is kept, so that a changed patch costs seconds, not minutes.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::archive::Package;
use crate::cache;
use crate::inputs::{ELF, IMAGE, Inputs};

/// Large parts of the source that this configuration never uses.
const UNUSED: [&str; 4] =
    ["arch/arm*/boot", "drivers/gpu/drm/amd/include", "Documentation/devicetree", "tools/testing"];
/// Approximate number of files compiled in a build from scratch, for the progress line.
const OBJECTS: usize = 1250;

/// The build's results, inside the source tree.
pub(crate) struct Built {
    /// The image that QEMU boots.
    pub image: PathBuf,
    /// The same kernel as an ELF file, without symbols.
    pub elf: PathBuf,
}

/// Builds the kernel.
pub(crate) fn build(package: &Package, version: &str, inputs: &Inputs) -> Result<Built> {
    let tree = Tree::prepare(package, version, inputs)?;
    tree.apply(&inputs.patches)?;
    tree.configure(&inputs.fragments)?;
    tree.make(version)?;
    let image = tree.folder.join("arch/x86/boot").join(IMAGE);
    let elf = image.with_file_name(ELF);
    run(Command::new("strip").arg(tree.folder.join(ELF)).arg("-o").arg(&elf))?;
    Ok(Built { image, elf })
}

/// An unpacked source tree.
struct Tree {
    folder: PathBuf,
    log: PathBuf,
}

impl Tree {
    /// Unpacks the source unless that has been done, and removes those of other versions of the same
    /// series.
    fn prepare(package: &Package, version: &str, inputs: &Inputs) -> Result<Self> {
        let builds = cache::folder("build")?;
        let source = &package.name;
        let home = builds.join(version);
        let tree = Self { folder: home.join(source), log: home.join("build.log") };
        if tree.applied().is_dir() {
            return Ok(tree);
        }
        for entry in fs::read_dir(&builds)? {
            let entry = entry?;
            if inputs.base.has_version(&entry.file_name().to_string_lossy()) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        fs::create_dir_all(&home)?;
        eprintln!("lab: unpacking {source} {version}");
        let archive = home.join("package");
        let file = package.file(version)?;
        run(Command::new("dpkg").arg("-x").arg(file).arg(&archive))?;
        let mut tar = Command::new("tar");
        tar.arg("--extract").arg("--directory").arg(&home);
        for part in UNUSED {
            tar.arg(format!("--exclude={source}/{part}"));
        }
        run(tar.arg("--file").arg(archive.join(format!("usr/src/{source}.tar.xz"))))?;
        fs::remove_dir_all(&archive)?;
        // This folder marks the tree as complete.
        fs::create_dir(tree.applied())?;
        Ok(tree)
    }

    /// Returns the folder with copies of the applied patches.
    fn applied(&self) -> PathBuf {
        self.folder.join(".lab-patches")
    }

    /// Replaces the applied patches by the wanted ones, so that make sees only the files that
    /// differ as changed.
    fn apply(&self, wanted: &[PathBuf]) -> Result<()> {
        let mut applied = fs::read_dir(self.applied())?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<Vec<_>>>()?;
        applied.sort();
        let contents = |paths: &[PathBuf]| -> Result<Vec<Vec<u8>>> {
            paths.iter().map(|path| Ok(fs::read(path)?)).collect()
        };
        if contents(&applied)? == contents(wanted)? {
            return Ok(());
        }
        for path in applied.iter().rev() {
            self.patch(path, &["--reverse"])?;
            fs::remove_file(path)?;
        }
        for (number, path) in wanted.iter().enumerate() {
            // A dry run first, so that a failing patch leaves the tree unchanged.
            self.patch(path, &["--dry-run"])?;
            self.patch(path, &[])?;
            // Patches of two series may have the same name, and the order is that of application.
            fs::copy(path, self.applied().join(format!("{number:04}.patch")))?;
        }
        Ok(())
    }

    fn patch(&self, patch: &Path, arguments: &[&str]) -> Result<()> {
        let output = Command::new("patch")
            .args(["--strip=1", "--fuzz=0", "--forward", "--batch", "--no-backup-if-mismatch"])
            .args(["--reject-file=-"])
            .args(arguments)
            .stdin(File::open(patch)?)
            .current_dir(&self.folder)
            .env("LC_ALL", "C")
            .output()
            .context("patch could not be run (rust-vmm-ci/setup installs it)")?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stdout);
        bail!(
            "{} does not apply to {}: {}: adapt the patch to this source",
            patch.display(),
            self.folder.display(),
            failures(&text)
        )
    }

    fn configure(&self, fragments: &[PathBuf]) -> Result<()> {
        self.quietly(self.command("make").arg("tinyconfig"))?;
        self.quietly(
            self.command("scripts/kconfig/merge_config.sh")
                .args(["-m", "-Q", ".config"])
                .args(fragments),
        )?;
        self.quietly(self.command("make").arg("olddefconfig"))?;
        let config = fs::read_to_string(self.folder.join(".config"))?;
        for fragment in fragments {
            let wanted = fs::read_to_string(fragment)?;
            let missing = missing(&wanted, &config);
            ensure!(
                missing.is_empty(),
                "the kernel's configuration did not take from {}: {}",
                fragment.display(),
                missing.join(", ")
            );
        }
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(&self.folder)
            .env("KBUILD_BUILD_USER", "lab")
            .env("KBUILD_BUILD_HOST", "lab")
            .env_remove("MAKEFLAGS")
            .stdin(Stdio::null());
        command
    }

    /// Runs a step whose output matters only if it fails.
    fn quietly(&self, command: &mut Command) -> Result<()> {
        let output = command.output()?;
        if !output.status.success() {
            fs::write(&self.log, [output.stdout, output.stderr].concat())?;
            bail!("the kernel could not be configured: {}", self.end_of_log()?);
        }
        Ok(())
    }

    fn make(&self, version: &str) -> Result<()> {
        let jobs = thread::available_parallelism()?;
        let mut make = self
            .command("make")
            .arg(format!("--jobs={jobs}"))
            .arg(IMAGE)
            .stdout(Stdio::piped())
            .stderr(File::create(&self.log)?)
            .spawn()
            .context("make could not be run (rust-vmm-ci/setup installs it)")?;
        let output = make.stdout.take().context("make has an output")?;
        let progress = Progress::start(format!("building the kernel, {version}"));
        for line in BufReader::new(output).lines() {
            if ["  CC ", "  AS "]
                .iter()
                .any(|step| line.as_ref().is_ok_and(|line| line.starts_with(step)))
            {
                progress.step();
            }
        }
        let status = make.wait()?;
        progress.end();
        ensure!(status.success(), "the kernel could not be built: {}", self.end_of_log()?);
        Ok(())
    }

    fn end_of_log(&self) -> Result<String> {
        let text = String::from_utf8_lossy(&fs::read(&self.log)?).into_owned();
        let lines: Vec<_> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(15)..].join("\n  ");
        Ok(format!("the end of {}:\n  {tail}", self.log.display()))
    }
}

pub(crate) fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let status = command
        .status()
        .with_context(|| format!("{program} could not be run (rust-vmm-ci/setup installs it)"))?;
    ensure!(status.success(), "{program} failed: {status}");
    Ok(())
}

/// Returns the hunks that patch(1) could not apply, by file.
fn failures(output: &str) -> String {
    let mut file = "";
    let mut failures = Vec::new();
    for line in output.lines() {
        for start in ["patching file ", "checking file "] {
            file = line.strip_prefix(start).unwrap_or(file);
        }
        if line.starts_with("Hunk #")
            && let Some((hunk, rest)) = line.split_once(" FAILED")
        {
            failures.push(format!("{hunk}{rest} of {file} fails"));
        }
    }
    if failures.is_empty() {
        return output.lines().last().unwrap_or("patch says nothing").into();
    }
    failures.join(", ").replace("Hunk ", "hunk ").replace(". of", " of")
}

/// Returns the lines of the fragment that are not in the configuration.
fn missing<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let has = |wanted: &str| config.lines().any(|line| line == wanted);
    fragment
        .lines()
        .filter(|line| match line.strip_suffix(" is not set") {
            Some(off) => {
                let name = off.trim_start_matches("# ");
                config.lines().any(|line| line.starts_with(&format!("{name}=")))
            }
            None => line.starts_with("CONFIG_") && !has(line),
        })
        .collect()
}

/// Prints the build's progress: one line that is updated on a terminal, otherwise a new line every
/// 20 seconds.
struct Progress {
    steps: Arc<AtomicUsize>,
    stop: mpsc::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Progress {
    fn start(what: String) -> Self {
        let steps = Arc::new(AtomicUsize::new(0));
        let (stop, stopped) = mpsc::channel();
        let counted = Arc::clone(&steps);
        let thread = thread::spawn(move || {
            let terminal = std::io::stderr().is_terminal();
            let (pause, before, after) = if terminal {
                (Duration::from_millis(500), "\r", "\x1b[K")
            } else {
                (Duration::from_secs(20), "", "\n")
            };
            let start = Instant::now();
            loop {
                let over = stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout);
                let seconds = start.elapsed().as_secs();
                let objects = counted.load(Ordering::Relaxed);
                eprint!(
                    "{before}lab: {what}: {}:{:02}, {objects} files compiled (about {OBJECTS} from scratch){after}",
                    seconds / 60,
                    seconds % 60
                );
                let _ = std::io::stderr().flush();
                if over {
                    if terminal {
                        eprintln!();
                    }
                    return;
                }
            }
        });
        Self { steps, stop, thread }
    }

    fn step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    fn end(self) {
        drop(self.stop);
        // The thread only prints, so a panic of it does not matter.
        let _ = self.thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_hunks_are_named() {
        let output = "checking file a/b.c\nHunk #1 succeeded at 5.\nHunk #2 FAILED at 120.\n\
                      1 out of 2 hunks FAILED\nchecking file c.h\nHunk #1 FAILED at 7.\n";
        assert_eq!(failures(output), "hunk #2 at 120 of a/b.c fails, hunk #1 at 7 of c.h fails");
    }

    #[test]
    fn the_fragment_is_checked_both_ways() {
        let fragment =
            "# comment\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n# CONFIG_D is not set\n";
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\n";
        assert_eq!(missing(fragment, config), ["CONFIG_B=y", "# CONFIG_C is not set"]);
    }
}
