//! Scatter Gather Lists: from a command's descriptor to the ranges of memory that hold its data (Base 4.1.2).
//!
//! What is taken is what Identify announces (SGLS, [`SUPPORT`]): data blocks of any alignment, bit buckets,
//! segments and last segments, all with sub type 0, and exactly as much data as the command moves.
//!
//! A host can make a list as long as it likes, also one that runs in circles: the walk ends after
//! [`MAX_SEGMENTS`] segments or [`MAX_DESCRIPTORS`] descriptors. Each segment is one read of exactly its length,
//! so that the traffic of a command can be computed from the command.

use p2plab_pcie::DmaRange;
use zerocopy::{FromZeros, IntoBytes};

use crate::dma::Direction;
use crate::spec::sgl::{SglDescriptor, kind};
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// Identify Controller SGLS: data blocks need no alignment (bits 1:0 = 1); bit buckets (bit 16). Neither lists
/// longer than the data (bit 18) nor metadata lists (bit 19) nor offsets (bit 20).
pub(crate) const SUPPORT: u32 = 1 | 1 << 16;

/// Segments that a command may have. Linux makes at most one.
const MAX_SEGMENTS: usize = 256;

/// Descriptors that a command may have in its segments. Linux makes at most 256.
const MAX_DESCRIPTORS: usize = 8192;

const DESCRIPTOR: usize = size_of::<SglDescriptor>();

/// Walks the SGL that starts with `inline`, the command's own descriptor, for a transfer of `length` bytes, and
/// adds to `transfer` what it finds. `fetch` reads memory.
pub(crate) fn walk(
    inline: SglDescriptor,
    length: u64,
    direction: Direction,
    transfer: &mut Transfer,
    mut fetch: impl FnMut(u64, &mut [u8]) -> Result<(), Status>,
) -> Result<(), Status> {
    transfer.clear();
    let mut left = length;
    let mut budget = MAX_DESCRIPTORS;
    let mut segment = Some(inline);
    while let Some(here) = segment.take() {
        let is_last = match here.identifier {
            kind::SEGMENT => false,
            kind::LAST_SEGMENT => true,
            // Only a command's own descriptor comes here with another type: it is the whole list.
            _ => {
                data(here, &mut left, direction, transfer)?;
                break;
            }
        };
        let mut descriptors = std::mem::take(&mut transfer.segment);
        let next = read_segment(here, &mut budget, transfer, &mut descriptors, &mut fetch)
            .and_then(|()| take_segment(&descriptors, is_last, &mut left, direction, transfer));
        transfer.segment = descriptors;
        segment = next?;
    }
    if left == 0 {
        Ok(())
    } else {
        Err(Status::DATA_SGL_LENGTH_INVALID)
    }
}

/// Reads the segment that `here` describes.
fn read_segment(
    here: SglDescriptor,
    budget: &mut usize,
    transfer: &mut Transfer,
    descriptors: &mut Vec<SglDescriptor>,
    fetch: &mut impl FnMut(u64, &mut [u8]) -> Result<(), Status>,
) -> Result<(), Status> {
    let (address, length) = (here.address.get(), here.length.get() as usize);
    // A segment is an array of descriptors, and qword aligned.
    if length == 0 || !length.is_multiple_of(DESCRIPTOR) || !address.is_multiple_of(8) {
        return Err(Status::INVALID_SGL_SEGMENT_DESCRIPTOR);
    }
    let count = length / DESCRIPTOR;
    *budget = budget
        .checked_sub(count)
        .filter(|_| transfer.lists.len() < MAX_SEGMENTS)
        .ok_or(Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS)?;
    let range = DmaRange {
        address,
        length: length as u64,
    };
    address
        .checked_add(range.length)
        .ok_or(Status::DATA_TRANSFER_ERROR)?;
    transfer.lists.push(range);
    descriptors.clear();
    descriptors.resize(count, SglDescriptor::new_zeroed());
    fetch(address, descriptors.as_mut_bytes())
}

/// Takes the descriptors of a segment; returns the descriptor of the next one.
fn take_segment(
    descriptors: &[SglDescriptor],
    is_last: bool,
    left: &mut u64,
    direction: Direction,
    transfer: &mut Transfer,
) -> Result<Option<SglDescriptor>, Status> {
    let is_segment = |d: &SglDescriptor| matches!(d.identifier, kind::SEGMENT | kind::LAST_SEGMENT);
    let (tail, body) = descriptors.split_last().ok_or(Status::INTERNAL_ERROR)?;
    for descriptor in body {
        if is_segment(descriptor) {
            return Err(Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS);
        }
        data(*descriptor, left, direction, transfer)?;
    }
    match (is_segment(tail), is_last) {
        (true, false) => Ok(Some(*tail)),
        (false, true) => data(*tail, left, direction, transfer).map(|()| None),
        // A last segment has no successor, and any other has one.
        _ => Err(Status::INVALID_SGL_SEGMENT_DESCRIPTOR),
    }
}

/// Takes a data block or bit bucket off the `left` bytes to describe.
fn data(
    descriptor: SglDescriptor,
    left: &mut u64,
    direction: Direction,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let length = u64::from(descriptor.length.get());
    let is_bucket = match descriptor.identifier {
        kind::DATA_BLOCK => false,
        kind::BIT_BUCKET => true,
        _ => return Err(Status::SGL_DESCRIPTOR_TYPE_INVALID),
    };
    // Data on its way to the controller has nothing to drop: there a bucket has no effect.
    if length == 0 || is_bucket && direction == Direction::ToController {
        return Ok(());
    }
    *left = left
        .checked_sub(length)
        .ok_or(Status::DATA_SGL_LENGTH_INVALID)?;
    if is_bucket {
        transfer.skip(length);
        Ok(())
    } else {
        transfer.push(descriptor.address.get(), length)
    }
}

#[cfg(test)]
mod tests;
