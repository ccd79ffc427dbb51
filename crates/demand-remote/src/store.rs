// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A store of immutable objects: a directory, a web server, or a bucket of an object store.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use demand_source::Retry;
use futures_util::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt};

use crate::runtime;

/// Errors of a [`Store`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The store cannot be opened.
    #[error("cannot open {store}: {source}; check its name")]
    Open {
        /// The store, without credentials.
        store: String,
        /// The reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store has no such object.
    #[error("cannot read {object} of {store}: the store does not have it; check its name")]
    Missing {
        /// The store, without credentials.
        store: String,
        /// Name of the object.
        object: String,
    },
    /// The store refuses access.
    #[error("cannot access {object} of {store}: {source}; check credentials and permissions")]
    Denied {
        /// The store, without credentials.
        store: String,
        /// Name of the object.
        object: String,
        /// The store's answer.
        source: Error,
    },
    /// The answer has another length than was asked for.
    #[error(
        "cannot read {len} bytes at offset {offset} of {object} of {store}: it answered with \
         {got}; check whether the object is whole, and whether the server knows ranges"
    )]
    Short {
        /// The store, without credentials.
        store: String,
        /// Name of the object.
        object: String,
        /// Offset of the range, in bytes.
        offset: u64,
        /// Length of the range, in bytes.
        len: u64,
        /// Bytes of the answer.
        got: u64,
    },
    /// Any other failure: of the network, or of the store.
    #[error("cannot access {object} of {store}: {source}; check the network and the store")]
    Access {
        /// The store, without credentials.
        store: String,
        /// Name of the object.
        object: String,
        /// The reason.
        source: Error,
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
    inner: Arc<dyn ObjectStore>,
}

impl Store {
    /// Opens a directory as a store, and creates it if it does not exist.
    ///
    /// # Errors
    ///
    /// [`StoreError::Open`].
    pub fn directory(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let open = || -> Result<LocalFileSystem, Box<dyn std::error::Error + Send + Sync>> {
            std::fs::create_dir_all(path)?;
            Ok(LocalFileSystem::new_with_prefix(path)?)
        };
        let inner = open().map_err(|source| StoreError::Open { store: name.clone(), source })?;
        Ok(Store::new(name, Arc::new(inner)))
    }

    /// Wraps an object store; `name` is what errors call it, without credentials.
    pub(crate) fn new(name: impl Into<Arc<str>>, inner: Arc<dyn ObjectStore>) -> Self {
        Store { name: name.into(), inner }
    }

    /// Returns the store's name, without credentials.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn error(&self, object: &str, source: Error) -> StoreError {
        let (store, object) = (self.name.to_string(), object.to_owned());
        match source {
            Error::NotFound { .. } => StoreError::Missing { store, object },
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                StoreError::Denied { store, object, source }
            }
            source => StoreError::Access { store, object, source },
        }
    }

    /// Reads a whole object.
    ///
    /// # Errors
    ///
    /// [`StoreError`], except [`Open`](StoreError::Open).
    pub async fn get(&self, object: &str) -> Result<Bytes, StoreError> {
        let read = async { self.inner.get(&Key::from(object)).await?.bytes().await };
        read.await.map_err(|source| self.error(object, source))
    }

    /// Reads exactly `range` (bytes) of an object.
    ///
    /// # Errors
    ///
    /// [`StoreError`], except [`Open`](StoreError::Open): [`Short`](StoreError::Short) for an answer
    /// of another length.
    pub async fn get_range(&self, object: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let read = async {
            let options =
                GetOptions { range: Some(GetRange::Bounded(range.clone())), ..Default::default() };
            self.inner.get_opts(&Key::from(object), options).await?.bytes().await
        };
        let bytes = read.await.map_err(|source| self.error(object, source))?;
        let (got, len) = (bytes.len() as u64, range.end - range.start);
        if got == len {
            return Ok(bytes);
        }
        let (store, object) = (self.name.to_string(), object.to_owned());
        Err(StoreError::Short { store, object, offset: range.start, len, got })
    }

    /// Returns the length of an object in bytes, or `None` if the store does not have it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Denied`], [`StoreError::Access`].
    pub async fn len(&self, object: &str) -> Result<Option<u64>, StoreError> {
        match self.inner.head(&Key::from(object)).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(self.error(object, source)),
        }
    }

    /// Writes an object, in place of one that has the name.
    ///
    /// # Errors
    ///
    /// [`StoreError::Denied`], [`StoreError::Access`].
    pub async fn put(&self, object: &str, content: Bytes) -> Result<(), StoreError> {
        let written = self.inner.put(&Key::from(object), content.into()).await;
        written.map(drop).map_err(|source| self.error(object, source))
    }

    /// Returns the names of the objects whose names begin with `folder` and a slash, with their
    /// lengths in bytes and the times of their last change.
    ///
    /// # Errors
    ///
    /// [`StoreError::Denied`], [`StoreError::Access`].
    pub async fn list(&self, folder: &str) -> Result<Vec<Listed>, StoreError> {
        let entries = self.inner.list(Some(&Key::from(folder))).map_ok(|meta| Listed {
            name: meta.location.to_string(),
            len: meta.size,
            changed: meta.last_modified.into(),
        });
        entries.try_collect().await.map_err(|source| self.error(folder, source))
    }

    /// Removes an object; one that does not exist is no error.
    ///
    /// # Errors
    ///
    /// [`StoreError::Denied`], [`StoreError::Access`].
    pub async fn remove(&self, object: &str) -> Result<(), StoreError> {
        match self.inner.delete(&Key::from(object)).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(self.error(object, source)),
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
    pub changed: std::time::SystemTime,
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
            let error = store.get_range("a", 3..12).await.unwrap_err();
            assert!(matches!(error, StoreError::Short { got: 4, len: 9, .. }), "{error}");
        });
    }
}
