//! Commands: a started controller, and a sequence of what a host can ask it for.

use arbitrary::Unstructured;
use p2plab_nvme::spec::command::{Command, FUSE_FIRST, FUSE_SECOND, admin};
use p2plab_nvme::spec::registers::offset;
use p2plab_pcie::ResetKind;
use zerocopy::{FromBytes, IntoBytes};

use crate::driver::{Driver, SHADOW};
use crate::input::{
    Pointer, Request, Tape, address, admin_request, config, descriptor, host_page, io_request,
    place,
};
use crate::machine::PAGE;

/// Steps of one input.
const MOST_STEPS: usize = 200;

/// Does what `data` says.
pub fn run(data: &[u8]) {
    let mut tape = Tape(Unstructured::new(data));
    let config = config(&mut tape);
    let how = tape.u8();
    let pairs = u16::from(how & 1) + 1;
    let mut driver = Driver::new(config, pairs, how & 6 == 6);
    for _ in 0..MOST_STEPS {
        if tape.is_empty() {
            break;
        }
        step(&mut driver, &mut tape);
    }
    driver.wait();
    driver.check_status();
    driver.machine.finish();
}

fn step(driver: &mut Driver, tape: &mut Tape<'_>) {
    match tape.u8() {
        0..120 => {
            let mut request = io_request(tape, &driver.config);
            match tape.u8() {
                // A fused operation, and a second half without a first.
                224..252 => fused(driver, tape, &mut request),
                252.. => submit_io(driver, tape, &mut request, FUSE_SECOND),
                _ => submit_io(driver, tape, &mut request, 0),
            }
        }
        120..168 => {
            let mut request = admin_request(tape, &driver.config);
            submit_admin(driver, &mut request);
        }
        168..184 => {
            driver.wait();
        }
        184..190 => driver.ring(),
        190..204 => fill(driver, tape),
        204..214 => raw(driver, tape),
        214..220 => {
            let (index, value) = (u64::from(tape.u8() % 12), tape.mostly_zero());
            driver.exact = false;
            let at = offset::DOORBELLS + 4 * index;
            driver.machine.write32(at, value);
        }
        220..226 => driver.create_pair(u16::from(tape.u8() % 4)),
        226..232 => window(driver, tape),
        232..236 => {
            // Without Bus Master or Memory Space Enable.
            driver.exact = false;
            let command = [0u16, 2, 4, 6][usize::from(tape.u8() & 3)];
            driver.machine.config_write(4, &command.to_le_bytes());
        }
        236..240 => driver.shut_down(),
        _ => reset(driver, tape),
    }
}

/// Tells the driver which addresses `request` names, and writes its lists.
fn prepare(driver: &mut Driver, request: &mut Request) {
    place(request, |at, bytes| driver.store(at, bytes));
    if let Pointer::Good { data, .. } = request.pointer {
        driver.named(data);
    }
    // With an SGL, PRP2 is a length and a type.
    let command = &request.command;
    for address in [command.prp1, command.prp2, command.mptr] {
        driver.named(address.get());
    }
}

fn pick_pair(driver: &Driver, tape: &mut Tape<'_>) -> Option<usize> {
    let pairs = driver.pairs();
    (pairs > 0).then(|| usize::from(tape.u8()) % pairs + 1)
}

fn submit_io(driver: &mut Driver, tape: &mut Tape<'_>, request: &mut Request, flags: u8) {
    prepare(driver, request);
    request.command.flags |= flags;
    if let Some(pair) = pick_pair(driver, tape) {
        driver.push(pair, request.command);
        if tape.u8() & 3 != 3 {
            driver.ring();
        }
    }
}

/// A pair of commands that belong together, or, rarely, do not.
fn fused(driver: &mut Driver, tape: &mut Tape<'_>, first: &mut Request) {
    use p2plab_nvme::spec::command::io;
    let mut second = io_request(tape, &driver.config);
    if !tape.rarely(32) {
        let same = second.command.nsid;
        first.command.opcode = io::COMPARE;
        first.command.nsid = same;
        (first.command.cdw10, first.command.cdw11) = (second.command.cdw10, second.command.cdw11);
        first.command.cdw12 = second.command.cdw12;
        second.command.opcode = io::WRITE;
        first.length = second.length;
    }
    prepare(driver, first);
    prepare(driver, &mut second);
    first.command.flags |= FUSE_FIRST;
    second.command.flags |= FUSE_SECOND;
    if let Some(pair) = pick_pair(driver, tape) {
        driver.push(pair, first.command);
        driver.push(pair, second.command);
        driver.ring();
    }
}

