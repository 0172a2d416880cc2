//! `object-add`, `object-del`.

use infill_qmp::{ObjectOptions, QmpError};

use super::control::{Control, refused};

impl Control {
    /// `object-add`, `--object`.
    pub fn object_add(&self, options: &ObjectOptions) -> Result<(), QmpError> {
        self.blockdevs().objects().add(options).map_err(|error| refused(&error))
    }

    /// `object-del`.
    pub(super) fn object_del(&self, id: &str) -> Result<(), QmpError> {
        self.blockdevs().objects().del(id).map_err(|error| refused(&error))
    }
}
