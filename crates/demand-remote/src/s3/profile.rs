// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Profiles of the AWS tools' files.
//!
//! The format is that of the "Shared config and credentials files" of the AWS SDKs and Tools
//! Reference Guide.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

/// The settings of a section, by name.
type Section = HashMap<String, String>;
/// The sections of a file, by their headings without brackets.
type Sections = HashMap<String, Section>;

const DEFAULT: &str = "default";

/// One profile.
#[derive(Debug, Default)]
pub(crate) struct Profile {
    name: String,
    is_named: bool,
    files: [PathBuf; 2],
    settings: Section,
    /// The section of services that the profile refers to.
    services: Section,
}

/// The credentials of a profile.
pub(crate) enum Keys<'a> {
    /// Keys written in a file.
    Fixed {
        /// `aws_access_key_id`.
        id: &'a str,
        /// `aws_secret_access_key`.
        secret: &'a str,
        /// `aws_session_token`.
        token: Option<&'a str>,
    },
    /// A command that prints credentials.
    Process(&'a str),
}

impl Profile {
    /// Reads the profile that the environment names, or the default one. Files that do not exist
    /// have no settings.
    pub(crate) fn load() -> io::Result<Self> {
        Profile::from(|variable| std::env::var_os(variable).filter(|value| !value.is_empty()))
    }

    fn from(variable: impl Fn(&str) -> Option<OsString>) -> io::Result<Self> {
        let file = |name, usual| {
            let home = || PathBuf::from(variable("HOME").unwrap_or_default()).join(usual);
            variable(name).map_or_else(home, PathBuf::from)
        };
        let config = file("AWS_CONFIG_FILE", ".aws/config");
        let credentials = file("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials");
        let named = variable("AWS_PROFILE").map(|name| name.to_string_lossy().into_owned());
        let is_named = named.is_some();
        let name = named.unwrap_or_else(|| DEFAULT.into());

        let mut sections = read(&config)?;
        let of_config = sections.remove(&format!("profile {name}"));
        let of_config = of_config.or_else(|| sections.remove(&name).filter(|_| name == DEFAULT));
        let of_credentials = read(&credentials)?.remove(&name);
        if is_named && of_config.is_none() && of_credentials.is_none() {
            let (config, credentials) = (config.display(), credentials.display());
            let text = format!("neither {config} nor {credentials} has the profile '{name}'");
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        let mut settings = of_config.unwrap_or_default();
        // Credentials of that file have precedence.
        settings.extend(of_credentials.unwrap_or_default());
        let services =
            settings.get("services").and_then(|name| sections.remove(&format!("services {name}")));
        let services = services.unwrap_or_default();
        Ok(Profile { name, is_named, files: [config, credentials], settings, services })
    }

    fn get(&self, setting: &str) -> Option<&str> {
        self.settings.get(setting).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Returns the profile's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether the environment names the profile.
    pub(crate) fn is_named(&self) -> bool {
        self.is_named
    }

    /// Returns the files, for messages.
    pub(crate) fn files(&self) -> String {
        self.files.each_ref().map(|file| file.display().to_string()).join(" and ")
    }

    pub(crate) fn region(&self) -> Option<&str> {
        self.get("region")
    }

    /// Returns the URL of the S3 service.
    pub(crate) fn endpoint(&self) -> Option<&str> {
        self.services
            .get("s3.endpoint_url")
            .map(String::as_str)
            .or_else(|| self.get("endpoint_url"))
    }

    pub(crate) fn keys(&self) -> Option<Keys<'_>> {
        let fixed = self.get("aws_access_key_id").zip(self.get("aws_secret_access_key"));
        if let Some((id, secret)) = fixed {
            return Some(Keys::Fixed { id, secret, token: self.get("aws_session_token") });
        }
        self.get("credential_process").map(Keys::Process)
    }
}

fn read(path: &PathBuf) -> io::Result<Sections> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(parse(&text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Sections::new()),
        Err(error) => Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
    }
}

/// Parses a file. A setting below another one, indented, gets the name `outer.inner`. Other lines
/// are passed over, as the AWS tools do.
fn parse(text: &str) -> Sections {
    let mut sections = Sections::new();
    let (mut section, mut outer) = (None, String::new());
    for line in text.lines() {
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with(['#', ';']) {
            continue;
        }
        if let Some(heading) = trimmed.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            let words: Vec<_> = heading.0.split_whitespace().collect();
            section = Some(words.join(" "));
            outer.clear();
            continue;
        }
        let (Some(section), Some((name, value))) = (&section, trimmed.split_once('=')) else {
            continue;
        };
        let (name, value) = (name.trim(), value.trim());
        let is_inner = line.starts_with([' ', '\t']) && !outer.is_empty();
        let full = if is_inner { format!("{outer}.{name}") } else { name.to_owned() };
        if !is_inner {
            outer = if value.is_empty() { name.to_owned() } else { String::new() };
        }
        sections.entry(section.clone()).or_default().insert(full, value.to_owned());
    }
    sections
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(config: &str, credentials: &str, name: Option<&str>) -> io::Result<Profile> {
        let folder = tempfile::tempdir()?;
        let home = folder.path();
        std::fs::create_dir(home.join(".aws"))?;
        std::fs::write(home.join(".aws/config"), config)?;
        std::fs::write(home.join(".aws/credentials"), credentials)?;
        Profile::from(|variable| match variable {
            "HOME" => Some(home.into()),
            "AWS_PROFILE" => name.map(OsString::from),
            _ => None,
        })
    }

    const CONFIG: &str = "
[default]
region = eu-north-1
[profile lab]
region=eu-west-3
services = local
endpoint_url = http://other:1
credential_process = /bin/keys --for 'lab' # not a comment
[services local]
dynamodb =
  endpoint_url = http://db:2
s3 =
  endpoint_url = http://store:9000
";

    #[test]
    fn profile_is_read_from_both_files() {
        let credentials = "[default]\naws_access_key_id = A\naws_secret_access_key = S\n";
        let default = profile(CONFIG, credentials, None).unwrap();
        assert_eq!(default.region(), Some("eu-north-1"));
        assert!(matches!(default.keys(), Some(Keys::Fixed { id: "A", secret: "S", token: None })));
        assert_eq!(default.endpoint(), None);

        let lab = profile(CONFIG, credentials, Some("lab")).unwrap();
        assert_eq!(lab.endpoint(), Some("http://store:9000"));
        let Some(Keys::Process(command)) = lab.keys() else { panic!("{lab:?}") };
        assert!(command.starts_with("/bin/keys --for"), "{command}");
    }

    #[test]
    fn credentials_file_has_precedence() {
        let config = "[default]\naws_access_key_id = old\naws_secret_access_key = old\n";
        let credentials = "[default]\naws_access_key_id=new\naws_secret_access_key=new\n\
            aws_session_token=token\n";
        let profile = profile(config, credentials, None).unwrap();
        let Some(Keys::Fixed { id, token, .. }) = profile.keys() else { panic!("{profile:?}") };
        assert_eq!((id, token), ("new", Some("token")));
    }

    #[test]
    fn unknown_profile_is_named() {
        let error = profile(CONFIG, "", Some("prod")).unwrap_err().to_string();
        assert!(error.contains("profile 'prod'") && error.contains(".aws/config"), "{error}");
    }

    #[test]
    fn absent_files_have_no_settings() {
        let profile = Profile::from(|_| None).unwrap();
        assert!(profile.keys().is_none() && profile.region().is_none());
    }
}