fn submit_admin(driver: &mut Driver, request: &mut Request) {
    prepare(driver, request);
    let command = &mut request.command;
    let queues = [
        admin::CREATE_IO_CQ,
        admin::CREATE_IO_SQ,
        admin::DELETE_IO_CQ,
        admin::DELETE_IO_SQ,
    ];
    if command.opcode == admin::DOORBELL_BUFFER_CONFIG
        && let Pointer::Good { .. } = request.pointer
    {
        [command.prp1, command.prp2] = SHADOW.map(Into::into);
    }
    if queues.contains(&command.opcode) || command.opcode == admin::DOORBELL_BUFFER_CONFIG {
        driver.execute(*command);
    } else {
        driver.push(0, *command);
        driver.ring();
    }
}

/// Writes what commands may find in memory.
fn fill(driver: &mut Driver, tape: &mut Tape<'_>) {
    let at = match tape.u8() {
        page @ 0..224 => host_page(u64::from(page % 28)),
        _ => address(tape),
    };
    let mut content = Vec::new();
    let count = tape.u8() % 16 + 1;
    match tape.u8() {
        0..96 => {
            for _ in 0..count {
                content.extend(address(tape).to_le_bytes());
            }
        }
        96..192 => {
            for _ in 0..count {
                content.extend(descriptor(tape).as_bytes());
            }
        }
        192..224 => content.extend(std::iter::repeat_n(tape.u8(), PAGE as usize)),
        _ => {
            for _ in 0..count {
                content.extend(tape.u64().to_le_bytes());
            }
        }
    }
    driver.store(at, &content);
}

/// 64 bytes of the input as a command of any queue.
fn raw(driver: &mut Driver, tape: &mut Tape<'_>) {
    let queue = usize::from(tape.u8());
    let mut bytes = [0; 64];
    bytes.fill_with(|| tape.u8());
    let Ok(command) = Command::read_from_bytes(&bytes) else {
        return;
    };
    for address in [command.prp1, command.prp2, command.mptr] {
        driver.named(address.get());
    }
    let queue = queue % (driver.pairs() + 1);
    if queue == 0 {
        driver.execute(command);
    } else {
        driver.push(queue, command);
        driver.ring();
    }
}

/// CMB and PMR move, close, open.
fn window(driver: &mut Driver, tape: &mut Tape<'_>) {
    let register = tape.pick(&[
        offset::CMBMSC,
        offset::PMRMSC,
        offset::PMRCTL,
        offset::PMRSTS,
    ]);
    match register {
        offset::PMRCTL => driver.machine.write32(register, tape.u8().into()),
        // The write barrier.
        offset::PMRSTS => _ = driver.machine.read32(register),
        _ => {
            // Queues and registers may lie in it then.
            driver.exact = false;
            let base = address(tape) & !(PAGE - 1);
            let flags = u64::from(tape.u8() & 3);
            driver.machine.write64(register, base | flags);
        }
    }
}

/// A reset, and a new start, or rarely none.
fn reset(driver: &mut Driver, tape: &mut Tape<'_>) {
    let machine = &mut driver.machine;
    match tape.u8() % 10 {
        0 => {}
        1 => machine.write32(offset::CC, 0),
        2 => machine.write32(offset::CC, tape.u32()),
        3 => machine.function_level_reset(),
        4 => machine.function.reset(ResetKind::Conventional),
        5 => {
            machine.function.disconnect();
            machine.function.unmap_all_host_memory();
            machine.connect();
        }
        6 => machine.subsystem_reset(),
        7 => machine.controller.power_cut(),
        8 => machine.replug(),
        _ => machine.function.reset(ResetKind::FunctionLevel),
    }
    driver.exact = false;
    if !tape.rarely(64) {
        driver.start(u16::from(tape.u8() & 1) + 1);
    }
}
