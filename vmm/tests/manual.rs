// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The version, the shell completions and the man pages of the program.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use test_support::host::skip;

fn demand_vmm(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_demand-vmm")).args(arguments).output().unwrap()
}

fn prints(arguments: &[&str]) -> String {
    let output = demand_vmm(arguments);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the names of the long options in a help text.
fn long_options(help: &str) -> Vec<&str> {
    let words = help.split_whitespace().filter(|word| word.starts_with("--"));
    let ends = |c: char| !c.is_ascii_alphanumeric() && c != '-';
    words.map(|word| word.split(ends).next().unwrap()).filter(|word| word.len() > 2).collect()
}

#[test]
fn version_names_commit_and_engines() {
    let short = prints(&["-V"]);
    let commit = short
        .strip_prefix(concat!("demand-vmm ", env!("CARGO_PKG_VERSION"), " (commit "))
        .and_then(|rest| rest.strip_suffix(")\n"))
        .unwrap_or_else(|| panic!("{short}"));
    let hash = commit.strip_suffix("-dirty").unwrap_or(commit);
    let known = hash.len() >= 12 && hash.bytes().all(|c| c.is_ascii_hexdigit());
    assert!(known || commit == "unknown", "{short}");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let git = Command::new("git").args(["rev-parse", "HEAD"]).current_dir(folder).output();
    if let Ok(head) = git.map(|output| String::from_utf8(output.stdout).unwrap())
        && !head.is_empty()
    {
        assert!(known && head.starts_with(hash), "{short}, and HEAD is {head}");
    }
    let long = prints(&["--version"]);
    let engines = long.strip_prefix(short.trim_end()).unwrap();
    assert_eq!(engines, "\nengines: kvm-userfault, uffd, uffd-poison, kvm-attributes\n");
}

#[test]
fn bash_completes_commands_and_options() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("demand-vmm.bash");
    fs::write(&script, prints(&["completions", "bash"])).unwrap();
    let complete = |words: &[&str]| {
        let last = words.len() - 1;
        let line = format!(
            "source '{}'; COMP_WORDS=({}); COMP_CWORD={last}; \
             _demand-vmm demand-vmm '{}' '{}'; echo \"${{COMPREPLY[@]}}\"",
            script.display(),
            words.join(" "),
            words[last],
            words[last - 1]
        );
        let output = Command::new("bash").args(["-c", &line]).output().unwrap();
        assert!(output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(complete(&["demand-vmm", "res"]), "restore resume");
    assert_eq!(complete(&["demand-vmm", "run", "--kern"]), "--kernel");
    assert_eq!(complete(&["demand-vmm", "run", "--log-level", "de"]), "debug");
    assert!(prints(&["completions", "zsh"]).starts_with("#compdef demand-vmm\n"));
    assert!(prints(&["completions", "fish"]).contains("complete -c demand-vmm "));
}

/// groff renders each page without a warning, and every option of the help is in it.
#[test]
fn man_pages_render_with_every_option() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man1");
    let said = prints(&["man", pages.to_str().unwrap()]);
    assert_eq!(said, format!("man pages are in {}\n", pages.display()));
    if Command::new("groff").arg("--version").output().is_err() {
        return skip("there is no groff");
    }
    let paths: Vec<_> = fs::read_dir(pages).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(paths.len() > 9, "{paths:?}");
    for path in paths {
        let mut groff = Command::new("groff");
        let rendered =
            groff.args(["-man", "-ww", "-Wbreak", "-Tascii"]).arg(&path).output().unwrap();
        let path = path.display();
        assert!(rendered.status.success() && rendered.stderr.is_empty(), "{path}: {rendered:?}");
        let text = plain(&String::from_utf8(rendered.stdout).unwrap());
        let path = path.to_string();
        let name = path.rsplit('/').next().and_then(|name| name.strip_suffix(".1")).unwrap();
        // No word of a command has a hyphen.
        let command = name.strip_prefix("demand-vmm-").map(|command| command.replace('-', " "));
        let words: Vec<_> = command.iter().flat_map(|command| command.split(' ')).collect();
        let help = prints(&[&words[..], &["--help"]].concat());
        for option in long_options(&help).into_iter().filter(|option| *option != "--help") {
            assert!(text.contains(option), "{option} is not in {path}: {text}");
        }
        if let Some(command) = command {
            assert!(text.contains(&format!("demand-vmm {command}")), "{text}");
        }
    }
}

/// Removes what makes letters bold and underlined, which is a letter over another one, and repeated
/// spaces.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    for c in text.chars() {
        match c {
            '\u{8}' => drop(plain.pop()),
            c => plain.push(c),
        }
    }
    plain.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn unwritable_folder_of_man_pages_is_named() {
    let output = demand_vmm(&["man", "/dev/null/man1"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot write man pages to /dev/null/man1"), "{said}");
}
