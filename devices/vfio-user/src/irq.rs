//! DEVICE_GET_IRQ_INFO and DEVICE_SET_IRQS: where interrupts go.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::OwnedFd;

use rustix::fs::OFlags;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_TYPE_MASK, VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX,
};

use crate::server::Status;
use crate::session::{check_argsz, exactly, prefix};
use crate::stream::Outbox;
use crate::target::Target;
use crate::wire;

/// Number of interrupt indices: INTx, MSI, MSI-X, error, request.
pub(crate) const INDEX_COUNT: u32 = VFIO_PCI_REQ_IRQ_INDEX + 1;

fn count(target: &dyn Target, index: u32) -> Result<u32, Errno> {
    match index {
        VFIO_PCI_INTX_IRQ_INDEX => Ok(u32::from(target.declaration().intx)),
        VFIO_PCI_MSI_IRQ_INDEX => Ok(0),
        VFIO_PCI_MSIX_IRQ_INDEX => Ok(u32::from(target.msix_vectors())),
        VFIO_PCI_ERR_IRQ_INDEX | VFIO_PCI_REQ_IRQ_INDEX => Ok(1),
        _ => Err(Errno::INVAL),
    }
}

/// DEVICE_GET_IRQ_INFO.
pub(crate) fn info(target: &dyn Target, payload: &[u8], outbox: &mut Outbox) -> Result<(), Errno> {
    let request: wire::IrqInfo = exactly(payload)?;
    check_argsz::<wire::IrqInfo>(request.argsz)?;
    let flags = match request.index {
        VFIO_PCI_INTX_IRQ_INDEX => {
            VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED
        }
        _ => VFIO_IRQ_INFO_EVENTFD,
    };
    outbox.push(&wire::IrqInfo {
        argsz: size_of::<wire::IrqInfo>() as u32,
        flags,
        index: request.index,
        count: count(target, request.index)?,
    });
    Ok(())
}

/// The eventfds that a client set, kept beside the function's own so that the client can fire them
/// (TRIGGER with DATA_NONE or DATA_BOOL).
#[derive(Debug, Default)]
pub(crate) struct Interrupts {
    intx: Vec<Option<File>>,
    msix: Vec<Option<File>>,
    error: Vec<Option<File>>,
    request: Vec<Option<File>>,
}

enum Data {
    /// All of the range.
    None,
    /// Those of the range that are true.
    Bool(Vec<bool>),
    /// One for each of the range, or none: they are taken away.
    EventFd(Vec<File>),
}

