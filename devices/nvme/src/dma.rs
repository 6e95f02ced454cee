//! A controller's memory accesses: through its port, or, for addresses in its own CMB or PMR, inside it.

use std::io;
use std::sync::{Arc, RwLockReadGuard};

use p2plab_pcie::{BarMemory, DmaBuffers, DmaError, DmaRange, Mistakes, Port};

use crate::cmb::{Cmb, allowed};
use crate::pmr::Pmr;
use crate::queue::SubmissionQueue;
use crate::spec::command::{Command, PSDT_SGL};
use crate::spec::status::Status;
use crate::transfer::{Run, Transfer};
use crate::window::Place;
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
    pub(crate) pmr: Option<Arc<Pmr>>,
    /// The commands come from a queue in the CMB.
    pub(crate) commands_inside: bool,
    pub(crate) mistakes: Arc<Mistakes>,
}

/// A transfer in the controller's own memory.
struct Inside<'a> {
    memory: &'a BarMemory,
    /// Offset and length of each range.
    offsets: Vec<(u64, u64)>,
    /// The PMR does not settle while it is in use.
    _use: Option<RwLockReadGuard<'a, ()>>,
}

impl Dma {
    /// For the commands of `sq`.
    pub(crate) fn of_queue(&self, sq: &SubmissionQueue) -> Self {
        let commands_inside = self.place(sq.next_entry()).is_inside();
        Self {
            commands_inside,
            ..self.clone()
        }
    }

    pub(crate) fn place(&self, range: DmaRange) -> Place {
        let cmb = self.cmb.as_ref();
        match cmb.map_or(Place::Bus, |cmb| cmb.place(range, &self.port)) {
            Place::Bus => self.pmr.as_ref().map_or(Place::Bus, |pmr| pmr.place(range)),
            place => place,
        }
    }

    /// Reads a queue entry, a PRP list or an SGL segment. None of them may lie in the PMR.
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

    /// Writes a queue entry: its end, with the phase tag, becomes visible last.
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        let length = data.len() as u64;
        match (self.place(DmaRange { address, length }), &self.cmb) {
            (Place::Cmb(offset), Some(cmb)) => {
                let buffers = cmb.memory.buffers(&[(offset, length)]);
                let buffers = buffers.ok_or(DmaError::UnsupportedRequest { address })?;
                Ok(buffers.fill_from_slice(data)?)
            }
            (Place::Bus, _) => self.port.write(address, data),
            _ => Err(DmaError::UnsupportedRequest { address }),
        }
    }

    /// Whether a queue may lie there: outside, or, where `in_cmb` says so, in the CMB.
    pub(crate) fn check_queue(&self, memory: DmaRange, in_cmb: bool) -> Result<(), Status> {
        allowed(match self.place(memory) {
            Place::Bus => true,
            Place::Cmb(_) => in_cmb,
            Place::Pmr(_) | Place::Straddles => false,
        })
    }

    fn read_list(&self, address: u64, data: &mut [u8]) -> Result<(), Status> {
        let length = data.len() as u64;
        match (self.place(DmaRange { address, length }), &self.cmb) {
            (Place::Cmb(_), Some(cmb)) => cmb.check_list(self.commands_inside)?,
            (Place::Pmr(_), _) => return Err(Status::INVALID_USE_OF_CMB),
            // What crosses an end of the CMB is decoded by nobody as a whole.
            _ => {}
        }
        self.read(address, data)
            .map_err(|_| Status::DATA_TRANSFER_ERROR)
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
        let fetch = |address, data: &mut [u8]| self.read_list(address, data);
        if command.flags == PSDT_SGL {
            sgl::walk(command.sgl1(), length, direction, transfer, fetch)?;
        } else {
            let (prp1, prp2) = (command.prp1.get(), command.prp2.get());
            prp::walk(prp1, prp2, length, transfer, fetch)?;
        }
        self.check_lists(transfer)?;
        let inside = self.inside(transfer, direction)?;
        for run in transfer.runs() {
            self.run(run, transfer, inside.as_ref(), direction, &mut mover)?;
        }
        Ok(())
    }

    /// Moves one run. `inside` has all ranges, if they are in the controller's own memory.
    fn run(
        &self,
        run: Run,
        transfer: &Transfer,
        inside: Option<&Inside<'_>>,
        direction: Direction,
        mover: &mut impl FnMut(&DmaBuffers<'_>, u64) -> io::Result<()>,
    ) -> Result<(), Status> {
        let mut mover = |memory: &DmaBuffers<'_>| mover(memory, run.at);
        let moved = match inside {
            Some(Inside {
                memory, offsets, ..
            }) => {
                let offsets = offsets.get(run.first..run.end);
                // None, too, where the PMR is not ready.
                let buffers = offsets.and_then(|offsets| memory.buffers(offsets));
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
        moved.map_err(|error| self.failure(error, direction))
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
        moved.map_err(|error| self.failure(error, direction))
    }

    /// Refuses lists that are partly in the CMB, where CDPMLS forbids them.
    fn check_lists(&self, transfer: &Transfer) -> Result<(), Status> {
        match &self.cmb {
            Some(cmb) if transfer.lists.len() > 1 && cmb.check_mixed_lists().is_err() => {
                let inside = |list: &&DmaRange| self.place(**list).is_inside();
                let count = transfer.lists.iter().filter(inside).count();
                allowed(count == 0 || count == transfer.lists.len())
            }
            _ => Ok(()),
        }
    }

    /// The ranges in the CMB or PMR if all of the transfer is in it, `None` if nothing is (CMBLOC.CDMMMS is clear).
    fn inside(
        &self,
        transfer: &Transfer,
        direction: Direction,
    ) -> Result<Option<Inside<'_>>, Status> {
        let first = transfer.ranges.first().map(|range| self.place(*range));
        let (mut inside, rds, wds) = match (first, &self.cmb, &self.pmr) {
            (Some(Place::Cmb(_)), Some(cmb), _) => {
                let (memory, offsets) = (&*cmb.memory, Vec::new());
                let inside = Inside {
                    memory,
                    offsets,
                    _use: None,
                };
                (inside, cmb.config.rds, cmb.config.wds)
            }
            (Some(Place::Pmr(_)), _, Some(pmr)) => {
                let (memory, offsets) = (&*pmr.memory, Vec::new());
                let inside = Inside {
                    memory,
                    offsets,
                    _use: Some(pmr.enter()),
                };
                (inside, pmr.config.rds, pmr.config.wds)
            }
            _ => {
                let bus = |range: &DmaRange| self.place(*range) == Place::Bus;
                let none = self.cmb.is_none() && self.pmr.is_none();
                allowed(none || transfer.ranges.iter().all(bus))?;
                return Ok(None);
            }
        };
        allowed(match direction {
            Direction::FromController => rds,
            Direction::ToController => wds,
        })?;
        for range in &transfer.ranges {
            match (self.place(*range), first) {
                (Place::Cmb(offset), Some(Place::Cmb(_)))
                | (Place::Pmr(offset), Some(Place::Pmr(_))) => {
                    inside.offsets.push((offset, range.length));
                }
                _ => return Err(Status::INVALID_USE_OF_CMB),
            }
        }
        Ok(Some(inside))
    }

    /// The status of a command whose data did not move.
    fn failure(&self, error: DmaError, direction: Direction) -> Status {
        match error {
            DmaError::Medium(error) => {
                if self.mistakes.is_worth_a_line() {
                    tracing::warn!(%error, "the namespace's file failed");
                }
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
}
