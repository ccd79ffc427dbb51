// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A store of immutable objects: a directory, a web server, or a bucket of an object store.

use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use demand_source::Retry;
use futures_util::TryStreamExt;
use object_store::path::Path as Key;
use object_store::{GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt};

use crate::cause::cause;
use crate::{Location, directory, runtime};

/// An error of any kind.
pub(crate) type BoxError = Box<dyn Error + Send + Sync>;

/// Errors of a [`Store`] and of its objects.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The store cannot be opened.
    #[error("cannot open {store}: {source}; check its name and settings")]
    Open {
        /// The store, without credentials.
        store: String,
        /// The reason.
        source: BoxError,
    },
    /// The store has no such object.
    #[error("cannot read {object}: the store does not have it; check its name")]
    Missing {
        /// The object, without credentials.
        object: String,
    },
    /// The store refuses access.
    #[error("cannot access {object}: {cause}; check credentials and permissions")]
    Denied {
        /// The object, without credentials.
        object: String,
        /// The store's answer.
        cause: String,
    },
    /// The answer has another length than was asked for.
    #[error(
        "cannot read {len} bytes at offset {offset} of {object}: the answer has {got}; check \
         whether the object is whole"
    )]
    Short {
        /// The object, without credentials.
        object: String,
        /// Offset of the range, in bytes.
        offset: u64,
        /// Length of the range, in bytes.
        len: u64,
        /// Bytes of the answer; one more than `len` stands for any greater number.
        got: u64,
    },
    /// The object is not the one that was opened.
    #[error(
        "cannot read {object}: it has changed since it was opened, when it had {was} bytes; it has \
         {is}; restore it"
    )]
    Changed {
        /// The object, without credentials.
        object: String,
        /// Its length when it was opened, in bytes.
        was: u64,
        /// Its length now, in bytes.
        is: u64,
    },
    /// Any other failure: of the network, or of the store.
    #[error("cannot access {object}: {cause}; check the network and the store")]
    Access {
        /// The object, without credentials.
        object: String,
        /// The reason.
        cause: String,
    },
}

impl StoreError {
    /// Returns whether another attempt may succeed. All of these errors may pass: an object can be
    /// restored, and credentials renewed.
    pub fn retry(&self) -> Retry {
        Retry::Later
    }
}

/// A store of immutable objects, each written once and read by ranges.
///
/// It needs nothing of the store but plain writes, reads of ranges, lists and removals: no
/// conditional writes, no writes in parts, and no order or freshness of lists.
///
/// Its methods exist twice: those that wait must not be called by the runtime's own threads.
#[derive(Clone)]
pub struct Store {
    name: Arc<str>,
    #[cfg_attr(not(feature = "image"), expect(dead_code, reason = "pushes and gc need it"))]
    kind: Kind,
    inner: Arc<dyn ObjectStore>,
    /// The credentials, if they can be renewed.
    #[cfg(feature = "s3")]
    credentials: Option<Arc<crate::s3::RenewedCredentials>>,
}

/// The kind of a store.
#[derive(Clone)]
#[cfg_attr(
    not(all(feature = "image", feature = "s3")),
    allow(dead_code, reason = "the kinds are those of other features")
)]
enum Kind {
    Directory(Arc<Path>),
    /// A server that may confirm a write before it is on its disk.
    Server,
    /// A bucket: it has an object once that is on its disks, and never a part of it.
    Bucket,
}

impl Store {
    /// Opens a directory as a store, and creates it if it does not exist. A write returns once a
    /// power cut cannot undo it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Open`].
    pub fn directory(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let inner = directory::open(path);
        let inner = inner.map_err(|source| StoreError::Open { store: name.clone(), source })?;
        Ok(Store::of(name, Kind::Directory(path.into()), Arc::new(inner)))
    }

