//! What runs inside the guest, and the words that host and guest share.
//!
//! * [`protocol`]: the JSON lines between the harness and the agent; the harness uses the same types.
//! * [`mod@line`]: the bounded line splitter that both ends read with.
//! * [`server`]: the agent's request loop, over any byte stream (so that it is tested without a guest).
//! * [`children`]: starting processes and the one place that reaps them.
//! * [`modules`]: loading kernel modules.
//! * [`pattern`]: the seeded data that `p2pcopy --check` writes and compares; the host seeds backing
//!   files with the same function.
//! * [`p2pmem`]: the ioctls of `/dev/p2pmemN`.
//! * [`words`]: values of the programs' options.
//!
//! Programs: `p2plab-agent` is `/init` of the guest image; `p2pcopy` copies between block devices
//! through a chosen buffer; `iobench` measures one block device; `p2pmemtest` drives all that `/dev/p2pmemN` does
//! and refuses. Not implemented: terminals (pty) for commands run through the agent, standard input that does not
//! fit into one request, and users other than root.

pub mod children;
pub mod line;
pub mod modules;
pub mod p2pmem;
pub mod pattern;
pub mod protocol;
pub mod server;
mod sys;
pub mod words;

pub use sys::{
    Ended, Mapping, Sharing, aio, become_user, in_child, kill_everything, loopback_up, poll_hangup,
};
