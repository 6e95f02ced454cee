//! PCI Express for p2plab's endpoints.

pub mod endpoint;
pub mod fabric;
pub mod function;
pub mod memory;
pub mod port;

pub use endpoint::{
    BarBacking, BarDeclaration, CpuAccess, Declaration, Endpoint, Identity, MsixDeclaration, ResetKind,
};
pub use fabric::{Fabric, FabricBuilder, FabricError};
pub use function::{Access, Function, MapError, OutOfBounds};
pub use memory::{BarMemory, DmaBuffers};
pub use port::{DmaError, DmaRange, Port};
