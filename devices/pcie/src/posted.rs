//! Writes of the CPU that a transport has not delivered yet.
//!
//! On a bus the CPU's writes to one function and its doorbell to another take the same way down, so what the other one
//! then reads of the first finds the writes done: a read does not pass posted writes (PCI Express Base 6.0, section
//! 2.4.1). In a lab each function has a transport of its own, and a write may wait in one while a doorbell has come
//! through another. So a peer that reads memory which the CPU writes by messages first has the transport deliver what
//! it holds.
//!
//! Nobody waits forever, and nobody holds anything of the fabric meanwhile: what is waited for may itself wait for the
//! reader, as when two functions are reset that read each other. Patience ends, and the read goes ahead as it
//! would have without: so does one of a function whose client stopped in the middle of a message.

/// A function's transport, as peers see it.
pub trait Posted: Send + Sync {
    /// Whether the function has all that the CPU has posted to it. It costs every peer-to-peer read.
    fn is_delivered(&self) -> bool;

    /// Waits until the function has all that had been posted to it when this was called, but not for long.
    fn wait(&self);
}
