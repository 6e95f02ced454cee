//! The rules for an NVMe SSD.

use std::time::Duration;

use p2plab_nvme::{CmbScheme, Fault, FaultEffect, MIN_WRITE_CACHE};

use super::super::device::{Backing, CmbOptions, NamespaceOptions, NvmeOptions, PmrOptions};
use super::super::error::TopologyFault;
use super::super::sizes::{self, GIB, MIB};
use super::super::{EndpointOptions, times};
use super::{
    Checked, P2P_UNIT, Subject, check_bounds, check_multiple, check_path, check_power_of_two,
    check_size_bounds,
};

const MAX_NAMESPACES: usize = 64;
const MAX_NAMESPACE: u64 = 1 << 50;
const MAX_IO_QUEUES: u16 = 64;
/// It is memory of the lab.
const MAX_WRITE_CACHE: u64 = 16 * GIB;
/// Longest time that PMRCAP.PMRTO lets a host wait for.
const MAX_READY: Duration = Duration::from_secs(120);

pub(super) fn check(
    subject: Subject,
    endpoint: &EndpointOptions,
    options: &NvmeOptions,
    window: u64,
) -> Checked {
    let count = options.namespaces.len();
    if !(1..=MAX_NAMESPACES).contains(&count) {
        let fault = TopologyFault::BadCount {
            what: format!("namespaces in `{}`", endpoint.name),
            count,
            min: 1,
            max: MAX_NAMESPACES,
        };
        return Err(subject.finds("namespaces", fault));
    }
    options
        .namespaces
        .iter()
        .try_for_each(|namespace| check_namespace(subject, namespace))?;
    check_size_bounds(
        subject,
        "unallocated",
        options.unallocated,
        (0, MAX_NAMESPACE),
    )?;
    if let Some(cache) = &options.write_cache {
        let bounds = (MIN_WRITE_CACHE, MAX_WRITE_CACHE);
        check_size_bounds(subject, "write_cache", cache.size, bounds)?;
        // What TOML has no numbers for.
        let seed = cache.survivors.unwrap_or(0);
        check_bounds(subject, "write_cache_seed", seed, (0, i64::MAX as u64))?;
    }
    check_bounds(
        subject,
        "io_queues",
        options.io_queues.into(),
        (1, MAX_IO_QUEUES.into()),
    )?;
    check_serial(subject, options.serial.as_deref())?;
    let mut faults = options.faults.iter();
    faults.try_for_each(|fault| check_fault(subject, fault, options))?;
    if let Some(cmb) = &options.cmb {
        check_cmb(subject, cmb)?;
    }
    if let Some(pmr) = &options.pmr {
        check_pmr(subject, pmr, options.cmb.as_ref())?;
    }
    let bars = options.cmb.as_ref().map_or(0, CmbOptions::bar);
    let bars = bars.saturating_add(options.pmr.as_ref().map_or(0, |pmr| pmr.size));
    if bars > window {
        let fault = TopologyFault::WindowTooSmall {
            what: "memory (CMB and PMR)",
            endpoint: endpoint.name.clone(),
            bar: bars,
            window,
            wanted: bars.checked_next_power_of_two().unwrap_or(bars),
        };
        let field = if options.cmb.is_some() { "cmb" } else { "pmr" };
        return Err(subject.finds(field, fault));
    }
    Ok(())
}

fn check_namespace(subject: Subject, namespace: &NamespaceOptions) -> Checked {
    if ![512, 4096].contains(&namespace.block_size) {
        let word = namespace.block_size.to_string();
        let hint = "valid are 512 and 4096".to_owned();
        let fault = TopologyFault::UnknownWord {
            field: "block_size",
            word,
            hint,
        };
        return Err(subject.finds("block_size", fault));
    }
    check_size_bounds(subject, "size", namespace.size, (MIB, MAX_NAMESPACE))?;
    check_multiple(subject, "size", namespace.size, namespace.block_size.into())?;
    match &namespace.backing {
        Backing::File { path, .. } => check_path(subject, "file", path),
        Backing::Memory | Backing::Null => Ok(()),
    }
}

fn check_serial(subject: Subject, serial: Option<&str>) -> Checked {
    let printable = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
    match serial {
        Some(serial) if !serial.bytes().all(printable) || !(1..=20).contains(&serial.len()) => {
            let value = serial.chars().take(40).collect();
            let rule = "a serial number is 1 to 20 printable ASCII characters";
            let fault = TopologyFault::BadText {
                field: "serial",
                value,
                rule,
            };
            Err(subject.finds("serial", fault))
        }
        _ => Ok(()),
    }
}

