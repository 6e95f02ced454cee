//! A controller's memory accesses: through its port, or, for addresses in its own CMB, inside it.

use std::io;
use std::sync::Arc;

use p2plab_pcie::{DmaBuffers, DmaError, DmaRange, Port};

use crate::cmb::{Cmb, Place};
use crate::spec::command::{Command, PSDT_SGL};
use crate::spec::status::Status;
use crate::transfer::{Run, Transfer};
use crate::{prp, sgl};

/// Which way a command's data goes, seen from the host (Base 3.1: opcodes' bits 1:0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the host or peer to the controller.
    ToController,
    /// From the controller to the host or peer.
    FromController,
}

/// Access to memory at bus addresses.
#[derive(Clone)]
pub(crate) struct Dma {
    pub(crate) port: Port,
    pub(crate) cmb: Option<Arc<Cmb>>,
}

impl Dma {
    pub(crate) fn place(&self, range: DmaRange) -> Place {
        self.cmb.as_ref().map_or(Place::Bus, |cmb| cmb.place(range))
    }

    /// Reads a queue entry, a PRP list or an SGL segment.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        match (
            self.place(DmaRange {
                address,
                length: data.len() as u64,
            }),
            &self.cmb,
        ) {
            (Place::Cmb(offset), Some(cmb)) if cmb.memory.read(offset, data) => Ok(()),
            (Place::Bus, _) => self.port.read(address, data),
            _ => Err(DmaError::UnsupportedRequest { address }),
        }
    }

    /// Writes a queue entry.
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        match (
            self.place(DmaRange {
                address,
                length: data.len() as u64,
            }),
            &self.cmb,
        ) {
            (Place::Cmb(offset), Some(cmb)) if cmb.memory.write(offset, data) => Ok(()),
            (Place::Bus, _) => self.port.write(address, data),
            _ => Err(DmaError::UnsupportedRequest { address }),
        }
    }

    /// Moves `length` bytes of `command`'s data: finds where they lie and lets `mover` do it, in place, for each
    /// run of the data, whose offset in the data it is told. `transfer` says afterwards what was touched.
    pub(crate) fn data(
        &self,
        command: &Command,
        length: u64,
        direction: Direction,
        transfer: &mut Transfer,
        mut mover: impl FnMut(&DmaBuffers<'_>, u64) -> io::Result<()>,
    ) -> Result<(), Status> {
        let fetch = |address, data: &mut [u8]| {
            self.read(address, data)
                .map_err(|_| Status::DATA_TRANSFER_ERROR)
        };
        if command.flags == PSDT_SGL {
            sgl::walk(command.sgl1(), length, direction, transfer, fetch)?;
        } else {
            let (prp1, prp2) = (command.prp1.get(), command.prp2.get());
            prp::walk(prp1, prp2, length, transfer, fetch)?;
        }
        let inside = self.inside(transfer)?;
        for run in transfer.runs() {
            self.run(run, transfer, inside.as_deref(), direction, &mut mover)?;
        }
        Ok(())
    }

    /// Moves one run. `inside` are the offsets of all ranges in the CMB, if they are there.
    fn run(
        &self,
        run: Run,
        transfer: &Transfer,
        inside: Option<&[(u64, u64)]>,
        direction: Direction,
        mover: &mut impl FnMut(&DmaBuffers<'_>, u64) -> io::Result<()>,
    ) -> Result<(), Status> {
        let mut mover = |memory: &DmaBuffers<'_>| mover(memory, run.at);
        let moved = match inside {
            Some(offsets) => {
                let offsets = offsets.get(run.first..run.end);
                let cmb = self.cmb.as_ref();
                let buffers = offsets.and_then(|offsets| cmb?.memory.buffers(offsets));
                mover(&buffers.ok_or(Status::INVALID_USE_OF_CMB)?).map_err(DmaError::Medium)
            }
            None => {
                let ranges = transfer.ranges.get(run.first..run.end);
                let ranges = ranges.ok_or(Status::INTERNAL_ERROR)?;
                match direction {
                    Direction::ToController => self.port.read_ranges(ranges, mover),
                    Direction::FromController => self.port.write_ranges(ranges, mover),
                }
            }
        };
        moved.map_err(|error| failure(error, direction))
    }

    /// Moves `length` bytes of `command`'s metadata, after its data: they lie in a contiguous buffer (PSDT 00b and
    /// 01b).
    pub(crate) fn metadata(
        &self,
        command: &Command,
        length: u64,
        direction: Direction,
        transfer: &mut Transfer,
        mover: impl FnOnce(&DmaBuffers<'_>) -> io::Result<()>,
    ) -> Result<(), Status> {
        let address = command.mptr.get();
        // Beside an SGL it may start anywhere (SGLS bit 17).
        if command.flags != PSDT_SGL && !address.is_multiple_of(4) {
            return Err(Status::INVALID_FIELD);
        }
        address
            .checked_add(length)
            .ok_or(Status::DATA_TRANSFER_ERROR)?;
        let range = DmaRange { address, length };
        let place = self.place(range);
        // Data and metadata lie both inside or both outside (CMBLOC.CDMMMS = 0).
        let data = transfer.ranges.first().map(|data| self.place(*data));
        if data.is_some_and(|data| matches!(data, Place::Bus) != matches!(place, Place::Bus)) {
            return Err(Status::INVALID_USE_OF_CMB);
        }
        transfer.metadata = Some(range);
        let moved = match (place, &self.cmb) {
            (Place::Cmb(offset), Some(cmb)) => {
                let buffers = cmb.memory.buffers(&[(offset, length)]);
                mover(&buffers.ok_or(Status::INVALID_USE_OF_CMB)?).map_err(DmaError::Medium)
            }
            (Place::Bus, _) => match direction {
                Direction::ToController => self.port.read_ranges(&[range], mover),
                Direction::FromController => self.port.write_ranges(&[range], mover),
            },
            _ => return Err(Status::INVALID_USE_OF_CMB),
        };
        moved.map_err(|error| failure(error, direction))
    }

    /// Offsets in the CMB if all of the transfer is in it, `None` if nothing is.
    fn inside(&self, transfer: &Transfer) -> Result<Option<Vec<(u64, u64)>>, Status> {
        if self.cmb.as_ref().is_none_or(|cmb| cmb.window().is_none()) {
            return Ok(None);
        }
        let mut offsets = Vec::new();
        for range in &transfer.ranges {
            match self.place(*range) {
                Place::Bus => {}
                Place::Cmb(offset) => offsets.push((offset, range.length)),
                Place::Straddles => return Err(Status::INVALID_USE_OF_CMB),
            }
        }
        match offsets.len() {
            0 => Ok(None),
            all if all == transfer.ranges.len() => Ok(Some(offsets)),
            _ => Err(Status::INVALID_USE_OF_CMB),
        }
    }
}

/// The status of a command whose data did not move.
fn failure(error: DmaError, direction: Direction) -> Status {
    match error {
        DmaError::Medium(error) => {
            tracing::warn!(%error, "the namespace's file failed");
            match direction {
                Direction::ToController => Status::WRITE_FAULT,
                Direction::FromController => Status::UNRECOVERED_READ_ERROR,
            }
        }
        error => {
            tracing::debug!(%error, "data transfer");
            Status::DATA_TRANSFER_ERROR
        }
    }
}
