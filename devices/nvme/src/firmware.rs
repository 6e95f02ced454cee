//! Firmware images, slots, and which revision runs (Base 3.11).
//!
//! What runs is this program whatever a host downloads, but the host's side of an update is real: an image of
//! pieces in any order, slots, activation at once or at the next reset, and Identify's FR that tells.
//!
//! An image is a multiple of 4 KiB, at most 4 MiB, of any content behind these first 24 bytes:
//!
//! | bytes | what |
//! |---|---|
//! | 0 to 7 | `p2plabFW` |
//! | 8 to 15 | its revision, printable ASCII with spaces at the end |
//! | 16 to 19 | length of the image in bytes, little endian |
//! | 20 | bit 0: cannot be activated without a Controller Level Reset |
//! | 21 to 23 | 0 |
//!
//! In a shell: `{ printf 'p2plabFW2.0     \0\020\0\0\0\0\0\0'; head -c 4072 /dev/zero; } > image`.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use zerocopy::{FromZeros, IntoBytes};

use crate::events::Event;
use crate::spec::log::FirmwareSlot;
use crate::spec::status::Status;

/// A firmware revision, as Identify and the Firmware Slot page show it.
pub(crate) type Revision = [u8; 8];

/// What runs in a controller that nobody has updated.
const FACTORY_REVISION: Revision = *b"1.0     ";

/// Slots, counted from 1. The first holds the factory's image and is read-only.
const SLOTS: usize = 3;
const READ_ONLY_SLOT: usize = 1;

/// Firmware Updates (FRMW): slot 1 is read-only, the number of slots, activation without a reset.
pub(crate) const FRMW: u8 = 1 | (SLOTS as u8) << 1 | 1 << 4;
/// Firmware Update Granularity (FWUG) in units of 4 KiB.
pub(crate) const FWUG: u8 = 1;
const GRANULARITY: u64 = FWUG as u64 * 4096;
/// Maximum Time for Firmware Activation (MTFA) in units of 100 ms.
pub(crate) const MTFA: u16 = 1;

const LARGEST_IMAGE: u64 = 4 << 20;

/// An image in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Image {
    revision: Revision,
    needs_reset: bool,
}

impl Image {
    fn parse(data: &[u8]) -> Result<Self, Status> {
        let rest = data.strip_prefix(b"p2plabFW");
        let rest = rest.ok_or(Status::INVALID_FIRMWARE_IMAGE)?;
        let Some((revision, rest)) = rest.split_first_chunk::<8>() else {
            return Err(Status::INVALID_FIRMWARE_IMAGE);
        };
        let Some((length, [flags, 0, 0, 0, ..])) = rest.split_first_chunk::<4>() else {
            return Err(Status::INVALID_FIRMWARE_IMAGE);
        };
        let printable = revision.iter().all(|byte| (b' '..=b'~').contains(byte));
        let named = printable && !revision.starts_with(b" ");
        let whole = u64::from(u32::from_le_bytes(*length)) == data.len() as u64;
        if !named || !whole || flags & !1 != 0 {
            return Err(Status::INVALID_FIRMWARE_IMAGE);
        }
        Ok(Self {
            revision: *revision,
            needs_reset: flags & 1 != 0,
        })
    }
}

/// The pieces of an image, as they come.
#[derive(Debug, Default)]
struct Download {
    data: Vec<u8>,
    /// Ends by starts, with no two that touch.
    pieces: BTreeMap<u64, u64>,
}

impl Download {
    fn add(&mut self, start: u64, piece: &[u8]) -> Result<(), Status> {
        let end = start + piece.len() as u64;
        let before = self.pieces.range(..end).next_back();
        if before.is_some_and(|(_, other_end)| *other_end > start) {
            return Err(Status::OVERLAPPING_RANGE);
        }
        let (from, to) = (start as usize, end as usize);
        if self.data.len() < to {
            self.data.resize(to, 0);
        }
        let place = self.data.get_mut(from..to);
        place.ok_or(Status::INTERNAL_ERROR)?.copy_from_slice(piece);
        // Joined with its neighbours, so that the list is short for a host that sends them in order.
        let end = self.pieces.remove(&end).unwrap_or(end);
        let before = self.pieces.range_mut(..start).next_back();
        match before.filter(|(_, other_end)| **other_end == start) {
            Some((_, other_end)) => *other_end = end,
            None => {
                self.pieces.insert(start, end);
            }
        }
        Ok(())
    }

    /// The image, if it has no gaps.
    fn whole(&self) -> Result<&[u8], Status> {
        let all = self.data.len() as u64;
        if self.pieces.len() == 1 && self.pieces.get(&0) == Some(&all) {
            Ok(&self.data)
        } else {
            Err(Status::INVALID_FIRMWARE_IMAGE)
        }
    }
}

/// The controller's firmware.
#[derive(Debug)]
pub(crate) struct Firmware {
    slots: [Option<Image>; SLOTS],
    /// Slot and revision of what runs. The slot's image may have been replaced since.
    active: usize,
    running: Revision,
    /// Slot to be activated at the next reset.
    pending: Option<usize>,
    download: Download,
}

