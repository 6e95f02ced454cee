//! Registers: accesses of any width, place and alignment, and the life of a function on its bus.

use std::fs::File;
use std::os::fd::AsFd;

use arbitrary::Unstructured;
use p2plab_nvme::spec::command::{Command, admin};
use p2plab_nvme::spec::registers::{Cc, offset};
use p2plab_pcie::{Function, ResetKind};
use zerocopy::IntoBytes;

use crate::input::{Tape, address, config};
use crate::machine::{CMB_AT, HOST, HOST_AT, Machine, PAGE, PMR_AT, READ_ONLY};

/// Steps of one input.
const MOST_STEPS: usize = 300;

/// Registers that hosts write.
const WRITABLE: [u64; 12] = [
    offset::INTMS,
    offset::INTMC,
    offset::CC,
    offset::CSTS,
    offset::NSSR,
    offset::AQA,
    offset::ASQ,
    offset::ACQ,
    offset::CMBMSC,
    offset::PMRCTL,
    offset::PMRMSC,
    offset::PMRSTS,
];

/// Does what `data` says.
pub fn run(data: &[u8]) {
    let mut tape = Tape(Unstructured::new(data));
    let config = config(&mut tape);
    let mut machine = Machine::new(config);
    // Nothing is told of where the controller writes: of what it may write, all.
    machine.wild = true;
    let cap = capabilities(&machine.function);
    for _ in 0..MOST_STEPS {
        if tape.is_empty() {
            break;
        }
        step(&mut machine, &mut tape);
    }
    machine.program();
    let pcie = &machine.function.dump()["pcie"];
    if pcie["link_up"] == true && pcie["power_state"] == "D0" {
        assert_eq!(capabilities(&machine.function), cap, "CAP has changed");
    }
    machine.finish();
}

fn capabilities(function: &Function) -> [u8; 16] {
    let mut data = [0; 16];
    let read = function.bar_read(0, offset::CAP, &mut data);
    assert!(read.is_ok());
    // CAP and VS.
    data[12..].fill(0);
    data
}

fn step(machine: &mut Machine, tape: &mut Tape<'_>) {
    match tape.u8() {
        0..56 => known_register(machine, tape),
        56..88 => bar(machine, tape),
        88..104 => config_space(machine, tape),
        104..120 => {
            let (index, value) = (u64::from(tape.u8() % 10), tape.mostly_zero());
            let at = offset::DOORBELLS + 4 * index;
            machine.write32(at, value);
        }
        120..152 => start(machine, tape),
        152..180 => admin_command(machine, tape),
        180..200 => host_memory(machine, tape),
        200..212 => interrupts(machine, tape),
        212..220 => {
            let command = [0u16, 2, 4, 6, 0x406, 0x407][usize::from(tape.u8() % 6)];
            machine.config_write(4, &command.to_le_bytes());
        }
        220..229 => machine.program(),
        229 => _ = machine.function.dump(),
        _ => life(machine, tape),
    }
}

/// A write to, or a read of, a register that is there, with a value that it may well get.
fn known_register(machine: &Machine, tape: &mut Tape<'_>) {
    let register = tape.pick(&WRITABLE);
    let value = match register {
        offset::CC => match tape.u8() {
            bits @ 0..200 => {
                let cc = Cc::new().with_en(bits & 1 == 1).with_iosqes(6);
                let shn = if bits & 6 == 6 { bits >> 3 & 3 } else { 0 };
                cc.with_iocqes(4).with_shn(shn).into_bits().into()
            }
            _ => tape.u64(),
        },
        offset::NSSR if tape.u8() < 128 => u64::from(0x4e56_4d65u32),
        offset::AQA => u64::from(tape.u8()) | u64::from(tape.u8()) << 16,
        offset::ASQ | offset::ACQ => address(tape) & !(PAGE - 1),
        offset::CMBMSC | offset::PMRMSC => address(tape) & !(PAGE - 1) | u64::from(tape.u8() & 3),
        _ => tape.mostly_zero().into(),
    };
    match tape.u8() {
        0..160 => machine.write64(register, value),
        160..208 => machine.write32(register, (value & 0xffff_ffff) as u32),
        208..232 => {
            _ = machine
                .function
                .bar_write(0, register, &value.to_le_bytes())
        }
        _ => _ = machine.read32(register),
    }
}

/// Offset and length, mostly short and inside `size`.
fn span(tape: &mut Tape<'_>, size: u64) -> (u64, usize) {
    let offset = match tape.u8() {
        near @ 0..128 => u64::from(near) * 4,
        128..248 => u64::from(tape.u16()),
        248..252 => size.saturating_sub(u64::from(tape.u8())),
        _ => tape.u64(),
    };
    let length = match tape.u8() {
        which @ 0..200 => [1, 2, 4, 8][usize::from(which & 3)],
        other @ 200..240 => usize::from(other - 200),
        _ => usize::from(tape.u16() & 0x1fff),
    };
    (offset, length)
}

/// Any access to any BAR. It is refused where it leaves it, and only there.
fn bar(machine: &Machine, tape: &mut Tape<'_>) {
    let function = &machine.function;
    let what = tape.u8();
    let index = match what >> 1 {
        0..100 => [0, 0, 0, 2, 4][usize::from(what >> 1) % 5],
        other => other % 8,
    };
    let size = function.bar_size(index);
    let (offset, length) = span(tape, size);
    let mut data = vec![0; length];
    let result = if what & 1 == 0 {
        data.fill_with(|| tape.u8());
        function.bar_write(index, offset, &data)
    } else {
        function.bar_read(index, offset, &mut data)
    };
    check(result.is_ok(), size, offset, length);
}

