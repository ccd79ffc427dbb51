// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One object of a store, read by ranges, which must not change meanwhile.

use std::ops::Range;

use futures_util::StreamExt;
use object_store::{GetOptions, GetRange};

use crate::Location;
use crate::store::{Store, StoreError};

/// An object of a store.
pub(crate) struct Object {
    store: Store,
    name: String,
    expected: Option<Version>,
}

/// The state of an object, which a change changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    /// Length, in bytes.
    pub(crate) size: u64,
    /// The entity tag, if the store has them. It identifies a state, and is no hash of the content.
    tag: Option<String>,
}

impl Object {
    /// Prepares access. Nothing is read yet.
    pub(crate) fn open(location: &Location) -> Result<Self, StoreError> {
        let (store, name) = Store::of_object(location)?;
        Ok(Object { store, name, expected: None })
    }

    /// Asks for the object's state, by reading its first byte: a signature of a URL is often good
    /// for reads only.
    pub(crate) async fn version(&self) -> Result<Version, StoreError> {
        let options = GetOptions { range: Some(GetRange::Bounded(0..1)), ..Default::default() };
        let got = self.store.get_opts(&self.name, options).await?;
        Ok(Version { size: got.meta.size, tag: got.meta.e_tag })
    }

    /// Makes any other state than this one an error.
    pub(crate) fn expect(&mut self, version: Version) {
        self.expected = Some(version);
    }

    /// Reads exactly `range` (bytes), and passes the bytes on as they arrive.
    pub(crate) async fn read(
        &self,
        range: Range<u64>,
        mut sink: impl FnMut(&[u8]),
    ) -> Result<(), StoreError> {
        let (offset, len) = (range.start, range.end - range.start);
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..Default::default() };
        let got = self.store.get_opts(&self.name, options).await?;
        if let Some(expected) = &self.expected {
            let version = Version { size: got.meta.size, tag: got.meta.e_tag.clone() };
            if version != *expected {
                let (was, is) = (expected.size, version.size);
                return Err(StoreError::Changed {
                    object: self.store.full_name(&self.name),
                    was,
                    is,
                });
            }
        }
        let mut stream = got.into_stream();
        let mut left = len;
        while let Some(bytes) = stream.next().await {
            let bytes = bytes.map_err(|error| self.store.error(&self.name, error))?;
            // A server that sends more than was asked for does not reach past the destination.
            if bytes.len() as u64 > left {
                return Err(self.store.short(&self.name, offset, len, len + 1));
            }
            left -= bytes.len() as u64;
            sink(&bytes);
        }
        if left == 0 {
            return Ok(());
        }
        Err(self.store.short(&self.name, offset, len, len - left))
    }
}