impl Interrupts {
    /// DEVICE_SET_IRQS.
    pub(crate) fn set(
        &mut self,
        target: &dyn Target,
        status: &Status,
        payload: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(), Errno> {
        let (request, rest): (wire::SetIrqs, _) = prefix(payload)?;
        let argsz = check_argsz::<wire::SetIrqs>(request.argsz)?;
        if argsz > payload.len() {
            return Err(Errno::INVAL);
        }
        let most = count(target, request.index)?;
        let end = request
            .start
            .checked_add(request.count)
            .ok_or(Errno::INVAL)?;
        if end > most {
            return Err(Errno::INVAL);
        }
        let known = VFIO_IRQ_SET_DATA_TYPE_MASK | VFIO_IRQ_SET_ACTION_TYPE_MASK;
        if request.flags & !known != 0 {
            return Err(Errno::INVAL);
        }
        let data = data(&request, rest, fds)?;
        let range = request.start..end;
        match request.flags & VFIO_IRQ_SET_ACTION_TYPE_MASK {
            VFIO_IRQ_SET_ACTION_TRIGGER => match data {
                Data::None if range.is_empty() => {
                    self.connect(target, status, request.index, 0..most, Vec::new())
                }
                Data::None => {
                    self.fire(request.index, range, &[]);
                    Ok(())
                }
                Data::Bool(which) => {
                    self.fire(request.index, range, &which);
                    Ok(())
                }
                Data::EventFd(files) => self.connect(target, status, request.index, range, files),
            },
            VFIO_IRQ_SET_ACTION_MASK => mask(target, request.index, &data, true),
            VFIO_IRQ_SET_ACTION_UNMASK => mask(target, request.index, &data, false),
            _ => Err(Errno::INVAL),
        }
    }

    fn triggers(&mut self, index: u32) -> &mut Vec<Option<File>> {
        match index {
            VFIO_PCI_INTX_IRQ_INDEX => &mut self.intx,
            VFIO_PCI_MSIX_IRQ_INDEX => &mut self.msix,
            VFIO_PCI_ERR_IRQ_INDEX => &mut self.error,
            _ => &mut self.request,
        }
    }

    /// Connects the interrupts of `range` to `files`; without files, disconnects them.
    fn connect(
        &mut self,
        target: &dyn Target,
        status: &Status,
        index: u32,
        range: Range<u32>,
        files: Vec<File>,
    ) -> Result<(), Errno> {
        let mut files = files.into_iter();
        for number in range {
            let file = files.next();
            let kept = file.as_ref().map(File::try_clone).transpose();
            let kept = kept.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            match index {
                VFIO_PCI_INTX_IRQ_INDEX => target.set_intx_trigger(file),
                VFIO_PCI_MSIX_IRQ_INDEX => {
                    let vector = u16::try_from(number).map_err(|_| Errno::INVAL)?;
                    target
                        .set_msix_trigger(vector, file)
                        .map_err(|_| Errno::INVAL)?;
                }
                VFIO_PCI_REQ_IRQ_INDEX => status.set_release_trigger(file),
                _ => {}
            }
            let slot = usize::try_from(number).map_err(|_| Errno::INVAL)?;
            let triggers = self.triggers(index);
            if triggers.len() <= slot {
                triggers.resize_with(slot.saturating_add(1), || None);
            }
            if let Some(trigger) = triggers.get_mut(slot) {
                *trigger = kept;
            }
        }
        Ok(())
    }

    /// Signals the eventfds of `range`, or those for which `which` is true.
    fn fire(&mut self, index: u32, range: Range<u32>, which: &[bool]) {
        let triggers = self.triggers(index);
        for (position, number) in range.enumerate() {
            if which.get(position) == Some(&false) {
                continue;
            }
            let file = usize::try_from(number)
                .ok()
                .and_then(|slot| triggers.get(slot));
            if let Some(Some(file)) = file {
                signal(file);
            }
        }
    }
}

/// Adds one to an eventfd. A full one has been signalled often enough.
pub(crate) fn signal(mut file: &File) {
    let _ = file.write(&1u64.to_ne_bytes());
}

/// Checks number and kind of what came with a request.
fn data(request: &wire::SetIrqs, rest: &[u8], fds: Vec<OwnedFd>) -> Result<Data, Errno> {
    let kind = request.flags & VFIO_IRQ_SET_DATA_TYPE_MASK;
    let action = request.flags & VFIO_IRQ_SET_ACTION_TYPE_MASK;
    let disable = kind == VFIO_IRQ_SET_DATA_NONE && action == VFIO_IRQ_SET_ACTION_TRIGGER;
    let wanted = usize::try_from(request.count).map_err(|_| Errno::INVAL)?;
    if wanted == 0 && !disable {
        return Err(Errno::INVAL);
    }
    match kind {
        VFIO_IRQ_SET_DATA_NONE if fds.is_empty() => Ok(Data::None),
        VFIO_IRQ_SET_DATA_BOOL if fds.is_empty() && rest.len() == wanted => {
            Ok(Data::Bool(rest.iter().map(|byte| *byte != 0).collect()))
        }
        VFIO_IRQ_SET_DATA_EVENTFD if fds.is_empty() || fds.len() == wanted => {
            let mut files = Vec::with_capacity(fds.len());
            for fd in fds {
                // A client that does not read its eventfd must not stop a device.
                let flags = rustix::fs::fcntl_getfl(&fd)?;
                rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
                files.push(File::from(fd));
            }
            Ok(Data::EventFd(files))
        }
        _ => Err(Errno::INVAL),
    }
}

/// Only INTx can be masked this way: MSI-X is masked in its table, as in Linux' vfio-pci.
fn mask(target: &dyn Target, index: u32, data: &Data, masked: bool) -> Result<(), Errno> {
    if index != VFIO_PCI_INTX_IRQ_INDEX {
        return Err(Errno::OPNOTSUPP);
    }
    match data {
        Data::None => target.mask_intx(masked),
        Data::Bool(which) if which.first() == Some(&true) => target.mask_intx(masked),
        Data::Bool(_) => {}
        // The client takes its (never accepted) unmask eventfd away.
        Data::EventFd(files) if files.is_empty() => {}
        // A second way to unmask, for KVM's irqfd; QEMU falls back to messages without it.
        Data::EventFd(_) => return Err(Errno::OPNOTSUPP),
    }
    Ok(())
}
