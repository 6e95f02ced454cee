//! What a session drives: a [`Function`], or a recording stand-in in tests of the protocol.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use p2plab_pcie::{Access, Declaration, Function, MapError, OutOfBounds, Posted, ResetKind};

/// The transport's side of a [`Function`]; see there.
pub(crate) trait Target: Send + Sync {
    fn name(&self) -> &str;
    fn declaration(&self) -> &Declaration;
    fn bar_size(&self, index: u8) -> u64;
    fn config_read(&self, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds>;
    fn config_write(&self, offset: u64, data: &[u8]) -> Result<(), OutOfBounds>;
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds>;
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), OutOfBounds>;
    fn connect(&self);
    fn disconnect(&self);
    fn map_host_memory(
        &self,
        address: u64,
        length: u64,
        access: Access,
        file: Option<OwnedFd>,
        file_offset: u64,
    ) -> Result<(), MapError>;
    fn unmap_host_memory(&self, address: u64, length: u64) -> Result<(), MapError>;
    fn unmap_all_host_memory(&self);
    fn msix_vectors(&self) -> u16;
    fn set_msix_trigger(&self, vector: u16, file: Option<File>) -> Result<(), OutOfBounds>;
    fn set_intx_trigger(&self, file: Option<File>);
    fn mask_intx(&self, masked: bool);
    fn reset(&self, kind: ResetKind);
    fn poll(&self) -> bool;
    fn set_posted(&self, posted: Option<Arc<dyn Posted>>);
}

macro_rules! forward {
    ($(fn $name:ident(&self $(, $arg:ident: $type:ty)*) $(-> $result:ty)?;)*) => {
        impl Target for Function {
            $(fn $name(&self $(, $arg: $type)*) $(-> $result)? {
                Function::$name(self $(, $arg)*)
            })*
        }
    };
}

forward! {
    fn name(&self) -> &str;
    fn declaration(&self) -> &Declaration;
    fn bar_size(&self, index: u8) -> u64;
    fn config_read(&self, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds>;
    fn config_write(&self, offset: u64, data: &[u8]) -> Result<(), OutOfBounds>;
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds>;
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), OutOfBounds>;
    fn connect(&self);
    fn disconnect(&self);
    fn map_host_memory(
        &self,
        address: u64,
        length: u64,
        access: Access,
        file: Option<OwnedFd>,
        file_offset: u64
    ) -> Result<(), MapError>;
    fn unmap_host_memory(&self, address: u64, length: u64) -> Result<(), MapError>;
    fn unmap_all_host_memory(&self);
    fn msix_vectors(&self) -> u16;
    fn set_msix_trigger(&self, vector: u16, file: Option<File>) -> Result<(), OutOfBounds>;
    fn set_intx_trigger(&self, file: Option<File>);
    fn mask_intx(&self, masked: bool);
    fn reset(&self, kind: ResetKind);
    fn poll(&self) -> bool;
    fn set_posted(&self, posted: Option<Arc<dyn Posted>>);
}
