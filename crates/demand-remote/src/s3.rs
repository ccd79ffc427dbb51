// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Buckets of object stores that speak S3, with the settings that its users have.

mod credentials;
mod profile;

use std::sync::Arc;

use object_store::ObjectStore;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};

use crate::client;
use crate::store::BoxError;
use credentials::Origin;
pub(crate) use credentials::RenewedCredentials;
use profile::{Keys, Profile};

/// The region of stores that know none.
const DEFAULT_REGION: &str = "us-east-1";

/// A bucket, and its credentials if they can be renewed before they expire.
type Bucket = (Arc<dyn ObjectStore>, Option<Arc<RenewedCredentials>>);

/// Connects to a bucket.
///
/// Settings come from where the AWS tools take them: `AWS_` variables; then the profile that
/// `AWS_PROFILE` names, in the files `~/.aws/config` and `~/.aws/credentials`, with keys or a
/// `credential_process`; then the machine's roles (web identity, container, instance metadata).
/// Those of a profile are returned, so that they can be renewed.
pub(crate) fn bucket(name: &str) -> Result<Bucket, BoxError> {
    let mut builder = AmazonS3Builder::from_env().with_bucket_name(name);
    let profile = Profile::load()?;
    let is_set = |builder: &AmazonS3Builder, key| builder.get_config_value(&key).is_some();

    if let Some(endpoint) = std::env::var("AWS_ENDPOINT_URL_S3").ok().filter(|url| !url.is_empty())
    {
        builder = builder.with_endpoint(endpoint);
    } else if !is_set(&builder, AmazonS3ConfigKey::Endpoint)
        && let Some(endpoint) = profile.endpoint()
    {
        builder = builder.with_endpoint(endpoint);
    }
    if !is_set(&builder, AmazonS3ConfigKey::Region) {
        let region = profile.region().unwrap_or(DEFAULT_REGION);
        builder = builder.with_region(region);
    }
    let anonymous = builder.get_config_value(&AmazonS3ConfigKey::SkipSignature);
    let anonymous = anonymous.is_some_and(|value| value == "true");
    let mut renewed = None;
    if !anonymous && !is_set(&builder, AmazonS3ConfigKey::AccessKeyId) {
        let origin = match profile.keys() {
            Some(Keys::Fixed { .. }) => Some(Origin::Files),
            Some(Keys::Process(command)) => Some(Origin::Process(command.to_owned())),
            None if profile.is_named() => {
                return Err(format!(
                    "profile '{}' of {} has neither keys nor a credential_process",
                    profile.name(),
                    profile.files()
                )
                .into());
            }
            None => None,
        };
        renewed = origin.map(|origin| Arc::new(RenewedCredentials::new(origin)));
        if let Some(credentials) = &renewed {
            builder = builder.with_credentials(credentials.clone());
        }
    }
    // TLS is left out only where the endpoint says so.
    let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint);
    let plain = endpoint.is_some_and(|url| url.starts_with("http://"));
    let builder = builder.with_client_options(client::options(plain));
    let builder = builder.with_http_connector(client::SharedClient);
    Ok((Arc::new(builder.with_retry(client::retries()).build()?), renewed))
}
