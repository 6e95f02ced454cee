//! The rules of PCI Express that a [`Declaration`] must keep.

use crate::endpoint::{BarBacking, BarDeclaration, CpuAccess, Declaration, MsixDeclaration};

/// Smallest BAR: a guest maps whole pages of 4 KiB, and two functions must not share one.
const SMALLEST_BAR: u64 = 4096;
/// Largest 32-bit BAR: one address bit must remain to place it.
const LARGEST_32BIT_BAR: u64 = 1 << 31;
/// Most vectors of an MSI-X table (PCI Express Base 6.0, section 7.7.2.2).
const MOST_VECTORS: u16 = 2048;

/// Checks `declaration`.
///
/// # Errors
/// The rule that it breaks, in one sentence for people.
pub(crate) fn validate(declaration: &Declaration) -> Result<(), String> {
    if declaration.identity.vendor_id == 0xffff {
        return Err("Vendor ID 0xffff means that there is no device; choose another".to_owned());
    }
    let class_code = declaration.identity.class_code;
    if class_code > 0x00ff_ffff {
        return Err(format!("class code {class_code:#x} has more than 24 bits"));
    }
    let mut taken = [None; 6];
    for bar in &declaration.bars {
        validate_bar(bar)?;
        let last = if bar.is_64bit {
            bar.index + 1
        } else {
            bar.index
        };
        for index in bar.index..=last {
            let slot = taken
                .get_mut(usize::from(index))
                .ok_or_else(|| format!("BAR {} does not exist; there are 0 to 5", bar.index))?;
            if let Some(other) = slot.replace(bar.index) {
                return Err(format!(
                    "BAR {} and BAR {other} both take register {index}; \
                     a 64-bit BAR takes two registers",
                    bar.index
                ));
            }
        }
    }
    match &declaration.msix {
        Some(msix) => validate_msix(msix, &declaration.bars),
        None => Ok(()),
    }
}

fn validate_bar(bar: &BarDeclaration) -> Result<(), String> {
    let (index, size) = (bar.index, bar.size);
    if index > 5 {
        return Err(format!("BAR {index} does not exist; there are 0 to 5"));
    }
    if bar.is_64bit && index > 4 {
        return Err("BAR 5 cannot be 64-bit: there is no register after it; use 4 or less".into());
    }
    if !size.is_power_of_two() || size < SMALLEST_BAR {
        return Err(format!(
            "BAR {index} has {size:#x} bytes; it must be a power of two and at least 0x1000"
        ));
    }
    if !bar.is_64bit && size > LARGEST_32BIT_BAR {
        return Err(format!(
            "BAR {index} has {size:#x} bytes; above 2 GiB it must be 64-bit"
        ));
    }
    match &bar.backing {
        BarBacking::Registers if bar.cpu_access == CpuAccess::Mapped => Err(format!(
            "BAR {index} is to be mapped into the guest; only memory can be"
        )),
        BarBacking::Memory(memory) if memory.size() < size => Err(format!(
            "BAR {index} has {size:#x} bytes, the memory behind it only {:#x}",
            memory.size()
        )),
        BarBacking::Registers | BarBacking::Memory(_) => Ok(()),
    }
}

fn validate_msix(msix: &MsixDeclaration, bars: &[BarDeclaration]) -> Result<(), String> {
    if msix.vectors == 0 || msix.vectors > MOST_VECTORS {
        return Err(format!(
            "{} MSI-X vectors; there can be 1 to {MOST_VECTORS}",
            msix.vectors
        ));
    }
    let bar = bars
        .iter()
        .find(|bar| bar.index == msix.bar)
        .ok_or_else(|| {
            format!(
                "the MSI-X table is to lie in BAR {}; there is none",
                msix.bar
            )
        })?;
    if bar.cpu_access == CpuAccess::Mapped {
        return Err(format!(
            "the MSI-X table is to lie in BAR {}, which is mapped into the guest; \
             accesses to the table must be trapped",
            msix.bar
        ));
    }
    let structures = [
        ("table", msix.table_offset, table_length(msix.vectors)),
        (
            "Pending Bit Array",
            msix.pba_offset,
            pba_length(msix.vectors),
        ),
    ];
    for (name, offset, length) in structures {
        if offset % 8 != 0 {
            return Err(format!(
                "the MSI-X {name} at {offset:#x} is not aligned to 8 bytes"
            ));
        }
        if u64::from(offset) + length > bar.size {
            return Err(format!(
                "the MSI-X {name} at {offset:#x} needs {length:#x} bytes and leaves BAR {}",
                msix.bar
            ));
        }
    }
    let (table, pba) = (u64::from(msix.table_offset), u64::from(msix.pba_offset));
    if table < pba + pba_length(msix.vectors) && pba < table + table_length(msix.vectors) {
        return Err("the MSI-X table and its Pending Bit Array overlap".to_owned());
    }
    Ok(())
}

/// Length in bytes of an MSI-X table (section 7.7.2): 16 bytes a vector.
pub(crate) fn table_length(vectors: u16) -> u64 {
    16 * u64::from(vectors)
}

/// Length in bytes of a Pending Bit Array (section 7.7.2): whole quadwords of one bit a vector.
pub(crate) fn pba_length(vectors: u16) -> u64 {
    8 * u64::from(vectors).div_ceil(64)
}
