//! Hosts that mean harm, and the end of a controller. Alone in its process: it counts threads.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::cell::RefCell;

use driver::{NAMESPACE_SIZE, Rig, config, nvm};
use p2plab_nvme::spec::command::{FUSE, PSDT_SGL, admin, io};
use p2plab_nvme::spec::registers::offset;
use p2plab_nvme::{NamespaceConfig, PmrConfig};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Opcodes that there are.
const ADMIN: &[u8] = &[
    admin::DELETE_IO_SQ,
    admin::CREATE_IO_SQ,
    admin::GET_LOG_PAGE,
    admin::DELETE_IO_CQ,
    admin::CREATE_IO_CQ,
    admin::IDENTIFY,
    admin::ABORT,
    admin::SET_FEATURES,
    admin::GET_FEATURES,
    admin::ASYNC_EVENT_REQUEST,
    admin::NAMESPACE_MANAGEMENT,
    admin::NAMESPACE_ATTACHMENT,
    admin::FORMAT_NVM,
];
const IO: &[u8] = &[
    io::FLUSH,
    io::WRITE,
    io::READ,
    io::WRITE_UNCORRECTABLE,
    io::COMPARE,
    io::WRITE_ZEROES,
    io::DATASET_MANAGEMENT,
    io::VERIFY,
    io::COPY,
];

fn threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.ok()?.path().join("comm")).ok()
    };
    tasks
        .filter_map(name)
        .filter(|name| name.starts_with("nvme-"))
        .count()
}

/// Random writes to a live controller's registers and doorbells and random commands in its queues leave a
/// controller that a reset brings back; unplugged, it leaves no thread.
#[test]
fn nothing_that_a_host_does_is_the_end_of_a_controller() {
    let mut rig = Rig::new();
    let mut cfg = config("a");
    cfg.pmr = Some(PmrConfig::memory(1 << 20));
    // The host deletes and spoils the first namespace; the second is not for it to change.
    cfg.namespaces.push(NamespaceConfig {
        read_only: true,
        ..NamespaceConfig::memory(1 << 20)
    });
    let mut d = rig.plug(cfg);
    let access = (0u64..0x2000, prop::collection::vec(any::<u8>(), 1..9));
    let accesses = prop::collection::vec(access, 0..40);
    let commands = prop::collection::vec((0usize..2, any::<[u8; 64]>(), any::<bool>()), 0..20);
    let queues_first = d.pages(0);
    let d = RefCell::new(d);
    TestRunner::new(ProptestConfig {
        cases: 1000,
        // There is no one source file to keep failures beside.
        failure_persistence: None,
        ..ProptestConfig::default()
    })
    .run(&(accesses, commands), |(accesses, commands)| {
        d.borrow_mut().rewind(queues_first);
        let mut d = d.borrow_mut();
        d.enable_cmb();
        d.enable();
        d.create_queues(1, 64, None).unwrap();
        // There is room for it only if an earlier case deleted it.
        if nvm::create(&mut d, NAMESPACE_SIZE / 512, 0, 0) == Ok(1) {
            nvm::attach(&mut d, 1, 0, &[0]).unwrap();
        }
        for (queue, bytes, plausible) in commands {
            let mut command: p2plab_nvme::spec::command::Command =
                zerocopy::FromBytes::read_from_bytes(&bytes[..]).unwrap();
            if plausible {
                let opcodes = if queue == 0 { ADMIN } else { IO };
                command.opcode = opcodes[usize::from(command.opcode) % opcodes.len()];
                // By PRPs, or by an SGL of one data block; alone, or half of a fused operation.
                command.flags &= PSDT_SGL | FUSE;
                command.mptr = (command.mptr.get() & 0x3ff_fffc).into();
                command.nsid = 1.into();
                command.prp1 = (command.prp1.get() & 0x3ff_fffc).into();
                command.prp2 = (command.prp2.get() & 0x3ff_f000).into();
                command.cdw10 = (command.cdw10.get() & 0xff).into();
                command.cdw11 = 0.into();
                command.cdw12 = (command.cdw12.get() & 0xff).into();
            }
            d.submit(queue, command);
        }
        for (at, data) in accesses {
            let fits = data.len() as u64 + at <= 0x2000;
            if fits {
                d.function.bar_write(0, at, &data).unwrap();
                let mut read = vec![0; data.len()];
                d.function.bar_read(0, at, &mut read).unwrap();
            }
        }
        d.flr();
        d.restore_config_space();
        d.enable();
        d.create_queues(1, 64, None).unwrap();
        let page = d.pages(1);
        let mut read = d.transfer(io::READ, 0, 8, page);
        read.nsid = 2.into();
        d.execute(1, read).unwrap();
        d.disable();
        Ok(())
    })
    .unwrap();
    let mut d = d.into_inner();
    assert_eq!(d.read32(offset::CC) & 1, 0);
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    assert_eq!(threads(), 2);
    rig.fabric.unplug("nvme0").unwrap();
    assert_eq!(threads(), 0);
}