fn check_cmb(subject: Subject, cmb: &CmbOptions) -> Checked {
    // The nvme driver of Linux silently leaves a CMB alone whose size is no multiple of 2 MiB.
    check_size_bounds(subject, "cmb", cmb.size, (P2P_UNIT, 256 * GIB))?;
    check_power_of_two(subject, "cmb", cmb.size)?;
    // The same for its address, which starts at a multiple of the BAR's size.
    check_size_bounds(subject, "offset", cmb.offset, (0, 256 * GIB))?;
    check_multiple(subject, "offset", cmb.offset, P2P_UNIT)
}

fn check_pmr(subject: Subject, pmr: &PmrOptions, cmb: Option<&CmbOptions>) -> Checked {
    check_size_bounds(subject, "pmr", pmr.size, (P2P_UNIT, 256 * GIB))?;
    check_power_of_two(subject, "pmr", pmr.size)?;
    if pmr.ready_after > MAX_READY {
        let fault = TopologyFault::OutOfBounds {
            field: "ready_after",
            value: times::format(pmr.ready_after),
            min: times::format(Duration::ZERO),
            max: times::format(MAX_READY),
        };
        return Err(subject.finds("pmr", fault));
    }
    if cmb.is_some_and(|cmb| cmb.scheme == CmbScheme::V1_3) {
        let fault = TopologyFault::Conflict {
            field: "pmr",
            other: "scheme",
            cure: "NVMe 1.3 has no PMR: leave `scheme = \"1.3\"` of the cmb out",
        };
        return Err(subject.finds("pmr", fault));
    }
    for (field, value) in [
        ("pmrebs", pmr.elasticity_buffer),
        ("pmrswtp", pmr.sustained_throughput),
    ] {
        check_scaled(subject, field, value)?;
    }
    match &pmr.backing {
        Backing::File { path, .. } => check_path(subject, "pmr", path),
        Backing::Memory => Ok(()),
        Backing::Null => {
            let fault = TopologyFault::Conflict {
                field: "pmr",
                other: "null",
                cure: "its memory is there, in a file or not",
            };
            Err(subject.finds("pmr", fault))
        }
    }
}

/// PMREBS and PMRSWTP have 24 bits, in units of 1, KiB, MiB or GiB.
fn check_scaled(subject: Subject, field: &'static str, value: u64) -> Checked {
    let units = (0..=3).map(|unit| 1u64 << (10 * unit));
    let mut fits = units.filter(|unit| value.is_multiple_of(*unit) && value / unit < 1 << 24);
    if fits.next().is_some() {
        return Ok(());
    }
    let fault = TopologyFault::BadText {
        field,
        value: sizes::format(value),
        rule: "use fewer digits: the register has 24 bits and a unit",
    };
    Err(subject.finds("pmr", fault))
}

fn check_fault(subject: Subject, fault: &Fault, options: &NvmeOptions) -> Checked {
    let within = |field, value, bounds| {
        let found = check_bounds(subject, field, value, bounds);
        // The field in the file is the list.
        found.map_err(|mut finding| {
            finding.field = "faults";
            finding
        })
    };
    if let Some(queue) = fault.queue {
        within("queue", queue.into(), (0, options.io_queues.into()))?;
    }
    if let Some(nsid) = fault.nsid {
        let count = u64::try_from(options.namespaces.len()).unwrap_or(u64::MAX);
        within("nsid", nsid.into(), (1, count))?;
    }
    if let Some(count) = fault.count {
        within("count", count, (1, u32::MAX.into()))?;
    }
    within("after", fault.after, (0, u32::MAX.into()))?;
    if let Some(lba) = &fault.lba {
        if fault.queue == Some(0) {
            let fault = TopologyFault::Conflict {
                field: "lba",
                other: "queue",
                cure: "admin commands have no blocks",
            };
            return Err(subject.finds("faults", fault));
        }
        if lba.is_empty() {
            let fault = TopologyFault::BadText {
                field: "lba",
                value: format!("[{}, {}]", lba.start(), lba.end()),
                rule: "the last block is before the first",
            };
            return Err(subject.finds("faults", fault));
        }
    }
    match fault.effect {
        FaultEffect::Delay(time) if time > times::LONGEST => {
            let fault = TopologyFault::OutOfBounds {
                field: "delay",
                value: format!("{time:?}"),
                min: times::format(Duration::ZERO),
                max: times::format(times::LONGEST),
            };
            Err(subject.finds("faults", fault))
        }
        _ => Ok(()),
    }
}