    /// Opens the store at a place: all objects below that directory, or with that prefix.
    ///
    /// # Errors
    ///
    /// [`StoreError::Open`].
    pub fn open(location: &Location) -> Result<Self, StoreError> {
        let name = location.to_string();
        let opened = match location {
            Location::Path(path) => return Store::directory(path),
            #[cfg(feature = "http")]
            Location::Web(url) => {
                crate::client::web(url).map(|inner| Store::of(name.clone(), Kind::Server, inner))
            }
            #[cfg(feature = "s3")]
            Location::S3 { bucket, key } => {
                crate::s3::bucket(bucket).map(|(bucket, credentials)| {
                    let inner =
                        object_store::prefix::PrefixStore::new(bucket, Key::from(key.as_str()));
                    let store = Store::of(name.clone(), Kind::Bucket, Arc::new(inner));
                    Store { credentials, ..store }
                })
            }
            #[cfg(not(all(feature = "http", feature = "s3")))]
            _ => Err("this build has no client for it".into()),
        };
        opened.map_err(|source| StoreError::Open { store: name, source })
    }

    /// Opens the store that has an object, and returns it with the object's name there.
    pub(crate) fn of_object(location: &Location) -> Result<(Self, String), StoreError> {
        match location {
            Location::Path(path) => {
                let open =
                    |source: BoxError| StoreError::Open { store: location.to_string(), source };
                let path = path.canonicalize().map_err(|error| open(error.into()))?;
                let name = path.file_name().ok_or_else(|| open("it names no file".into()))?;
                let folder = path.parent().unwrap_or(Path::new("/"));
                Ok((Store::directory(folder)?, name.to_string_lossy().into_owned()))
            }
            // The URL itself is the object's, with its query, which may be a signature.
            Location::Web(_) => Ok((Store::open(location)?, String::new())),
            Location::S3 { bucket, key } => {
                let bucket = Location::S3 { bucket: bucket.clone(), key: String::new() };
                Ok((Store::open(&bucket)?, key.clone()))
            }
        }
    }

    /// Wraps an object store of this name.
    #[cfg(all(test, feature = "image"))]
    pub(crate) fn new(name: &str, inner: Arc<dyn ObjectStore>) -> Self {
        Store::of(name.to_owned(), Kind::Bucket, inner)
    }

    fn of(name: String, kind: Kind, inner: Arc<dyn ObjectStore>) -> Self {
        Store {
            name: name.into(),
            kind,
            inner,
            #[cfg(feature = "s3")]
            credentials: None,
        }
    }

    /// Returns the store's name, without credentials.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns an object's name for messages.
    pub(crate) fn full_name(&self, object: &str) -> String {
        if object.is_empty() {
            return self.name.to_string();
        }
        format!("{}/{object}", self.name.trim_end_matches('/'))
    }

