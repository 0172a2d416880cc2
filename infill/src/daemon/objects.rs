//! `object-add`, `object-del`.

use infill_qmp::{ObjectKind, ObjectOptions, QmpError};
use infill_storage::rt;

use super::control::{Control, refused};

impl Control {
    /// `object-add`, `--object`. A key may take seconds to decrypt, and a file may be on a server that is away.
    pub(super) async fn object_add(&self, options: ObjectOptions) -> Result<(), QmpError> {
        let ObjectOptions { id, kind } = options;
        let objects = self.blockdevs().objects().clone();
        let made = match kind {
            ObjectKind::Secret(_) | ObjectKind::TlsCredsX509(_) => {
                if let Some(state) = &self.state {
                    state.object_goes_far(&id);
                }
                rt::offload(move || objects.make(&kind)).await.map_err(anyhow::Error::from).flatten()
            }
            // Limits begin with the reactor's clock.
            _ => objects.make(&kind),
        };
        let added = made.and_then(|object| self.blockdevs().objects().insert(&id, object));
        added.map_err(|error| refused(&error))
    }

    /// `object-del`.
    pub(super) fn object_del(&self, id: &str) -> Result<(), QmpError> {
        self.blockdevs().objects().del(id).map_err(|error| refused(&error))
    }
}
