//! The rules for an NVRAM card.

use p2plab_nvram::{MAX_SIZE, MIN_SIZE};

use super::super::EndpointOptions;
use super::super::device::{Backing, NvramOptions};
use super::super::error::TopologyFault;
use super::{Checked, Subject, check_path, check_power_of_two, check_size_bounds};

pub(super) fn check(
    subject: Subject,
    endpoint: &EndpointOptions,
    options: &NvramOptions,
    window: u64,
) -> Checked {
    check_size_bounds(subject, "size", options.size, (MIN_SIZE, MAX_SIZE))?;
    check_power_of_two(subject, "size", options.size)?;
    if options.size > window {
        let fault = TopologyFault::WindowTooSmall {
            what: "the memory",
            endpoint: endpoint.name.clone(),
            bar: options.size,
            window,
            wanted: options.size,
        };
        return Err(subject.finds("size", fault));
    }
    match &options.backing {
        Backing::File { path, .. } => check_path(subject, "file", path),
        Backing::Memory => Ok(()),
        Backing::Null => {
            let fault = TopologyFault::Conflict {
                field: "size",
                other: "null",
                cure: "its memory is there, in a file or not",
            };
            Err(subject.finds("size", fault))
        }
    }
}
