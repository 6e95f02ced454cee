//! A recording stand-in for a function: registers in BAR 0, a mapped page in BAR 2, 8 MSI-X vectors, INTx.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use p2plab_pcie::{
    Access, BarBacking, BarDeclaration, BarMemory, CpuAccess, Declaration, Identity, MapError,
    MsixDeclaration, OutOfBounds, Posted, ResetKind,
};

use crate::target::Target;

pub(super) const BAR_SIZE: u64 = 0x4000;
pub(super) const VECTORS: u16 = 8;

pub(super) struct Fake {
    declaration: Declaration,
    config: Mutex<Vec<u8>>,
    bar: Mutex<Vec<u8>>,
    pub(super) log: Mutex<Vec<String>>,
    pub(super) msix: Mutex<Vec<Option<File>>>,
    pub(super) intx: Mutex<Option<File>>,
}

impl Fake {
    pub(super) fn new() -> Self {
        let mut config = vec![0; 4096];
        config[0..4].copy_from_slice(&[0x34, 0x12, 0x78, 0x56]);
        // Class: other memory controller. Interrupt pin: INTA.
        config[0x0a..0x0c].copy_from_slice(&[0x80, 0x05]);
        config[0x3d] = 1;
        let memory = Arc::new(BarMemory::anonymous("fake", 4096).unwrap());
        Fake {
            declaration: Declaration {
                identity: Identity {
                    vendor_id: 0x1234,
                    device_id: 0x5678,
                    subsystem_vendor_id: 0,
                    subsystem_id: 0,
                    revision_id: 0,
                    class_code: 0x05_8000,
                    serial_number: None,
                },
                bars: vec![
                    BarDeclaration {
                        index: 0,
                        size: BAR_SIZE,
                        is_64bit: false,
                        prefetchable: false,
                        cpu_access: CpuAccess::Trapped,
                        backing: BarBacking::Registers,
                    },
                    BarDeclaration {
                        index: 2,
                        size: 4096,
                        is_64bit: false,
                        prefetchable: true,
                        cpu_access: CpuAccess::Mapped,
                        backing: BarBacking::Memory(memory),
                    },
                ],
                msix: Some(MsixDeclaration {
                    vectors: VECTORS,
                    bar: 0,
                    table_offset: 0x2000,
                    pba_offset: 0x3000,
                }),
                intx: true,
            },
            config: Mutex::new(config),
            bar: Mutex::new(vec![0; BAR_SIZE as usize]),
            log: Mutex::default(),
            msix: Mutex::new((0..VECTORS).map(|_| None).collect()),
            intx: Mutex::default(),
        }
    }

    fn note(&self, what: String) {
        self.log.lock().unwrap().push(what);
    }

    pub(super) fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

fn range(memory: &[u8], offset: u64, length: usize) -> Result<std::ops::Range<usize>, OutOfBounds> {
    let start = usize::try_from(offset).map_err(|_| OutOfBounds)?;
    let end = start.checked_add(length).ok_or(OutOfBounds)?;
    if end <= memory.len() {
        Ok(start..end)
    } else {
        Err(OutOfBounds)
    }
}

impl Target for Fake {
    fn name(&self) -> &str {
        "fake"
    }

    fn declaration(&self) -> &Declaration {
        &self.declaration
    }

    fn bar_size(&self, index: u8) -> u64 {
        let bars = &self.declaration.bars;
        bars.iter()
            .find(|bar| bar.index == index)
            .map_or(0, |bar| bar.size)
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds> {
        let config = self.config.lock().unwrap();
        data.copy_from_slice(&config[range(&config, offset, data.len())?]);
        Ok(())
    }

    fn config_write(&self, offset: u64, data: &[u8]) -> Result<(), OutOfBounds> {
        let mut config = self.config.lock().unwrap();
        let range = range(&config, offset, data.len())?;
        config[range].copy_from_slice(data);
        if p2plab_pcie::initiates_flr(offset as usize, data) {
            config.fill(0);
        }
        Ok(())
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds> {
        assert_eq!(bar, 0);
        let memory = self.bar.lock().unwrap();
        data.copy_from_slice(&memory[range(&memory, offset, data.len())?]);
        Ok(())
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), OutOfBounds> {
        assert_eq!(bar, 0);
        let mut memory = self.bar.lock().unwrap();
        let range = range(&memory, offset, data.len())?;
        memory[range].copy_from_slice(data);
        Ok(())
    }

    fn connect(&self) {
        self.note("connect".into());
    }

    fn disconnect(&self) {
        self.note("disconnect".into());
    }

    fn map_host_memory(
        &self,
        address: u64,
        length: u64,
        access: Access,
        file: Option<OwnedFd>,
        file_offset: u64,
    ) -> Result<(), MapError> {
        if length == 0 || address.checked_add(length).is_none() {
            return Err(MapError::BadRange);
        }
        let (read, write, file) = (access.read, access.write, file.is_some());
        self.note(format!(
            "map {address:#x} {length:#x} {read} {write} {file} {file_offset:#x}"
        ));
        Ok(())
    }

    fn unmap_host_memory(&self, address: u64, length: u64) -> Result<(), MapError> {
        if address == 0xdead_0000 {
            return Err(MapError::NotMapped);
        }
        self.note(format!("unmap {address:#x} {length:#x}"));
        Ok(())
    }

    fn poll(&self) -> bool {
        false
    }

    fn set_posted(&self, _posted: Option<Arc<dyn Posted>>) {}

    fn unmap_all_host_memory(&self) {
        self.note("unmap all".into());
    }

    fn msix_vectors(&self) -> u16 {
        VECTORS
    }

    fn set_msix_trigger(&self, vector: u16, file: Option<File>) -> Result<(), OutOfBounds> {
        *self
            .msix
            .lock()
            .unwrap()
            .get_mut(usize::from(vector))
            .ok_or(OutOfBounds)? = file;
        Ok(())
    }

    fn set_intx_trigger(&self, file: Option<File>) {
        *self.intx.lock().unwrap() = file;
    }

    fn mask_intx(&self, masked: bool) {
        self.note(format!("mask {masked}"));
    }

    fn reset(&self, kind: ResetKind) {
        self.note(format!("reset {kind:?}"));
    }
}
