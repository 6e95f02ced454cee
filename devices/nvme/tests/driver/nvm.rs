//! What a host does with namespaces of any format.

use p2plab_nvme::spec::command::{Command, FUSE_FIRST, FUSE_SECOND, admin, cns, namespace_sel};
use p2plab_nvme::spec::identify::{IdentifyController, IdentifyNamespace};
use p2plab_nvme::spec::status::Status;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{Driver, Rig, config};

/// A status as completions are compared: without flags.
pub fn code(status: Status) -> Status {
    Status(status.code())
}

/// What a command that fails with `status` gives.
pub fn fails<T>(status: Status) -> Result<T, Status> {
    Err(code(status))
}

/// A controller with `io_queues` pairs of queues, enabled.
pub fn plug(rig: &mut Rig, change: impl FnOnce(&mut p2plab_nvme::NvmeConfig)) -> Driver {
    let mut config = config("disk");
    change(&mut config);
    let mut d = rig.plug(config);
    d.enable_cmb();
    d.enable();
    for id in 1..=2 {
        d.create_queues(id, 64, None).unwrap();
    }
    d
}

/// A command on `blocks` blocks of 2^`shift` bytes from `slba`, with contiguous data at `address`.
pub fn command(
    d: &mut Driver,
    opcode: u8,
    slba: u64,
    blocks: u32,
    shift: u32,
    address: u64,
) -> Command {
    let bytes = u64::from(blocks) << shift;
    let mut command = d.transfer(opcode, slba, (bytes / 512) as u32, address);
    command.cdw12 = (blocks - 1).into();
    command
}

/// Executes an I/O command.
pub fn run(d: &mut Driver, command: Command) -> Result<(), Status> {
    d.execute(1, command).map(|_| ())
}

/// Executes `first` and `second` as a fused operation on queue pair `index`.
pub fn fused(d: &mut Driver, index: usize, first: Command, second: Command) -> [Status; 2] {
    push_fused(d, index, first, second);
    d.ring_doorbell(index);
    [0, 1].map(|_| code(d.complete(index).status()))
}

pub fn push_fused(d: &mut Driver, index: usize, mut first: Command, mut second: Command) {
    first.flags |= FUSE_FIRST;
    second.flags |= FUSE_SECOND;
    d.push(index, first);
    d.push(index, second);
}

/// An Identify data structure.
pub fn identify(d: &mut Driver, cns: u8, nsid: u32) -> Result<Vec<u8>, Status> {
    let page = d.pages(1);
    d.store(page, &[0xa5; 4096]);
    let command = Command {
        opcode: admin::IDENTIFY,
        nsid: nsid.into(),
        prp1: page.into(),
        cdw10: u32::from(cns).into(),
        ..Command::default()
    };
    d.admin(command)?;
    Ok(d.load(page, 4096))
}

pub fn identify_namespace(d: &mut Driver, nsid: u32) -> IdentifyNamespace {
    let page = identify(d, cns::NAMESPACE, nsid).unwrap();
    IdentifyNamespace::read_from_bytes(&page).unwrap()
}

pub fn identify_controller(d: &mut Driver) -> IdentifyController {
    let page = identify(d, cns::CONTROLLER, 0).unwrap();
    IdentifyController::read_from_bytes(&page).unwrap()
}

/// Format NVM.
pub fn format(d: &mut Driver, nsid: u32, cdw10: u32) -> Result<u32, Status> {
    d.admin(Command {
        opcode: admin::FORMAT_NVM,
        nsid: nsid.into(),
        cdw10: cdw10.into(),
        ..Command::default()
    })
}

/// Creates a namespace; its NSID.
pub fn create(d: &mut Driver, blocks: u64, flbas: u8, dps: u8) -> Result<u32, Status> {
    let page = d.pages(1);
    let mut wanted = IdentifyNamespace::new_zeroed();
    (wanted.nsze, wanted.ncap) = (blocks.into(), blocks.into());
    (wanted.flbas, wanted.dps) = (flbas, dps);
    d.store(page, wanted.as_bytes());
    d.admin(Command {
        opcode: admin::NAMESPACE_MANAGEMENT,
        prp1: page.into(),
        ..Command::default()
    })
}

pub fn delete(d: &mut Driver, nsid: u32) -> Result<u32, Status> {
    d.admin(Command {
        opcode: admin::NAMESPACE_MANAGEMENT,
        nsid: nsid.into(),
        cdw10: u32::from(namespace_sel::DELETE).into(),
        ..Command::default()
    })
}

/// Attaches (`sel` 0) or detaches `nsid`, with the list of `controllers`.
pub fn attach(d: &mut Driver, nsid: u32, sel: u8, controllers: &[u16]) -> Result<u32, Status> {
    let page = d.pages(1);
    let mut list = [0u16; 2048];
    list[0] = controllers.len() as u16;
    list[1..=controllers.len()].copy_from_slice(controllers);
    d.store(page, list.as_bytes());
    d.admin(Command {
        opcode: admin::NAMESPACE_ATTACHMENT,
        nsid: nsid.into(),
        prp1: page.into(),
        cdw10: u32::from(sel).into(),
        ..Command::default()
    })
}
