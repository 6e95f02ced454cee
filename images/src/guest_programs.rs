//! The guest's own programs, built from `images/guest` by `build.rs`: static, for x86-64.

/// The agent, which is init.
pub(crate) const AGENT: &[u8] = include_bytes!(env!("P2PLAB_AGENT"));

/// The benchmark of one block device.
pub(crate) const IOBENCH: &[u8] = include_bytes!(env!("IOBENCH"));

/// The test of `/dev/p2pmemN`.
pub(crate) const P2PMEMTEST: &[u8] = include_bytes!(env!("P2PMEMTEST"));

/// The copy tool.
pub(crate) const P2PCOPY: &[u8] = include_bytes!(env!("P2PCOPY"));
