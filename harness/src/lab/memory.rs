//! Whether the host has the memory that a lab needs.

use super::LabError;
use crate::topology::{Backing, DeviceOptions, MIB, Topology};

/// What QEMU takes besides the guest's memory, measured with TCG's translation cache included.
const QEMU_OVERHEAD: u64 = 256 * MIB;

/// Bytes that a lab of `topology` can come to use.
fn needed(topology: &Topology) -> u64 {
    let devices: u64 = topology
        .endpoints
        .iter()
        .map(|endpoint| {
            let in_memory = |backing: &Backing, size| match backing {
                Backing::Memory => size,
                Backing::File { .. } | Backing::Null => 0,
            };
            let nvme = match &endpoint.device {
                DeviceOptions::Nvme(nvme) => nvme,
                DeviceOptions::Nvram(card) => return in_memory(&card.backing, card.size),
            };
            let blocks = nvme
                .namespaces
                .iter()
                .map(|ns| in_memory(&ns.backing, ns.size));
            let cmb = nvme.cmb.map(|cmb| cmb.size);
            let pmr = nvme
                .pmr
                .as_ref()
                .map(|pmr| in_memory(&pmr.backing, pmr.size));
            let cache = nvme.write_cache.map(|cache| cache.size);
            let all = blocks.chain(cmb).chain(pmr).chain(cache);
            all.fold(0, u64::saturating_add)
        })
        .fold(0, u64::saturating_add);
    devices
        .saturating_add(topology.guest.memory)
        .saturating_add(QEMU_OVERHEAD)
}

/// `MemAvailable` of /proc/meminfo in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// Refuses a lab that the host has no memory for: the alternative is the kernel's OOM killer, in the middle.
///
/// # Errors
/// [`LabError::Memory`].
pub(super) fn check(topology: &Topology) -> Result<(), LabError> {
    let needed = needed(topology);
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match available(&meminfo) {
        Some(available) if available < needed => Err(LabError::Memory { needed, available }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:       24000 kB\nMemAvailable:    1024 kB\n";
        assert_eq!(available(text), Some(1 << 20));
        assert_eq!(available("nonsense"), None);
    }
}
