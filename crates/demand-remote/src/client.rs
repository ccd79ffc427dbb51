// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clients of web servers and object stores.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Duration;

use object_store::client::{HttpClient, HttpConnector, ReqwestConnector};
use object_store::http::HttpBuilder;
use object_store::{BackoffConfig, ClientConfigKey, ClientOptions, ObjectStore, RetryConfig};
use url::Url;

use crate::store::BoxError;

/// Longest time for a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// Longest time without a byte of an answer.
const STALL: Duration = Duration::from_secs(5);
/// Attempts after the first, and the time that they may take in all. The pager's own attempts,
/// each of them with fresh credentials, have no limit.
const RETRIES: usize = 2;
const RETRY_FOR: Duration = Duration::from_secs(10);
/// Idle connections are closed before the proxies that cut them, commonly after a minute.
const IDLE: Duration = Duration::from_secs(45);

/// Returns the options of all clients. `plain` allows connections without TLS.
pub(crate) fn options(plain: bool) -> ClientOptions {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // If the program has installed another provider, that one serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    ClientOptions::new()
        .with_allow_http(plain)
        .with_connect_timeout(CONNECT)
        .with_read_timeout(STALL)
        // It would limit the body as well, however long that is.
        .with_timeout_disabled()
        .with_pool_idle_timeout(IDLE)
        // With several requests on one connection, demand would wait behind fill.
        .with_http1_only()
}

pub(crate) fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(20),
            max_backoff: Duration::from_millis(500),
            base: 2.0,
        },
        max_retries: RETRIES,
        retry_timeout: RETRY_FOR,
    }
}

/// The options in which clients differ.
const DIFFERENCES: [ClientConfigKey; 4] = [
    ClientConfigKey::AllowHttp,
    ClientConfigKey::ConnectTimeout,
    ClientConfigKey::ReadTimeout,
    ClientConfigKey::Timeout,
];

/// The clients of this process, by those of their options in which they differ.
static CLIENTS: Mutex<Option<HashMap<[Option<String>; 4], HttpClient>>> = Mutex::new(None);

/// Gives all stores of this process the same client. A new one reads all of the system's
/// certificates, and opens connections anew: a snapshot, its working set and each place of it would
/// do both, before the guest runs.
#[derive(Debug)]
pub(crate) struct SharedClient;

impl HttpConnector for SharedClient {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let key = DIFFERENCES.map(|option| options.get_config_value(&option));
        let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
        let clients = clients.get_or_insert_default();
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let client = ReqwestConnector::default().connect(options)?;
        clients.insert(key, client.clone());
        Ok(client)
    }
}

/// Connects to a web server; objects are named relative to the URL.
pub(crate) fn web(url: &Url) -> Result<Arc<dyn ObjectStore>, BoxError> {
    // TLS is left out only where the URL says so.
    let store = HttpBuilder::new()
        .with_url(url.as_str())
        .with_client_options(options(url.scheme() == "http"))
        .with_http_connector(SharedClient)
        .with_retry(retries())
        .build()?;
    Ok(Arc::new(store))
}