/// Commit Action.
mod action {
    pub(super) const REPLACE: u8 = 0;
    pub(super) const REPLACE_AND_ACTIVATE_AT_RESET: u8 = 1;
    pub(super) const ACTIVATE_AT_RESET: u8 = 2;
    pub(super) const ACTIVATE_NOW: u8 = 3;
}

impl Firmware {
    pub(crate) fn new() -> Self {
        let factory = Image {
            revision: FACTORY_REVISION,
            needs_reset: false,
        };
        Self {
            slots: [Some(factory), None, None],
            active: 1,
            running: FACTORY_REVISION,
            pending: None,
            download: Download::default(),
        }
    }

    /// What runs.
    pub(crate) fn revision(&self) -> Revision {
        self.running
    }

    /// A committed image waits for a reset.
    pub(crate) fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Whether a piece of `length` bytes at `offset` is one that [`download`](Self::download) takes.
    pub(crate) fn check_piece(offset: u64, length: u64) -> Result<(), Status> {
        let end = offset.checked_add(length);
        let fits = end.is_some_and(|end| end <= LARGEST_IMAGE);
        if !fits || !offset.is_multiple_of(GRANULARITY) || !length.is_multiple_of(GRANULARITY) {
            return Err(Status::INVALID_FIELD);
        }
        Ok(())
    }

    /// A piece of an image. One at offset 0 that is there already begins a new image.
    pub(crate) fn download(&mut self, offset: u64, piece: &[u8]) -> Result<(), Status> {
        Self::check_piece(offset, piece.len() as u64)?;
        if offset == 0 && self.download.pieces.contains_key(&0) {
            self.download = Download::default();
        }
        self.download.add(offset, piece)
    }

    /// Firmware Commit. An event, if the host is to hear of it, comes with the success.
    pub(crate) fn commit(&mut self, slot: u8, commit_action: u8) -> Result<Option<Event>, Status> {
        let slot = usize::from(slot);
        if commit_action > action::ACTIVATE_NOW {
            return Err(Status::INVALID_FIELD);
        }
        if slot > SLOTS {
            return Err(Status::INVALID_FIRMWARE_SLOT);
        }
        let downloaded = !self.download.data.is_empty();
        let replaces = match commit_action {
            action::ACTIVATE_AT_RESET => false,
            action::ACTIVATE_NOW => downloaded,
            _ => true,
        };
        let slot = if replaces { self.replace(slot)? } else { slot };
        let image = slot.checked_sub(1).and_then(|index| self.slots.get(index));
        let image = *image.ok_or(Status::INVALID_FIRMWARE_SLOT)?;
        let image = image.ok_or(Status::INVALID_FIRMWARE_IMAGE)?;
        match commit_action {
            action::REPLACE => {}
            action::REPLACE_AND_ACTIVATE_AT_RESET | action::ACTIVATE_AT_RESET => {
                self.pending = Some(slot);
            }
            _ if image.needs_reset => {
                self.pending = Some(slot);
                return Err(Status::FIRMWARE_NEEDS_RESET);
            }
            _ => {
                (self.active, self.running, self.pending) = (slot, image.revision, None);
                return Ok(Some(Event::FIRMWARE_ACTIVATION));
            }
        }
        Ok(None)
    }

    /// Puts the downloaded image into `slot`, or with 0 into one of the controller's choice: which one.
    fn replace(&mut self, slot: usize) -> Result<usize, Status> {
        let slot = match slot {
            0 => self.slot_to_spare(),
            READ_ONLY_SLOT => return Err(Status::INVALID_FIRMWARE_SLOT),
            slot => slot,
        };
        // Good or bad, it is used up: the next image begins from nothing.
        let download = std::mem::take(&mut self.download);
        let image = Image::parse(download.whole()?)?;
        let place = slot
            .checked_sub(1)
            .and_then(|index| self.slots.get_mut(index));
        *place.ok_or(Status::INVALID_FIRMWARE_SLOT)? = Some(image);
        Ok(slot)
    }

    /// An empty slot, or one whose image does not run.
    fn slot_to_spare(&self) -> usize {
        let writable = || READ_ONLY_SLOT + 1..=SLOTS;
        let is_empty = |slot: &usize| self.slots.get(*slot - 1) == Some(&None);
        let empty = writable().find(is_empty);
        let idle = || writable().find(|slot| *slot != self.active);
        empty.or_else(idle).unwrap_or(SLOTS)
    }

    /// A Controller Level Reset: what was committed for it runs; what was half downloaded is gone.
    pub(crate) fn reset(&mut self) {
        self.download = Download::default();
        let Some(slot) = self.pending.take() else {
            return;
        };
        let image = slot.checked_sub(1).and_then(|index| self.slots.get(index));
        if let Some(Some(image)) = image {
            (self.active, self.running) = (slot, image.revision);
        }
    }

