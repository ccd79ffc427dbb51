// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands in a document, and their documented output.
//!
//! A block of commands after a line `<!-- runs: lab -->` is run. If a block of text follows it,
//! each line of that must be among the lines that the commands print, in the same order; `...`
//! stands for any text.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::process::run;

/// The line before a block to run.
const MARK: &str = "<!-- runs: lab -->";
/// The line that the session prints before each block; no other output contains it.
const BEFORE: &str = "@@@ block ";
/// Time limit for all commands of a document.
const LIMIT: Duration = Duration::from_secs(600);

/// A block of commands.
#[derive(Debug, PartialEq, Eq)]
pub struct Block {
    /// The line of the document on which it begins, from 1.
    pub line: usize,
    /// The commands.
    pub commands: String,
    /// The lines that they must print, among others.
    pub prints: Vec<String>,
}

/// Returns the blocks of a document to run.
///
/// # Errors
///
/// If no commands follow a mark, or a block has no end.
pub fn blocks(document: &str) -> Result<Vec<Block>> {
    let mut lines = document.lines().enumerate().map(|(at, line)| (at + 1, line)).peekable();
    let mut blocks: Vec<Block> = Vec::new();
    while let Some((line, text)) = lines.next() {
        if text != MARK {
            continue;
        }
        ensure!(
            lines.next().is_some_and(|(_, text)| text == "```sh"),
            "line {line}: no commands follow the mark"
        );
        let mut body = || {
            let mut body = Vec::new();
            for (_, text) in lines.by_ref() {
                if text == "```" {
                    return Ok(body);
                }
                body.push(text);
            }
            bail!("line {line}: the block has no end")
        };
        let commands = body()?.join("\n");
        let mut prints = Vec::new();
        while lines.next_if(|(_, text)| text.is_empty()).is_some() {}
        if lines.next_if(|(_, text)| *text == "```text").is_some() {
            for (_, text) in lines.by_ref().take_while(|(_, text)| *text != "```") {
                prints.push(text.to_owned());
            }
        }
        blocks.push(Block { line, commands, prints });
    }
    Ok(blocks)
}

/// Runs all blocks as one session of bash in `folder`, which ends at the first command that fails,
/// with the workspace's programs in `PATH` and further variables. Processes that still run at the
/// end are killed. Returns the output.
///
/// # Errors
///
/// If a command fails, or does not print the documented output; with all the output.
pub fn run_all(
    blocks: &[Block],
    folder: &Path,
    programs: &Path,
    variables: &[(&str, &Path)],
) -> Result<String> {
    let mut script = String::from(
        "set -euo pipefail\nexec 2>&1\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n",
    );
    for block in blocks {
        script += &format!("echo '{BEFORE}{}'\n{}\n", block.line, block.commands);
    }
    let mut command = Command::new("bash");
    let path = std::env::var("PATH").unwrap_or_default();
    command.arg("-c").arg(script).current_dir(folder);
    command.env("PATH", format!("{}:{path}", programs.display()));
    command.envs(variables.iter().copied());
    let output = run(&mut command, LIMIT).context("run the document's commands")?;
    let printed = output.stdout;
    ensure!(
        output.status.success(),
        "the commands ended with {}, after these lines:\n{printed}",
        output.status
    );
    let parts: Vec<_> = printed.split(BEFORE).skip(1).collect();
    for (block, part) in blocks.iter().zip(parts) {
        if let Err(error) = check(block, part) {
            bail!("{error}; all that was printed:\n{printed}");
        }
    }
    Ok(printed)
}

fn check(block: &Block, printed: &str) -> Result<()> {
    let mut lines = printed.lines();
    for wanted in &block.prints {
        ensure!(
            lines.any(|line| fits(wanted, line)),
            "the commands on line {} did not print, or not there: {wanted}",
            block.line
        );
    }
    Ok(())
}

/// Returns whether a line matches the documented one.
fn fits(wanted: &str, line: &str) -> bool {
    let parts: Vec<_> = wanted.trim_end().split("...").collect();
    let line = line.trim_end();
    let [first, middle @ .., last] = &parts[..] else { return line == wanted.trim_end() };
    let Some(mut rest) = line.strip_prefix(first) else { return false };
    for part in middle {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "# A\n\n```sh\nnot this\n```\n\n<!-- runs: lab -->\n```sh\necho a 1 b\n\
                            echo c\n```\n\n```text\na ... b\nc\n```\n\n<!-- runs: lab -->\n```sh\n\
                            test -n \"$X\"\n```\n";

    fn run_here(blocks: &[Block]) -> Result<String> {
        run_all(blocks, Path::new("/"), Path::new("/bin"), &[("X", Path::new("/"))])
    }

    #[test]
    fn marked_commands_run_and_their_output_is_compared() {
        let mut blocks = blocks(DOCUMENT).unwrap();
        assert_eq!(blocks.iter().map(|block| block.line).collect::<Vec<_>>(), [7, 18]);
        assert_eq!(blocks[0].prints, ["a ... b", "c"]);
        run_here(&blocks).unwrap();
        blocks[0].prints.swap(0, 1);
        let error = run_here(&blocks).unwrap_err();
        assert!(format!("{error:#}").contains("line 7 did not print, or not there: a ... b"));
        blocks[0].commands = "false\necho c".into();
        assert!(run_here(&blocks).is_err());
    }

    #[test]
    fn dots_stand_for_anything() {
        for (wanted, line, does) in [
            ("a", "a ", true),
            ("a", "ab", false),
            ("a...", "ab", true),
            ("...b", "ab", true),
            ("a...b", "a b c", false),
            ("a...b", "a b c b", true),
            ("a...c...", "abcd", true),
            ("b...", "ab", false),
        ] {
            assert_eq!(fits(wanted, line), does, "{wanted}: {line}");
        }
    }

    #[test]
    fn a_mark_without_commands_is_wrong() {
        assert!(blocks("<!-- runs: lab -->\n\n```sh\n```\n").is_err());
        assert!(blocks("<!-- runs: lab -->\n```sh\nx\n").is_err());
    }
}
