// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Credentials that a command prints, renewed in time.
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

/// Longest time that the command may take: it may ask a server.
const LIMIT: Duration = Duration::from_secs(60);
/// Credentials are renewed so long before they expire.
const AHEAD: Duration = Duration::from_secs(5 * 60);
/// Least time between two runs of the command, for credentials that expire at once.
const PAUSE: Duration = Duration::from_secs(1);

/// Credentials from a `credential_process`.
pub(crate) struct ProcessCredentials {
    command: String,
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

impl ProcessCredentials {
    pub(crate) fn new(command: &str) -> Self {
        ProcessCredentials { command: command.to_owned(), last: Mutex::default() }
    }

    async fn obtain(&self) -> Result<Known, String> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &self.command]).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(LIMIT, command.output())
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
impl CredentialProvider for ProcessCredentials {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let mut last = self.last.lock().await;
        if let Some(known) = last.as_ref().filter(|known| known.is_fresh()) {
            return Ok(known.credential.clone());
        }
        let known = self.obtain().await.map_err(|reason| Error::Generic {
            store: "S3",
            source: format!("credential_process failed: {reason}").into(),
        })?;
        let credential = known.credential.clone();
        *last = Some(known);
        Ok(credential)
    }
}

impl fmt::Debug for ProcessCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The command may contain secrets.
        f.debug_struct("ProcessCredentials").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime;

    /// Returns a command that counts its runs in a file, and prints credentials with that number.
    fn counting(file: &std::path::Path, expiration: &str) -> ProcessCredentials {
        let file = file.display();
        ProcessCredentials::new(&format!(
            "echo run >>{file}; n=$(wc -l <{file}); echo '{{\"Version\": 1, \"AccessKeyId\": \
             \"id'$n'\", \"SecretAccessKey\": \"secret\", \"Expiration\": \"{expiration}\"}}'"
        ))
    }

    #[test]
    fn fresh_credentials_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let credentials = counting(&folder.path().join("runs"), "2199-01-01T00:00:00Z");
        runtime::wait(async {
            for _ in 0..3 {
                assert_eq!(credentials.get_credential().await.unwrap().key_id, "id1");
            }
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
            let credentials = ProcessCredentials::new(command);
            let error = runtime::wait(credentials.get_credential()).unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains("hidden"), "{error}");
        }
    }
}
