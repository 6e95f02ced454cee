//! The little of ELF that is needed: a module's `.modinfo`, and the libraries that a program names.
//!
//! Files come from a user's own tree too, so every offset is checked (System V gABI, chapters 4 and 5).

/// Reads one 64-bit little-endian ELF file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Elf<'a> {
    bytes: &'a [u8],
}

const SHT_DYNAMIC: u64 = 6;
const PT_INTERP: u64 = 3;
const DT_NEEDED: u64 = 1;

#[derive(Debug, Clone, Copy)]
struct Section {
    name: u64,
    kind: u64,
    offset: u64,
    size: u64,
    link: u64,
}

impl<'a> Elf<'a> {
    /// `None` if it is no 64-bit little-endian ELF file.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        bytes
            .starts_with(b"\x7fELF\x02\x01")
            .then_some(Self { bytes })
    }

    /// The `key=value` strings of a module's `.modinfo` section; `None` if it has none.
    pub fn modinfo(self) -> Option<Vec<(&'a str, &'a str)>> {
        let names = self.section(self.number(62, 2)?)?;
        let count = self.number(60, 2)?;
        let section = (0..count)
            .filter_map(|i| self.section(i))
            .find(|s| self.string(names, s.name) == Some(".modinfo"))?;
        let data = self.slice(section.offset, section.size)?;
        let entries = data
            .split(|&b| b == 0)
            .filter_map(|e| std::str::from_utf8(e).ok());
        Some(entries.filter_map(|e| e.split_once('=')).collect())
    }

    /// Names of the shared libraries that the file needs; empty for a static one.
    pub fn needed(self) -> Vec<&'a str> {
        let Some(count) = self.number(60, 2) else {
            return Vec::new();
        };
        let dynamic = (0..count)
            .filter_map(|i| self.section(i))
            .find(|s| s.kind == SHT_DYNAMIC);
        let Some(dynamic) = dynamic else {
            return Vec::new();
        };
        let Some(strings) = self.section(dynamic.link) else {
            return Vec::new();
        };
        let entries = self
            .slice(dynamic.offset, dynamic.size)
            .unwrap_or_default()
            .chunks_exact(16);
        entries
            .filter_map(|e| {
                let (tag, value) = e.split_at(8);
                (little_endian(tag) == DT_NEEDED).then(|| little_endian(value))
            })
            .filter_map(|offset| self.string(strings, offset))
            .collect()
    }

    /// The program's loader, for example `/lib64/ld-linux-x86-64.so.2`; `None` for a static one.
    pub fn interpreter(self) -> Option<&'a str> {
        let table = self.number(32, 8)?;
        let size = self.number(54, 2)?;
        let count = self.number(56, 2)?;
        (0..count).find_map(|i| {
            let at = table.checked_add(i.checked_mul(size)?)?;
            if self.number(at, 4)? != PT_INTERP {
                return None;
            }
            let offset = self.number(at.checked_add(8)?, 8)?;
            let length = self.number(at.checked_add(32)?, 8)?;
            let text = std::str::from_utf8(self.slice(offset, length)?).ok()?;
            Some(text.trim_end_matches('\0'))
        })
    }

    fn section(self, index: u64) -> Option<Section> {
        let size = self.number(58, 2)?;
        let at = self.number(40, 8)?.checked_add(index.checked_mul(size)?)?;
        let field = |offset: u64, width| self.number(at.checked_add(offset)?, width);
        Some(Section {
            name: field(0, 4)?,
            kind: field(4, 4)?,
            offset: field(24, 8)?,
            size: field(32, 8)?,
            link: field(40, 4)?,
        })
    }

    fn string(self, table: Section, offset: u64) -> Option<&'a str> {
        let data = self.slice(table.offset, table.size)?;
        let rest = data.get(usize::try_from(offset).ok()?..)?;
        let end = rest.iter().position(|&b| b == 0)?;
        std::str::from_utf8(rest.get(..end)?).ok()
    }

    fn number(self, offset: u64, width: u64) -> Option<u64> {
        self.slice(offset, width).map(little_endian)
    }

    fn slice(self, offset: u64, size: u64) -> Option<&'a [u8]> {
        let start = usize::try_from(offset).ok()?;
        self.bytes
            .get(start..start.checked_add(usize::try_from(size).ok()?)?)
    }
}

/// At most eight bytes as a number.
fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A minimal module: ELF header, `.modinfo`, section names, three section headers.
    pub(crate) fn module(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut file = vec![0u8; 64];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let info_at = file.len();
        file.extend_from_slice(modinfo);
        let names_at = file.len();
        file.extend_from_slice(names);
        let table_at = file.len();
        for (name, offset, size) in [
            (0u32, 0, 0),
            (1, info_at, modinfo.len()),
            (10, names_at, names.len()),
        ] {
            let mut header = [0u8; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[24..32].copy_from_slice(&(offset as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
            file.extend_from_slice(&header);
        }
        file[40..48].copy_from_slice(&(table_at as u64).to_le_bytes());
        file[58..60].copy_from_slice(&64u16.to_le_bytes());
        file[60..62].copy_from_slice(&3u16.to_le_bytes());
        file[62..64].copy_from_slice(&2u16.to_le_bytes());
        file
    }

    #[test]
    fn modinfo_is_read() {
        let file = module(b"name=nvme\0depends=nvme-core,t10_pi\0\0license=GPL\0");
        let info = Elf::parse(&file).unwrap().modinfo().unwrap();
        assert_eq!(
            info,
            [
                ("name", "nvme"),
                ("depends", "nvme-core,t10_pi"),
                ("license", "GPL")
            ]
        );
    }

    #[test]
    fn no_cut_or_damage_makes_it_panic() {
        let file = module(b"name=nvme\0depends=nvme-core\0");
        for length in 0..file.len() {
            if let Some(elf) = Elf::parse(&file[..length]) {
                let _ = (elf.modinfo(), elf.needed(), elf.interpreter());
            }
        }
        for at in 6..file.len() {
            let mut bad = file.clone();
            bad[at] = 0xff;
            let elf = Elf::parse(&bad).unwrap();
            let _ = (elf.modinfo(), elf.needed(), elf.interpreter());
        }
    }

    #[test]
    fn our_own_program_names_its_libraries() {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let elf = Elf::parse(&bytes).unwrap();
        assert!(elf.needed().contains(&"libc.so.6"));
        assert!(elf.interpreter().unwrap().contains("ld-linux"));
    }
}
