// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The names of a configuration's parts: an option of the command line, and a key in the file of
//! `--config` and in the API. Errors name the option, which
//! becomes the key for users of the file and clients.

/// Each option with its key.
const NAMES: [(&str, &str); 19] = [
    ("--memory", "memory"),
    ("--cpus", "cpus"),
    ("--kernel", "kernel"),
    ("--initramfs", "initramfs"),
    ("--cmdline", "cmdline"),
    ("--vhost-user", "devices"),
    ("--serial", "serial"),
    ("--on-panic", "on_panic"),
    ("--source", "source"),
    // The second and further ones.
    ("--source", "other_sources"),
    ("--cache", "cache"),
    ("--fetch-around", "fetch_around"),
    ("--engine", "engine"),
    ("--lazy", "lazy"),
    ("--source-limit", "source_limit_s"),
    ("--fill", "fill"),
    ("--working-set", "working_set"),
    ("--clock", "clock"),
    ("--verify", "verify"),
];

/// Returns an error's line with the keys of all options whose key `is_key` selects.
pub(crate) fn with_keys(line: &str, is_key: impl Fn(&str) -> bool) -> String {
    let mut text = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.find("--") {
        let (before, from) = rest.split_at(at);
        text.push_str(before);
        let end = from.find(|c: char| c != '-' && !c.is_ascii_lowercase()).unwrap_or(from.len());
        let (word, after) = from.split_at(end);
        // A part of a path is no option.
        let begins = before.is_empty() || before.ends_with([' ', '(']);
        let key = NAMES.iter().find(|(option, key)| begins && *option == word && is_key(key));
        text.push_str(key.map_or(word, |(_, key)| key));
        rest = after;
    }
    text.push_str(rest);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_become_keys() {
        let of_api = |line: &str| with_keys(line, |_| true);
        for (line, keys) in [
            ("--cpus: 0 vCPUs; 1 to 16", "cpus: 0 vCPUs; 1 to 16"),
            (
                "a (--vhost-user); or --on-panic, --engine uffd",
                "a (devices); or on_panic, engine uffd",
            ),
            ("give more with --memory", "give more with memory"),
            (
                "cannot open /a--cpus/--memory: --cpusx, --source-limit",
                "cannot open /a--cpus/--memory: --cpusx, source_limit_s",
            ),
            ("pass --api-socket -- --", "pass --api-socket -- --"),
        ] {
            assert_eq!(of_api(line), keys);
        }
        assert_eq!(with_keys("--cpus, --memory", |key| key == "memory"), "--cpus, memory");
    }

    #[test]
    fn every_key_has_its_option() {
        use crate::config::vm::{RestoreConfig, VmConfig};
        let boot: VmConfig = serde_json::from_str(
            r#"{"memory": {"size": "1G"}, "kernel": "/k", "initramfs": "/i"}"#,
        )
        .unwrap();
        let restore: RestoreConfig = serde_json::from_str(
            r#"{"source": "/s", "cpus": 1, "source_limit_s": 1, "cache": {"dir": "/c", "size": 1},
                "other_sources": ["/t"], "working_set": {"mode": "auto"}}"#,
        )
        .unwrap();
        for config in [serde_json::to_value(boot), serde_json::to_value(restore)] {
            for key in config.unwrap().as_object().unwrap().keys() {
                assert!(NAMES.iter().any(|(_, known)| known == key), "{key}");
            }
        }
    }
}
