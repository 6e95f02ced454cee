//! One client, from its first message to its last: reads requests, has them done, answers.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use p2plab_pcie::{BarMemory, ResetKind};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET};
use vfio_user::Command;
use zerocopy::FromBytes;

use crate::irq::{self, Interrupts};
use crate::posted::Progress;
use crate::server::Status;
use crate::stream::{Ended, Inbox, Outbox, Received};
use crate::target::Target;
use crate::version::Limits;
use crate::{dma, region, version, wire};

/// The state that a client's messages build up.
pub(crate) struct Session<'a> {
    target: &'a dyn Target,
    status: &'a Status,
    limits: Option<Limits>,
    interrupts: Interrupts,
    progress: Arc<Progress>,
}

/// A memory whose descriptor goes with the reply.
pub(crate) type Attachment = Option<Arc<BarMemory>>;

impl<'a> Session<'a> {
    /// Serves the client on `stream` until it goes away, or the stream is shut down.
    pub(crate) fn run(
        target: &'a dyn Target,
        status: &'a Status,
        stream: &UnixStream,
        progress: Arc<Progress>,
    ) -> Ended {
        let mut session = Session {
            target,
            status,
            limits: None,
            interrupts: Interrupts::default(),
            progress: Arc::clone(&progress),
        };
        let mut inbox = Inbox::new(progress);
        let mut outbox = Outbox::default();
        loop {
            let received = match inbox.receive(stream, &mut || target.poll()) {
                Ok(received) => received,
                Err(ended) => return ended,
            };
            let end = inbox.taken();
            if let Err(error) = session.answer(received, inbox.payload(), end, &mut outbox, stream)
            {
                return Ended::Io(error);
            }
        }
    }

    /// Handles one request, which ends before byte `end` of the stream, and sends its reply, unless none is wanted.
    fn answer(
        &mut self,
        received: Received,
        payload: &[u8],
        end: u64,
        outbox: &mut Outbox,
        stream: &UnixStream,
    ) -> io::Result<()> {
        let Received { header, fds, fault } = received;
        if header.flags & wire::TYPE_MASK == wire::TYPE_REPLY {
            // We send no requests, so nobody waits for it. Its descriptors close here.
            self.progress.delivered(end);
            tracing::debug!(
                function = self.target.name(),
                id = header.message_id,
                "stray reply"
            );
            return Ok(());
        }
        outbox.clear();
        // What takes its time with registers, as a doorbell may, has no write to memory to be waited for.
        if !region::may_write_memory(self.target, header.command, payload) {
            self.progress.delivered(end);
        }
        let result = match fault {
            Some(errno) => Err(errno),
            None if header.flags & !wire::NO_REPLY != wire::TYPE_COMMAND => Err(Errno::INVAL),
            None => self.dispatch(header.command, payload, fds, outbox),
        };
        self.progress.delivered(end);
        if let Err(errno) = &result {
            tracing::debug!(
                function = self.target.name(),
                command = header.command,
                size = header.message_size,
                %errno,
                "refused a vfio-user request"
            );
        }
        if header.flags & wire::NO_REPLY != 0 {
            return Ok(());
        }
        let mut reply = wire::Header {
            flags: wire::TYPE_REPLY,
            ..header
        };
        match result {
            Ok(attachment) => {
                reply.error = 0;
                outbox.send(
                    stream,
                    reply,
                    attachment.as_ref().map(|memory| memory.file().as_fd()),
                )
            }
            Err(errno) => {
                outbox.clear();
                reply.flags |= wire::ERROR;
                reply.error = errno.raw_os_error().unsigned_abs();
                outbox.send(stream, reply, None)
            }
        }
    }

    fn dispatch(
        &mut self,
        command: u16,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        outbox: &mut Outbox,
    ) -> Result<Attachment, Errno> {
        let known = Command::n(command);
        tracing::trace!(
            function = self.target.name(),
            command = ?known,
            bytes = payload.len(),
            fds = fds.len(),
            "request"
        );
        let takes_fds = matches!(known, Some(Command::DmaMap | Command::SetIrqs));
        if !takes_fds && !fds.is_empty() {
            return Err(Errno::INVAL);
        }
        if let Some(Command::Version) = known {
            return self.version(payload, outbox).map(|()| None);
        }
        let limits = self.limits.ok_or(Errno::PROTO)?;
        if command == wire::REGION_WRITE_MULTI {
            return region::write_multiple(self.target, payload).map(|()| None);
        }
        match known {
            Some(Command::DmaMap) => dma::map(self.target, self.status, payload, fds)?,
            Some(Command::DmaUnmap) => dma::unmap(self.target, self.status, payload, outbox)?,
            Some(Command::DeviceGetInfo) => device_info(payload, outbox)?,
            Some(Command::DeviceGetRegionInfo) => {
                return region::info(self.target, payload, limits, outbox);
            }
            Some(Command::GetIrqInfo) => irq::info(self.target, payload, outbox)?,
            Some(Command::SetIrqs) => {
                self.interrupts
                    .set(self.target, self.status, payload, fds)?;
            }
            Some(Command::RegionRead) => region::read(self.target, payload, limits, outbox)?,
            Some(Command::RegionWrite) => region::write(self.target, payload, limits, outbox)?,
            Some(Command::DeviceReset) => {
                if !payload.is_empty() {
                    return Err(Errno::INVAL);
                }
                self.target.reset(ResetKind::Conventional);
            }
            // No region has ioeventfds, nothing here migrates, and DMA_READ and DMA_WRITE are ours to send.
            _ => return Err(Errno::OPNOTSUPP),
        }
        Ok(None)
    }

    fn version(&mut self, payload: &[u8], outbox: &mut Outbox) -> Result<(), Errno> {
        if self.limits.is_some() {
            return Err(Errno::INVAL);
        }
        let limits = version::negotiate(payload, outbox)?;
        self.target.connect();
        self.limits = Some(limits);
        self.status.set_connected(true);
        Ok(())
    }
}

/// The fixed part of a request, where nothing may follow it.
pub(crate) fn exactly<T: FromBytes>(payload: &[u8]) -> Result<T, Errno> {
    T::read_from_bytes(payload).map_err(|_| Errno::INVAL)
}

/// The fixed part of a request, and what follows it.
pub(crate) fn prefix<T: FromBytes>(payload: &[u8]) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(payload).map_err(|_| Errno::INVAL)
}

/// Checks a request's `argsz`: the client's room for the answer, at least its fixed part.
pub(crate) fn check_argsz<T>(argsz: u32) -> Result<usize, Errno> {
    usize::try_from(argsz)
        .ok()
        .filter(|argsz| *argsz >= size_of::<T>())
        .ok_or(Errno::INVAL)
}

fn device_info(payload: &[u8], outbox: &mut Outbox) -> Result<(), Errno> {
    let request: wire::DeviceInfo = exactly(payload)?;
    check_argsz::<wire::DeviceInfo>(request.argsz)?;
    outbox.push(&wire::DeviceInfo {
        argsz: size_of::<wire::DeviceInfo>() as u32,
        flags: VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET,
        num_regions: region::COUNT,
        num_irqs: irq::INDEX_COUNT,
    });
    Ok(())
}