    pub(crate) fn error(&self, object: &str, source: object_store::Error) -> StoreError {
        use object_store::Error;
        let (object, cause) = (self.full_name(object), cause(&source));
        match source {
            Error::NotFound { .. } => StoreError::Missing { object },
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                StoreError::Denied { object, cause }
            }
            #[cfg(feature = "s3")]
            _ if crate::cause::is_invalid_key(&cause) => StoreError::Denied { object, cause },
            _ => StoreError::Access { object, cause },
        }
    }

    /// Makes a request for an object, and once more with new credentials if the store refuses
    /// these.
    async fn request<T, F>(
        &self,
        object: &str,
        make: impl Fn(Arc<dyn ObjectStore>, Key) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let attempt = async || {
            let outcome = make(self.inner.clone(), Key::from(object)).await;
            outcome.map_err(|source| self.error(object, source))
        };
        let outcome = attempt().await;
        #[cfg(feature = "s3")]
        if let (Err(StoreError::Denied { .. }), Some(credentials)) = (&outcome, &self.credentials) {
            credentials.renew().await;
            return attempt().await;
        }
        outcome
    }

    /// Returns the error for an answer of a wrong length, in bytes.
    pub(crate) fn short(&self, object: &str, offset: u64, len: u64, got: u64) -> StoreError {
        StoreError::Short { object: self.full_name(object), offset, len, got }
    }

    /// Starts to read an object, or a part of it.
    pub(crate) async fn get_opts(
        &self,
        object: &str,
        options: GetOptions,
    ) -> Result<GetResult, StoreError> {
        let get = |inner: Arc<dyn ObjectStore>, key| {
            let options = options.clone();
            async move { inner.get_opts(&key, options).await }
        };
        self.request(object, get).await
    }

    /// Reads a whole object.
    ///
    /// # Errors
    ///
    /// [`StoreError`], except [`Open`](StoreError::Open).
    pub async fn get(&self, object: &str) -> Result<Bytes, StoreError> {
        let read =
            |inner: Arc<dyn ObjectStore>, key| async move { inner.get(&key).await?.bytes().await };
        self.request(object, read).await
    }

    /// Reads a whole object, in one request, or returns `None` if it has more than `most` bytes.
    ///
    /// # Errors
    ///
    /// [`StoreError`], except [`Open`](StoreError::Open).
    #[cfg(feature = "image")]
    pub(crate) async fn get_at_most(
        &self,
        object: &str,
        most: u64,
    ) -> Result<Option<Bytes>, StoreError> {
        let read = |inner: Arc<dyn ObjectStore>, key| async move {
            let answer = inner.get(&key).await?;
            if answer.meta.size > most {
                return Ok(None);
            }
            answer.bytes().await.map(Some)
        };
        self.request(object, read).await
    }

    /// Reads exactly `range` (bytes) of an object.
    ///
    /// # Errors
    ///
    /// [`StoreError`], except [`Open`](StoreError::Open): [`Short`](StoreError::Short) for an answer
    /// of another length.
    pub async fn get_range(&self, object: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let (offset, len) = (range.start, range.end - range.start);
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..Default::default() };
        let got = self.get_opts(object, options).await?;
        let bytes = got.bytes().await.map_err(|source| self.error(object, source))?;
        if bytes.len() as u64 == len {
            return Ok(bytes);
        }
        Err(self.short(object, offset, len, bytes.len() as u64))
    }

    /// Returns the length of an object in bytes, or `None` if the store does not have it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Denied`], [`StoreError::Access`].
    pub async fn len(&self, object: &str) -> Result<Option<u64>, StoreError> {
        let head = |inner: Arc<dyn ObjectStore>, key| async move { inner.head(&key).await };
        match self.request(object, head).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(StoreError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns whether the store has an object of this content. A directory or a web server may have
    /// one of the right length whose bytes a power cut has lost, so that it is read.
    ///
    /// # Errors
    ///
    /// [`StoreError::Denied`], [`StoreError::Access`].
    #[cfg(feature = "image")]
    pub(crate) async fn has(&self, object: &str, content: &[u8]) -> Result<bool, StoreError> {
        let len = content.len() as u64;
        if self.len(object).await? != Some(len) {
            return Ok(false);
        }
        if matches!(self.kind, Kind::Bucket) {
            return Ok(true);
        }
        match self.get_at_most(object, len).await {
            Ok(got) => Ok(got.is_some_and(|got| got == content)),
            Err(StoreError::Missing { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes an object, in place of one that has the name.
    ///
    /// # Errors
    ///
    /// [`StoreError::Denied`], [`StoreError::Access`].
    pub async fn put(&self, object: &str, content: Bytes) -> Result<(), StoreError> {
        let put = |inner: Arc<dyn ObjectStore>, key| {
            let content = content.clone();
            async move { inner.put(&key, content.into()).await }
        };
        self.request(object, put).await.map(drop)
    }

    /// Returns the names of the objects whose names begin with `folder` and a slash, with their
    /// lengths in bytes and the times of their last change.
    ///
    /// # Errors
    ///
    /// [`StoreError::Denied`], [`StoreError::Access`].
    pub async fn list(&self, folder: &str) -> Result<Vec<Listed>, StoreError> {
        let list = |inner: Arc<dyn ObjectStore>, key| async move {
            let entries = inner.list(Some(&key)).map_ok(|meta| Listed {
                name: meta.location.to_string(),
                len: meta.size,
                changed: meta.last_modified.into(),
            });
            entries.try_collect().await
        };
        self.request(folder, list).await
    }

    /// Removes an object; one that does not exist is no error.
    ///
    /// # Errors
    ///
    /// [`StoreError::Denied`], [`StoreError::Access`].
    pub async fn remove(&self, object: &str) -> Result<(), StoreError> {
        let delete = |inner: Arc<dyn ObjectStore>, key| async move { inner.delete(&key).await };
        match self.request(object, delete).await {
            Err(StoreError::Missing { .. }) => Ok(()),
            removed => removed,
        }
    }

    /// Returns the drafts that interrupted writes have left in a folder; only a directory shows them.
    ///
    /// # Errors
    ///
    /// [`StoreError::Access`].
    #[cfg(feature = "image")]
    pub(crate) fn drafts(&self, folder: &str) -> Result<Vec<Listed>, StoreError> {
        let Kind::Directory(path) = &self.kind else { return Ok(Vec::new()) };
        directory::drafts(path, folder).map_err(|error| StoreError::Access {
            object: self.full_name(folder),
            cause: error.to_string(),
        })
    }

    /// Removes a [draft](Self::drafts); one that does not exist is no error.
    ///
    /// # Errors
    ///
    /// [`StoreError::Access`].
    #[cfg(feature = "image")]
    pub(crate) fn remove_draft(&self, draft: &str) -> Result<(), StoreError> {
        let Kind::Directory(path) = &self.kind else { return Ok(()) };
        match std::fs::remove_file(path.join(draft)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                let (object, cause) = (self.full_name(draft), error.to_string());
                Err(StoreError::Access { object, cause })
            }
            _ => Ok(()),
        }
    }

    /// Waits for one of the other methods on the calling thread.
    pub fn wait<F: Future>(&self, future: F) -> F::Output {
        runtime::wait(future)
    }
}

/// An object of a [list](Store::list).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Name in the store.
    pub name: String,
    /// Length, in bytes.
    pub len: u64,
    /// Time of the last change, by the store's clock.
    pub changed: SystemTime,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_keeps_objects() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::directory(folder.path().join("new")).unwrap();
        store.wait(async {
            store.put("packs/a", Bytes::from_static(b"content")).await.unwrap();
            assert_eq!(store.get("packs/a").await.unwrap(), "content");
            assert_eq!(store.get_range("packs/a", 1..3).await.unwrap(), "on");
            assert_eq!(store.len("packs/a").await.unwrap(), Some(7));
            assert_eq!(store.len("packs/b").await.unwrap(), None);
            let listed = store.list("packs").await.unwrap();
            assert_eq!((listed.len(), &*listed[0].name, listed[0].len), (1, "packs/a", 7));
            store.remove("packs/a").await.unwrap();
            store.remove("packs/a").await.unwrap();
            let error = store.get("packs/a").await.unwrap_err();
            assert!(matches!(error, StoreError::Missing { .. }), "{error}");
        });
    }

    #[test]
    fn range_past_the_end_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::directory(folder.path()).unwrap();
        store.wait(async {
            store.put("a", Bytes::from_static(b"content")).await.unwrap();
            #[cfg(feature = "image")]
            {
                assert_eq!(store.get_at_most("a", 6).await.unwrap(), None);
                assert_eq!(store.get_at_most("a", 7).await.unwrap().unwrap(), "content");
            }
            let error = store.get_range("a", 3..12).await.unwrap_err();
            assert!(matches!(error, StoreError::Short { got: 4, len: 9, .. }), "{error}");
        });
    }
}
