//! The fields of an NVMe SSD.

use p2plab_nvme::spec::names::{ADMIN_OPCODES, IO_OPCODES, STATUSES};
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{CmbScheme, Fault as NvmeFault, FaultEffect, Metadata, WriteCacheConfig};

use super::super::device::{Backing, CmbOptions, NamespaceOptions, NvmeOptions, PmrOptions};
use super::super::error::{TopologyFault, hint};
use super::{Fields, Read, Reader, Value, cpu, integer, interrupts, wrong_type};

pub(super) const FIELDS: &[&str] = &[
    "name",
    "port",
    "device",
    "size",
    "file",
    "create",
    "null",
    "read_only",
    "block_size",
    "metadata",
    "namespaces",
    "unallocated",
    "write_cache",
    "write_cache_seed",
    "io_queues",
    "interrupts",
    "serial",
    "cmb",
    "pmr",
    "faults",
];
/// Fields of a namespace, be it an element of `namespaces` or the only one.
const NAMESPACE: &[&str] = &[
    "size",
    "file",
    "create",
    "null",
    "read_only",
    "block_size",
    "metadata",
];
const CMB: &[&str] = &[
    "size", "offset", "cpu", "scheme", "sqs", "cqs", "lists", "rds", "wds", "cdpmls", "cdpcils",
];
const PMR: &[&str] = &[
    "size",
    "file",
    "create",
    "cpu",
    "rds",
    "wds",
    "ready_after",
    "pmrebs",
    "pmrswtp",
];
const FAULT: &[&str] = &[
    "queue", "opcode", "nsid", "lba", "after", "count", "status", "delay", "effect",
];
/// What `effect` of a fault can be; `status` and `delay` are fields of their own.
pub(in super::super) const EFFECTS: &[(&str, FaultEffect)] = &[
    ("media-error", FaultEffect::MediaError),
    ("drop-completion", FaultEffect::DropCompletion),
    ("lose-interrupt", FaultEffect::LoseInterrupt),
    ("fatal", FaultEffect::Fatal),
    ("read-only", FaultEffect::ReadOnly),
    ("power-cut", FaultEffect::PowerCut),
];

/// What `metadata` of a namespace can be.
pub(in super::super) const METADATA: &[(&str, Metadata)] = &[
    ("none", Metadata::None),
    ("plain", Metadata::Plain),
    ("protection", Metadata::Protection),
];

impl Reader {
    pub(super) fn nvme(&self, fields: &Fields<'_>) -> Read<NvmeOptions> {
        let namespaces = match fields.get("namespaces") {
            None => vec![self.namespace(fields)?],
            Some(_) => {
                if let Some(field) = NAMESPACE.iter().find(|field| fields.get(field).is_some()) {
                    let fault = TopologyFault::Conflict {
                        field,
                        other: "namespaces",
                        cure: "give each namespace its own fields in `namespaces`",
                    };
                    return Err((fields.span(field), fault.into()));
                }
                let values = fields.tables("namespaces", "namespaces = [{ size = \"1GiB\" }]")?;
                let read = |value| self.namespace(&Fields::of("a namespace", value, NAMESPACE)?);
                values.into_iter().map(read).collect::<Read<_>>()?
            }
        };
        let faults = fields.tables("faults", "faults = [{ opcode = \"write\", ... }]")?;
        let default = NvmeOptions::memory(0);
        Ok(NvmeOptions {
            namespaces,
            unallocated: fields.size("unallocated")?.unwrap_or(default.unallocated),
            write_cache: write_cache(fields)?,
            cmb: fields.get("cmb").map(cmb).transpose()?,
            pmr: fields.get("pmr").map(|v| self.pmr(v)).transpose()?,
            faults: faults.into_iter().map(fault).collect::<Read<_>>()?,
            io_queues: fields.number("io_queues")?.unwrap_or(default.io_queues),
            interrupts: interrupts(fields)?.unwrap_or(default.interrupts),
            serial: fields.optional_text("serial")?,
        })
    }

