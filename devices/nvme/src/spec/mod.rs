//! Wire types of NVM Express: what hosts and controllers exchange, byte for byte, and nothing else.
//!
//! Field names are the specification's; a `_z` suffix marks 0's based values. Codes that a host may choose
//! freely are newtypes with constants, so that an unknown one can be represented and printed.
//! Sources: NVM Express Base Specification 2.0 ("Base"), NVM Command Set Specification 1.0 ("NVM").

pub mod command;
pub mod completion;
pub mod identify;
pub mod log;
pub mod names;
pub mod registers;
pub mod sgl;
pub mod status;

/// Size of a memory page: the only value of CC.MPS that the controller takes (CAP.MPSMIN = CAP.MPSMAX = 0).
pub const PAGE_SIZE: u64 = 4096;
