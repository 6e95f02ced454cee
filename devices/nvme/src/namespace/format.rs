//! LBA formats (NVM 4.1.5.1): what a block is made of.

use crate::config::{Metadata, NamespaceConfig};
use crate::spec::command::FormatCdw10;
use crate::spec::status::Status;

/// Bytes of metadata of the formats that have it: room for protection information and nothing else.
pub(crate) const METADATA: u64 = 8;

/// The formats that a namespace can have, as Identify lists them: block size as a power of two, and whether there
/// is metadata.
pub(crate) const FORMATS: [(u8, bool); 4] = [(9, false), (12, false), (9, true), (12, true)];

/// A namespace's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    /// Index in [`FORMATS`].
    pub(crate) index: u8,
    /// The metadata is protection information, of type 1.
    pub(crate) protected: bool,
    /// PIP or PIL: the host calls it the first, not the last bytes of the metadata. They are all of it.
    pub(crate) first: bool,
}

impl Format {
    /// The format that a configuration asks for, if its block size is one that there is.
    pub(crate) fn configured(config: &NamespaceConfig) -> Option<Self> {
        let metadata = config.metadata != Metadata::None;
        let is_wanted =
            |(shift, with): &(u8, bool)| 1u32 << shift == config.block_size && *with == metadata;
        let index = FORMATS.iter().position(is_wanted)?;
        Some(Self {
            index: u8::try_from(index).ok()?,
            protected: config.metadata == Metadata::Protection,
            first: false,
        })
    }

    /// The format that a host asks for with Format NVM.
    pub(crate) fn of_format(cdw10: FormatCdw10) -> Result<Self, Status> {
        let index = cdw10.lbafl() | cdw10.lbafu() << 4;
        // Metadata lies in a buffer of its own (Identify Namespace MC).
        if cdw10.mset() {
            return Err(Status::INVALID_FORMAT);
        }
        Self::new(index, cdw10.pi(), cdw10.pil())
    }

    /// The format that a host asks for with FLBAS and DPS in Namespace Management.
    pub(crate) fn of_creation(flbas: u8, dps: u8) -> Result<Self, Status> {
        // Bits 3:0 and 6:5 are the index; bit 4 asks for metadata behind each block's data.
        if flbas & 1 << 4 != 0 {
            return Err(Status::INVALID_FORMAT);
        }
        let index = flbas & 0xf | (flbas >> 5 & 3) << 4;
        Self::new(index, dps & 7, dps & 1 << 3 != 0)
    }

    fn new(index: u8, pi: u8, first: bool) -> Result<Self, Status> {
        let format = FORMATS.get(usize::from(index));
        let (_, metadata) = format.ok_or(Status::INVALID_FORMAT)?;
        match pi {
            0 => Ok(Self {
                index,
                protected: false,
                first: false,
            }),
            1 if *metadata => Ok(Self {
                index,
                protected: true,
                first,
            }),
            _ => Err(Status::INVALID_FORMAT),
        }
    }

    fn shape(self) -> (u8, bool) {
        FORMATS
            .get(usize::from(self.index))
            .copied()
            .unwrap_or((9, false))
    }

    /// Block size as a power of two.
    pub(crate) fn block_shift(self) -> u8 {
        self.shape().0
    }

    pub(crate) fn has_metadata(self) -> bool {
        self.shape().1
    }

    /// The format with blocks of the same size and nothing else.
    pub(crate) fn without_metadata(self) -> Self {
        Self {
            index: u8::from(self.block_shift() != FORMATS[0].0),
            protected: false,
            first: false,
        }
    }

    /// DPS: type and place of the protection information.
    pub(crate) fn dps(self) -> u8 {
        u8::from(self.protected) | u8::from(self.first) << 3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_host_may_ask_for() {
        let ask = |bits| Format::of_format(FormatCdw10::from_bits(bits));
        let plain = ask(1).unwrap();
        assert_eq!(
            (plain.block_shift(), plain.has_metadata(), plain.dps()),
            (12, false, 0)
        );
        let protected = ask(2 | 1 << 5 | 1 << 8).unwrap();
        assert_eq!(
            (
                protected.block_shift(),
                protected.has_metadata(),
                protected.dps()
            ),
            (9, true, 9)
        );
        // Metadata behind the data, formats that there are not, protection types that there are not, protection
        // without metadata.
        for bits in [2 | 1 << 4, 4, 1 << 12, 2 | 2 << 5, 2 | 3 << 5, 1 << 5] {
            assert_eq!(ask(bits), Err(Status::INVALID_FORMAT), "{bits:#x}");
        }
        assert_eq!(Format::of_creation(2, 9), Ok(protected));
        for (flbas, dps) in [(0x12, 0), (0x20, 0), (0, 1), (3, 7)] {
            assert_eq!(Format::of_creation(flbas, dps), Err(Status::INVALID_FORMAT));
        }
    }
}