    fn namespace(&self, fields: &Fields<'_>) -> Read<NamespaceOptions> {
        let size = fields.size("size")?;
        let size = size.ok_or_else(|| fields.missing("size", "size = \"1GiB\""))?;
        let default = NamespaceOptions::memory(size);
        let backing = self.backing(fields)?;
        let backing = match (fields.flag("null")?, backing) {
            (Some(true), Backing::File { .. }) => {
                let fault = TopologyFault::Conflict {
                    field: "null",
                    other: "file",
                    cure: "a null namespace keeps nothing: leave one of them out",
                };
                return Err((fields.span("null"), fault.into()));
            }
            (Some(true), _) => Backing::Null,
            (_, backing) => backing,
        };
        let metadata = fields.get("metadata");
        let metadata = metadata.map(|value| code("metadata", METADATA, value, |_| None));
        Ok(NamespaceOptions {
            size,
            backing,
            metadata: metadata.transpose()?.unwrap_or(default.metadata),
            read_only: fields.flag("read_only")?.unwrap_or(default.read_only),
            block_size: fields.number("block_size")?.unwrap_or(default.block_size),
        })
    }

    fn pmr(&self, value: &Value<'_>) -> Read<PmrOptions> {
        let fields = Fields::of("a pmr", value, PMR)?;
        let size = fields.size("size")?;
        let size = size.ok_or_else(|| fields.missing("size", "pmr = { size = \"64MiB\" }"))?;
        let default = PmrOptions::memory(size);
        Ok(PmrOptions {
            size,
            backing: self.backing(&fields)?,
            cpu_access: cpu(&fields)?.unwrap_or(default.cpu_access),
            read_data: fields.flag("rds")?.unwrap_or(default.read_data),
            write_data: fields.flag("wds")?.unwrap_or(default.write_data),
            ready_after: fields.time("ready_after")?.unwrap_or(default.ready_after),
            elasticity_buffer: fields.size("pmrebs")?.unwrap_or(default.elasticity_buffer),
            sustained_throughput: fields
                .size("pmrswtp")?
                .unwrap_or(default.sustained_throughput),
        })
    }
}

fn write_cache(fields: &Fields<'_>) -> Read<Option<WriteCacheConfig>> {
    let survivors = fields.number("write_cache_seed")?;
    match fields.size("write_cache")? {
        Some(size) => Ok(Some(WriteCacheConfig { size, survivors })),
        None if survivors.is_some() => {
            let fault = TopologyFault::Needs {
                field: "write_cache_seed",
                needs: "write_cache",
            };
            Err((fields.span("write_cache_seed"), fault.into()))
        }
        None => Ok(None),
    }
}

fn cmb(value: &Value<'_>) -> Read<CmbOptions> {
    let fields = Fields::of("a cmb", value, CMB)?;
    let size = fields.size("size")?;
    let size = size.ok_or_else(|| fields.missing("size", "cmb = { size = \"64MiB\" }"))?;
    let default = CmbOptions::new(size);
    let scheme = match fields.get("scheme") {
        Some(_) => match fields.word("scheme", "", &["1.4", "1.3"])? {
            "1.3" => CmbScheme::V1_3,
            _ => CmbScheme::V1_4,
        },
        None => default.scheme,
    };
    let flag = |field, default| Ok(fields.flag(field)?.unwrap_or(default));
    Ok(CmbOptions {
        size,
        offset: fields.size("offset")?.unwrap_or(default.offset),
        cpu_access: cpu(&fields)?.unwrap_or(default.cpu_access),
        scheme,
        submission_queues: flag("sqs", default.submission_queues)?,
        completion_queues: flag("cqs", default.completion_queues)?,
        lists: flag("lists", default.lists)?,
        read_data: flag("rds", default.read_data)?,
        write_data: flag("wds", default.write_data)?,
        mixed_lists: flag("cdpmls", default.mixed_lists)?,
        independent_lists: flag("cdpcils", default.independent_lists)?,
    })
}

