//! Serves any p2plab endpoint to QEMU, or to any other client, over vfio-user.
//!
//! A [`Server`] owns one unix socket ([`SocketAddress`]: a path, or an abstract name that nothing can
//! leave behind) and one thread, and drives one [`Function`](p2plab_pcie::Function). A process has as many
//! as it likes.
//!
//! # Parts
//!
//! - `address`: binding, removing and guarding the socket.
//! - `server`: the thread, its states, stopping.
//! - `stream`: whole messages with their descriptors, in and out, in buffers that are used again.
//! - `session`: one client; checks a request's frame and passes it to `version`, `dma`, `region`, `irq`.
//! - `wire`: the layouts. `target`: the seam at which tests record instead.
//!
//! # What becomes of a bad message
//!
//! Any request whose size in the header is believable (16 bytes to 16 MiB) is read to its end, whatever is
//! wrong with it; its descriptors are closed, it is answered with the error flag and an errno, and the next
//! message is understood. With another size nothing tells where the next message begins, so the connection
//! closes. Requests with the no-reply flag get no reply, not even for an error. Replies are dropped, as we
//! send no requests.
//!
//! # What is used of crate vfio_user, and what is not
//!
//! Used: `Command`, `DmaMapFlags`, and its `Client` as an independent peer in the tests; structures and
//! constants of vfio-bindings. Its `Server` (0.1.7) is not used, because it
//! - allocates what the header or `count` asks for, up to 4 GiB, for each message;
//! - panics on bad version data, and gets out of step on an unknown command or a size that is not the
//!   command's;
//! - takes a header that arrives in pieces for a whole one;
//! - serves one connection, and cannot be told to stop;
//! - ignores the client's limits, `argsz`, descriptor counts and posted `DEVICE_GET_*` requests;
//! - has `DmaUnmapFlags` one bit too high, so that QEMU's "unmap all" is something else to it.
//!
//! # What is not implemented
//!
//! - DMA_READ and DMA_WRITE, messages to the client for memory that it maps without a descriptor. Give
//!   QEMU's guest shared memory (`memory-backend-memfd,share=on`).
//! - Migration, dirty pages, device features, MSI (not MSI-X), expansion ROM, VGA, ioeventfds (DEVICE_GET_REGION_IO_FDS).
//! - Unmasking INTx by an eventfd (SET_IRQS with DATA_EVENTFD and UNMASK); QEMU does without.

mod address;
mod dma;
mod irq;
mod region;
mod server;
mod session;
mod stream;
mod target;
#[cfg(test)]
mod tests;
mod version;
mod wire;

pub use address::SocketAddress;
pub use server::{ServeError, Server};