    /// Firmware Slot Information (Base 5.16.1.4).
    pub(crate) fn page(&self) -> Vec<u8> {
        let mut page = FirmwareSlot::new_zeroed();
        page.afi = ((self.pending.unwrap_or(0) as u8) << 4) | self.active as u8;
        for (field, slot) in page.revisions.iter_mut().zip(&self.slots) {
            *field = slot.map_or([0; 8], |image| image.revision);
        }
        page.as_bytes().to_vec()
    }

    pub(crate) fn dump(&self) -> Value {
        let text = |revision: &Revision| String::from_utf8_lossy(revision).trim().to_owned();
        let slots = self.slots.iter().flatten();
        json!({
            "running": text(&self.running),
            "active_slot": self.active,
            "pending_slot": self.pending,
            "images": slots.map(|image| text(&image.revision)).collect::<Vec<_>>(),
            "downloaded": self.download.data.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image(revision: &[u8; 8], flags: u8, length: usize) -> Vec<u8> {
        let mut image = b"p2plabFW".to_vec();
        image.extend(revision);
        image.extend((length as u32).to_le_bytes());
        image.extend([flags, 0, 0, 0]);
        image.resize(length, 0x5a);
        image
    }

    /// What the command in this file's head makes.
    #[test]
    fn an_image_from_a_shell() {
        let script = "printf 'p2plabFW2.0     \\0\\020\\0\\0\\0\\0\\0\\0'; head -c 4072 /dev/zero";
        let made = std::process::Command::new("sh")
            .args(["-c", script])
            .output();
        let image = Image::parse(&made.unwrap().stdout);
        assert_eq!(image.map(|image| image.revision), Ok(*b"2.0     "));
    }

    #[test]
    fn only_images_are_images() {
        let good = image(b"2.0     ", 1, 4096);
        assert_eq!(
            Image::parse(&good),
            Ok(Image {
                revision: *b"2.0     ",
                needs_reset: true
            })
        );
        let bad = |change: fn(&mut Vec<u8>)| {
            let mut image = good.clone();
            change(&mut image);
            Image::parse(&image)
        };
        for change in [
            |i: &mut Vec<u8>| i[0] = b'P',
            |i: &mut Vec<u8>| i[8] = b' ',
            |i: &mut Vec<u8>| i[10] = 0x7f,
            |i: &mut Vec<u8>| i.truncate(4095),
            |i: &mut Vec<u8>| i.truncate(19),
            |i: &mut Vec<u8>| i[20] = 2,
            |i: &mut Vec<u8>| i[23] = 1,
            |i: &mut Vec<u8>| i.clear(),
        ] {
            assert_eq!(bad(change), Err(Status::INVALID_FIRMWARE_IMAGE));
        }
    }

    #[test]
    fn a_host_that_leaves_the_slot_to_the_controller_keeps_what_runs() {
        let mut firmware = Firmware::new();
        for (revision, slot) in [(b"a       ", 2), (b"b       ", 3), (b"c       ", 2)] {
            firmware.download(0, &image(revision, 0, 4096)).unwrap();
            firmware.commit(0, action::ACTIVATE_NOW).unwrap();
            assert_eq!((firmware.active, firmware.revision()), (slot, *revision));
        }
    }

    #[test]
    fn a_replaced_image_still_runs() {
        let mut firmware = Firmware::new();
        firmware.download(0, &image(b"a       ", 0, 4096)).unwrap();
        firmware.commit(2, action::ACTIVATE_NOW).unwrap();
        firmware.download(0, &image(b"b       ", 0, 4096)).unwrap();
        firmware.commit(2, action::REPLACE).unwrap();
        assert_eq!(firmware.revision(), *b"a       ");
        assert_eq!(firmware.page()[16..24], *b"b       ");
    }

    proptest! {
        /// Pieces in any order make the image; one that is missing or comes twice does not.
        #[test]
        fn pieces_in_any_order(order in Just((0..8u64).collect::<Vec<_>>()).prop_shuffle(), missing in 0..8u64) {
            let whole = image(b"2.0     ", 0, 8 * 4096);
            let mut download = Download::default();
            for at in &order {
                prop_assert_ne!(download.whole(), Ok(&whole[..]));
                let start = *at as usize * 4096;
                let piece = &whole[start..start + 4096];
                download.add(at * 4096, piece).unwrap();
                prop_assert_eq!(download.add(at * 4096, piece), Err(Status::OVERLAPPING_RANGE));
            }
            prop_assert_eq!(download.whole(), Ok(&whole[..]));
            let mut with_gap = Download::default();
            for at in order.iter().filter(|at| **at != missing) {
                with_gap.add(at * 4096, &whole[..4096]).unwrap();
            }
            prop_assert_eq!(with_gap.whole().is_ok(), missing == 7);
        }

        #[test]
        fn any_piece_is_taken_or_refused(offset in any::<u64>(), length in any::<u64>()) {
            if Firmware::check_piece(offset, length).is_ok() {
                prop_assert!(offset + length <= LARGEST_IMAGE);
            }
        }
    }
}
