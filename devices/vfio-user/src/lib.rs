//! Serves any p2plab endpoint to QEMU, or to any other client, over vfio-user.
//!
//! A [`Server`] owns one unix socket ([`SocketAddress`]: a path, or what nothing can leave
//! behind) and one thread, and drives one [`Function`](p2plab_pcie::Function). A process has as many
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
//!
//! # Whom it trusts
//!
//! A client may send anything, at any pace, or nothing: it can end its own connection, keep its own device
//! from others as long as it is connected, and no more. Its memory must be memfds of ordinary pages, sealed against
//! shrinking, so that it cannot take away what is mapped. One thing is out of reach: an eventfd that the client makes
//! blocking again and never reads stops its device. So only the lab's own user should connect; that holds for abstract
//! and unlinked sockets, and for a path in a folder of that user's.
//!
//! # What QEMU does (seen with 11.1.3, where nothing else is said)
//!
//! - The socket must be `{"type":"unix","path":...}`. `"abstract":true` is ignored, and the name taken for
//!   a path. By its source (read, not tried) `{"type":"fd"}` is refused. [`SocketAddress::Unlinked`] gives a
//!   path that leaves nothing behind.
//! - Writes to a memory BAR are posted (no reply), unless `x-no-posted-writes` is on or, by its source (read,
//!   not tried), a region of the device can be mapped. Reads, config writes and all else are answered. A posted
//!   write's error is lost.
//! - **Detach**: `device_del`, and the guest lets go (pciehp, or ACPI); QEMU unmaps all memory, reports
//!   DEVICE_DELETED and closes the socket. Wait for that event, then for [`Server::wait_disconnected`],
//!   then [`Server::stop`]. Without the guest's consent (no driver, paused) `device_del` stays pending.
//!   **Only for functions without MSI-X**: with it, QEMU 11.1.3 aborts while it frees the device
//!   (`memory_region_del_subregion: Assertion subregion->container == mr`), whatever the server does.
//! - A server that stops under a running QEMU: QEMU goes on until the next change of its memory map (a
//!   reset, firmware's remapping, another device's BAR), and then aborts: "vfio: DMA mapping failed, unable
//!   to continue". Until then reads give all ones. So detach first, or end QEMU first.
//! - A request without an answer for `x-msg-timeout` milliseconds (5000 by default) reads as all ones, and
//!   the late answer makes QEMU give the connection up: one timeout costs the device, so set it high.
//! - Option ROMs are probed and their absence reported on stderr; `rombar=0` silences that.
//! - At start-up, reset and in firmware, memory is unmapped and mapped again in pieces of any size, also
//!   read-only ones; flash comes without a descriptor.

mod address;
mod dma;
mod irq;
mod posted;
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
