//! The fields of an NVRAM card.

use p2plab_nvram::Fault as NvramFault;

use super::super::device::NvramOptions;
use super::super::error::{TopologyFault, hint};
use super::{Fields, Read, Reader, cpu, interrupts};

pub(super) const FIELDS: &[&str] = &[
    "name",
    "port",
    "device",
    "size",
    "file",
    "create",
    "cpu",
    "armed",
    "interrupts",
    "faults",
];

impl Reader {
    pub(super) fn nvram(&self, fields: &Fields<'_>) -> Read<NvramOptions> {
        let size = fields.size("size")?;
        let size = size.ok_or_else(|| fields.missing("size", "size = \"1GiB\""))?;
        let default = NvramOptions::memory(size);
        Ok(NvramOptions {
            size,
            backing: self.backing(fields)?,
            cpu_access: cpu(fields)?.unwrap_or(default.cpu_access),
            armed: fields.flag("armed")?.unwrap_or(default.armed),
            interrupts: interrupts(fields)?.unwrap_or(default.interrupts),
            faults: faults(fields)?,
        })
    }
}

fn faults(fields: &Fields<'_>) -> Read<Vec<NvramFault>> {
    let named = |word: String| {
        let found = NvramFault::ALL.iter().find(|(name, _)| *name == word);
        found.map(|(_, fault)| *fault).ok_or_else(|| {
            let word = word.chars().take(64).collect::<String>();
            let hint = hint(&word, "value", &NvramFault::ALL.map(|(name, _)| name));
            let field = "faults";
            let fault = TopologyFault::UnknownWord { field, word, hint };
            (fields.span(field), fault.into())
        })
    };
    let words = fields.list("faults")?.unwrap_or_default();
    words.into_iter().map(named).collect()
}