fn fault(value: &Value<'_>) -> Read<NvmeFault> {
    let fields = Fields::of("a fault", value, FAULT)?;
    let queue = match fields.get("queue") {
        Some(value) if value.get_ref().as_str() == Some("admin") => Some(0),
        Some(value) => {
            let number = integer(value).and_then(|number| u16::try_from(number).ok());
            let wanted = "the number of an I/O queue or \"admin\"";
            Some(number.ok_or_else(|| wrong_type("queue", wanted, value))?)
        }
        None => None,
    };
    let opcodes = if queue == Some(0) {
        ADMIN_OPCODES
    } else {
        IO_OPCODES
    };
    let opcode = fields.get("opcode");
    let opcode = opcode.map(|value| code("opcode", opcodes, value, |n| u8::try_from(n).ok()));
    Ok(NvmeFault {
        queue,
        opcode: opcode.transpose()?,
        nsid: fields.number("nsid")?,
        lba: fields.get("lba").map(lba).transpose()?,
        after: fields.number("after")?.unwrap_or(0),
        count: fields.number("count")?,
        effect: effect(&fields)?,
    })
}

/// Exactly one of the fields that say what happens.
fn effect(fields: &Fields<'_>) -> Read<FaultEffect> {
    const WAYS: [&str; 3] = ["status", "delay", "effect"];
    let mut given = WAYS.iter().filter(|way| fields.get(way).is_some());
    let first = given.next();
    if let (Some(other), Some(field)) = (first, given.next()) {
        let fault = TopologyFault::Conflict {
            field,
            other,
            cure: "a fault has one effect; write a second fault for a second one",
        };
        return Err((fields.span(field), fault.into()));
    }
    if let Some(delay) = fields.time("delay")? {
        return Ok(FaultEffect::Delay(delay));
    }
    if let Some(value) = fields.get("status") {
        // Status Code and Type, Do Not Retry in bit 14; 0 is success.
        let number = |n| {
            u16::try_from(n)
                .ok()
                .filter(|n| n & !0x67ff == 0 && n & 0x7ff != 0)
        };
        return code("status", STATUSES, value, |n| number(n).map(Status)).map(FaultEffect::Status);
    }
    match fields.get("effect") {
        Some(value) => code("effect", EFFECTS, value, |_| None),
        None => Err(fields.missing("status", "status = \"write-fault\"")),
    }
}

/// One of the `names`, or a number that stands for itself.
fn code<T: Copy>(
    field: &'static str,
    names: &[(&str, T)],
    value: &Value<'_>,
    number: impl FnOnce(u64) -> Option<T>,
) -> Read<T> {
    let Some(word) = value.get_ref().as_str() else {
        let number = integer(value).and_then(number);
        return number.ok_or_else(|| wrong_type(field, "one of its names or a valid code", value));
    };
    if let Some((_, code)) = names.iter().find(|(name, _)| *name == word) {
        return Ok(*code);
    }
    let word = word.chars().take(64).collect::<String>();
    let valid: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
    let hint = hint(&word, "value", &valid);
    Err((
        value.span(),
        TopologyFault::UnknownWord { field, word, hint }.into(),
    ))
}

fn lba(value: &Value<'_>) -> Read<std::ops::RangeInclusive<u64>> {
    let block = |value: &Value<'_>| integer(value);
    let blocks = value
        .get_ref()
        .as_array()
        .map(|array| array.iter().map(block).collect::<Vec<_>>());
    match blocks.as_deref() {
        Some(&[Some(first), Some(last)]) => Ok(first..=last),
        _ => Err(wrong_type(
            "lba",
            "the first and the last block, as [0, 99]",
            value,
        )),
    }
}
