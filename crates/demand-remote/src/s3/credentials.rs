// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Credentials that a command prints, or that a file has, which other programs renew there.
//!
//! The command's output is that of "Sourcing credentials with an external process" of the AWS CLI's
//! User Guide.

use std::fmt;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use object_store::aws::AwsCredential;
use object_store::{CredentialProvider, Error};
use serde::Deserialize;
use tokio::process::Command;
use tokio::sync::Mutex;

use super::profile::{Keys, Profile};

/// Longest time that the command may take: it may ask a server.
const LIMIT: Duration = Duration::from_secs(60);
/// Credentials are renewed so long before they expire.
const AHEAD: Duration = Duration::from_secs(5 * 60);
/// Least time between two renewals, for credentials that expire at once.
const PAUSE: Duration = Duration::from_secs(1);

/// The place that credentials come from.
pub(crate) enum Origin {
    /// A `credential_process`: the command.
    Process(String),
    /// The profile's files.
    Files,
}

/// Credentials that are obtained again when they expire, or when the store refuses them.
pub(crate) struct RenewedCredentials {
    origin: Origin,
    last: Mutex<Option<Known>>,
}

struct Known {
    credential: Arc<AwsCredential>,
    obtained: Instant,
    expires: Option<SystemTime>,
}

impl Known {
    fn is_fresh(&self) -> bool {
        let left = self.expires.map(|at| at.duration_since(SystemTime::now()).unwrap_or_default());
        left.is_none_or(|left| left > AHEAD) || self.obtained.elapsed() < PAUSE
    }
}

/// The command's output.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Output {
    version: u32,
    access_key_id: String,
    secret_access_key: String,
    session_token: Option<String>,
    expiration: Option<chrono::DateTime<chrono::Utc>>,
}

impl RenewedCredentials {
    pub(crate) fn new(origin: Origin) -> Self {
        RenewedCredentials { origin, last: Mutex::default() }
    }

    /// Forgets the credentials, because the store has refused them. It keeps those that are new:
    /// requests that were in progress together are refused together.
    pub(crate) async fn renew(&self) {
        let mut last = self.last.lock().await;
        last.take_if(|known| known.obtained.elapsed() >= PAUSE);
    }

    async fn obtain(&self) -> Result<Known, String> {
        let failed = |reason| format!("credential_process failed: {reason}");
        let command = match &self.origin {
            Origin::Process(command) => command.clone(),
            Origin::Files => match Profile::load().map_err(|error| error.to_string())?.keys() {
                Some(Keys::Process(command)) => command.to_owned(),
                Some(Keys::Fixed { id, secret, token }) => {
                    let credential = Arc::new(AwsCredential {
                        key_id: id.to_owned(),
                        secret_key: secret.to_owned(),
                        token: token.map(str::to_owned),
                    });
                    return Ok(Known { credential, obtained: Instant::now(), expires: None });
                }
                None => return Err("the profile has no keys any more".into()),
            },
        };
        Self::run(&command).await.map_err(failed)
    }

    async fn run(command: &str) -> Result<Known, String> {
        let mut process = Command::new("/bin/sh");
        process.args(["-c", command]).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(LIMIT, process.output())
            .await
            .map_err(|_| format!("it did not end within {} s", LIMIT.as_secs()))?
            .map_err(|error| error.to_string())?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().next_back().unwrap_or("nothing");
            return Err(format!("it ended with {}, and said: {last}", output.status));
        }
        // Neither the output nor a parser's excerpt of it is shown: it contains secrets.
        let parsed: Output = serde_json::from_slice(&output.stdout)
            .map_err(|error| format!("its output is not as expected, in line {}", error.line()))?;
        if parsed.version != 1 {
            return Err(format!("its output has version {} instead of 1", parsed.version));
        }
        let credential = Arc::new(AwsCredential {
            key_id: parsed.access_key_id,
            secret_key: parsed.secret_access_key,
            token: parsed.session_token,
        });
        let expires = parsed.expiration.map(SystemTime::from);
        Ok(Known { credential, obtained: Instant::now(), expires })
    }
}

#[async_trait]
impl CredentialProvider for RenewedCredentials {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let mut last = self.last.lock().await;
        if let Some(known) = last.as_ref().filter(|known| known.is_fresh()) {
            return Ok(known.credential.clone());
        }
        let known = self
            .obtain()
            .await
            .map_err(|reason| Error::Generic { store: "S3", source: reason.into() })?;
        let credential = known.credential.clone();
        *last = Some(known);
        Ok(credential)
    }
}

impl fmt::Debug for RenewedCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The command may contain secrets.
        f.debug_struct("RenewedCredentials").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime;

    /// Returns a command that counts its runs in a file, and prints credentials with that number.
    fn counting(file: &std::path::Path, expiration: &str) -> RenewedCredentials {
        let file = file.display();
        RenewedCredentials::new(Origin::Process(format!(
            "echo run >>{file}; n=$(wc -l <{file}); echo '{{\"Version\": 1, \"AccessKeyId\": \
             \"id'$n'\", \"SecretAccessKey\": \"secret\", \"Expiration\": \"{expiration}\"}}'"
        )))
    }

    #[test]
    fn fresh_credentials_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let credentials = counting(&folder.path().join("runs"), "2199-01-01T00:00:00Z");
        runtime::wait(async {
            for _ in 0..3 {
                assert_eq!(credentials.get_credential().await.unwrap().key_id, "id1");
                // They are too new to be the ones that the store has refused.
                credentials.renew().await;
            }
            tokio::time::sleep(PAUSE).await;
            credentials.renew().await;
            assert_eq!(credentials.get_credential().await.unwrap().key_id, "id2");
        });
    }

    #[test]
    fn expiring_credentials_are_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let credentials = counting(&folder.path().join("runs"), "2020-01-01T00:00:00Z");
        runtime::wait(async {
            assert_eq!(credentials.get_credential().await.unwrap().key_id, "id1");
            tokio::time::sleep(PAUSE).await;
            assert_eq!(credentials.get_credential().await.unwrap().key_id, "id2");
        });
    }

    #[test]
    fn failures_are_named_without_secrets() {
        for (command, words) in [
            ("echo no session >&2; exit 3", "said: no session"),
            ("echo '{\"SecretAccessKey\": \"hidden\"}'", "not as expected"),
            ("/does/not/exist", "not found"),
        ] {
            let credentials = RenewedCredentials::new(Origin::Process(command.into()));
            let error = runtime::wait(credentials.get_credential()).unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains("hidden"), "{error}");
        }
    }
}
