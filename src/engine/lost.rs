//! A device that is gone, and why.

use crate::error::{Error, Result};
use std::sync::OnceLock;

/// The reason why a device is gone, once it is.
#[derive(Debug, Default)]
pub(crate) struct Lost(OnceLock<String>);

impl Lost {
    pub fn set(&self, reason: String) {
        // The first reason is the cause; later ones follow from it.
        let _ = self.0.set(reason);
    }

    pub fn check(&self, op: &'static str) -> Result<()> {
        match self.0.get() {
            None => Ok(()),
            Some(reason) => Err(Error::DeviceLost { op, reason: reason.clone() }),
        }
    }
}