fn config_space(machine: &Machine, tape: &mut Tape<'_>) {
    let what = tape.u8();
    let (offset, length) = span(tape, Function::CONFIG_SPACE_SIZE);
    let mut data = vec![0; length];
    let result = if what & 1 == 0 {
        data.fill_with(|| tape.u8());
        machine.function.config_write(offset, &data)
    } else {
        machine.function.config_read(offset, &mut data)
    };
    check(result.is_ok(), Function::CONFIG_SPACE_SIZE, offset, length);
}

fn check(done: bool, size: u64, offset: u64, length: usize) {
    let end = offset.checked_add(length as u64);
    let inside = size > 0 && end.is_some_and(|end| end <= size);
    assert_eq!(done, inside, "{length} bytes at {offset:#x} of {size:#x}");
}

/// All that a driver does to start the controller, so that what follows meets a live one.
fn start(machine: &mut Machine, tape: &mut Tape<'_>) {
    machine.program();
    machine.write32(offset::CC, 0);
    machine.write64(offset::CMBMSC, CMB_AT | 3);
    machine.write64(offset::PMRMSC, PMR_AT | 2);
    machine.write32(offset::PMRCTL, 1);
    machine.write32(offset::AQA, 0x1f_001f);
    machine.write64(offset::ASQ, HOST_AT + PAGE);
    machine.write64(offset::ACQ, HOST_AT + 2 * PAGE);
    let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);
    machine.write32(offset::CC, cc.into_bits());
    if tape.u8() & 1 == 1 {
        machine.enable_msix();
    }
}

/// An admin command in any slot of the queue, and its doorbell; mostly for queues and features.
fn admin_command(machine: &mut Machine, tape: &mut Tape<'_>) {
    let slot = tape.u8() % 32;
    let qid = u32::from(tape.u8() % 4);
    let opcode = tape.pick(&[
        admin::CREATE_IO_CQ,
        admin::CREATE_IO_SQ,
        admin::DELETE_IO_SQ,
        admin::DELETE_IO_CQ,
        admin::IDENTIFY,
        admin::SET_FEATURES,
        admin::ASYNC_EVENT_REQUEST,
        admin::DOORBELL_BUFFER_CONFIG,
    ]);
    let command = Command {
        opcode,
        prp1: (HOST_AT + (3 + u64::from(tape.u8() % 8)) * PAGE).into(),
        prp2: (HOST_AT + 12 * PAGE).into(),
        cdw10: (qid | 0x1f << 16).into(),
        // Physically contiguous; the vector or completion queue.
        cdw11: (1 | qid << 16).into(),
        ..Command::default()
    };
    machine.store(HOST_AT + PAGE + u64::from(slot) * 64, command.as_bytes());
    machine.write32(offset::DOORBELLS, (u32::from(slot) + 1) % 32);
}

/// Mappings of host memory come and go. None is writable where the host's memory is not.
fn host_memory(machine: &Machine, tape: &mut Tape<'_>) {
    let (address, length) = match tape.u8() {
        0..192 => {
            let page = u64::from(tape.u8() % 64);
            (HOST_AT + page * PAGE, u64::from(tape.u8() % 64) * PAGE)
        }
        192..224 => (address(tape), u64::from(tape.u16())),
        _ => (tape.u64(), tape.u64()),
    };
    match tape.u8() {
        0..96 => _ = machine.function.unmap_host_memory(address, length),
        96..104 => machine.function.unmap_all_host_memory(),
        104..200 => {
            let from = u64::from(tape.u8()) % (HOST / PAGE) * PAGE;
            let write = length <= HOST - from;
            machine.map(address, length, write, from);
        }
        _ => {
            machine.map(HOST_AT, HOST, true, 0);
            machine.map(HOST_AT + HOST, READ_ONLY, false, HOST);
        }
    }
}

/// Triggers of interrupts are connected, disconnected, masked.
fn interrupts(machine: &Machine, tape: &mut Tape<'_>) {
    let function = &machine.function;
    // Any file will do that takes eight bytes and does not block.
    let trigger = || {
        let null = File::options().write(true).open("/dev/null").ok()?;
        null.as_fd().try_clone_to_owned().ok().map(File::from)
    };
    let what = tape.u8();
    let file = if what & 1 == 0 { trigger() } else { None };
    match what >> 1 & 3 {
        0 | 1 => {
            let vector = tape.u8();
            let vectors = function.msix_vectors();
            let done = function.set_msix_trigger(vector.into(), file).is_ok();
            assert_eq!(done, u16::from(vector) < vectors, "vector {vector}");
        }
        2 => function.set_intx_trigger(file),
        _ => function.mask_intx(what & 1 == 1),
    }
}

/// Resets, the link, and the slot.
fn life(machine: &mut Machine, tape: &mut Tape<'_>) {
    let function = &machine.function;
    match tape.u8() % 10 {
        0 => machine.function_level_reset(),
        1 => function.reset(ResetKind::FunctionLevel),
        2 => function.reset(ResetKind::Conventional),
        3 => function.reset(ResetKind::ConnectionLost),
        4 => function.disconnect(),
        5 => {
            function.disconnect();
            machine.connect();
        }
        6 => machine.controller.power_cut(),
        7 => machine.replug(),
        _ => machine.connect(),
    }
}
