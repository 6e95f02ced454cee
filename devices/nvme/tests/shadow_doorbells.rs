//! Doorbells in host memory: commands arrive, whoever is faster, and registers are written only when asked for.
#![allow(clippy::unwrap_used)]

mod driver;

use driver::{Driver, Rig, config, take_events, wait_until};
use p2plab_nvme::spec::command::{Command, admin};
use p2plab_nvme::spec::status::Status;
use p2plab_pcie::TlpKind;

/// A controller without CMB and with one queue pair of 16 entries, whose MSI-X vector is taken care of.
fn plug(rig: &mut Rig) -> (Driver, std::fs::File) {
    let mut cfg = config("a");
    (cfg.cmb, cfg.shadow_doorbells) = (None, true);
    let mut d = rig.plug(cfg);
    d.enable();
    let event = d.enable_msix(1);
    d.create_queues(1, 16, None).unwrap();
    (d, event)
}

fn configure(d: &mut Driver, doorbells: u64, events: u64) -> Result<u32, Status> {
    let mut command = Command {
        opcode: admin::DOORBELL_BUFFER_CONFIG,
        ..Command::default()
    };
    (command.prp1, command.prp2) = (doorbells.into(), events.into());
    d.admin(command)
}

fn use_shadows(d: &mut Driver) {
    let pages = d.pages(2);
    configure(d, pages, pages + 4096).unwrap();
    d.shadow = Some((pages, pages + 4096));
}

/// A host that configures its buffer again, be it the same or another, loses nothing that it wrote to the first: with
/// a completion queue that it has emptied, and that the controller has not looked at since, it goes on.
#[test]
fn a_second_buffer_takes_over_from_the_first() {
    for another in [false, true] {
        let mut rig = Rig::new();
        let (mut d, _event) = plug(&mut rig);
        use_shadows(&mut d);
        let buffer = d.pages(1);
        // As many as the queue has room for.
        for _ in 0..15 {
            d.read(0, 8, buffer).unwrap();
        }
        let (doorbells, events) = if another {
            let pages = d.pages(2);
            (pages, pages + 4096)
        } else {
            d.shadow.unwrap()
        };
        configure(&mut d, doorbells, events).unwrap();
        d.shadow = Some((doorbells, events));
        let [tail, head] = [8, 12].map(|at| d.load(doorbells + at, 4));
        assert_eq!((tail, head), (vec![15, 0, 0, 0], vec![15, 0, 0, 0]));
        for _ in 0..20 {
            d.read(0, 8, buffer).unwrap();
        }
    }
}

/// Far more commands than the queue has entries, by ones and by bursts: all complete, and in order. The completion
/// queue's register is written at most once a round of the queue.
#[test]
fn commands_arrive_by_memory() {
    let mut rig = Rig::new();
    let (mut d, _event) = plug(&mut rig);
    // Some by the register first: the shadows begin where the queue is.
    for _ in 0..5 {
        let buffer = d.pages(1);
        d.read(0, 8, buffer).unwrap();
    }
    use_shadows(&mut d);
    let before = (rig.fabric.traffic(), d.rings);
    let buffer = d.pages(1);
    let mut commands = 0;
    for round in 0..300u64 {
        let burst = 1 + round % 15;
        let cids: Vec<u16> = (0..burst)
            .map(|block| {
                let read = d.transfer(2, block, 1, buffer);
                d.submit(1, read)
            })
            .collect();
        for cid in cids {
            let completion = d.complete(1);
            assert_eq!(
                (completion.cid.get(), completion.status()),
                (cid, Status::SUCCESS)
            );
            commands += 1;
        }
    }
    let rings = d.rings - before.1;
    assert!(
        rings < 2 * commands,
        "{rings} register writes for {commands} commands"
    );
    let traffic = rig.fabric.traffic().since(&before.0);
    // What was not written to registers was looked at in memory, and counted.
    let written = traffic.between("cpu", "nvme0", TlpKind::MWr).tlps;
    assert_eq!(written, rings);
    let read = traffic.between("nvme0", "memory", TlpKind::MRd).tlps;
    assert!(read > commands, "{traffic}");
    rig.fabric.traffic().check().unwrap();
}

/// A host that does not consume completions stops the controller; it goes on when it hears that there is room.
#[test]
fn a_full_completion_queue_is_looked_at() {
    let mut rig = Rig::new();
    let (mut d, _event) = plug(&mut rig);
    use_shadows(&mut d);
    let buffer = d.pages(1);
    for _ in 0..40 {
        for block in 0..15 {
            let read = d.transfer(2, block, 1, buffer);
            d.submit(1, read);
        }
        for _ in 0..15 {
            assert!(d.complete(1).status().is_success());
        }
    }
}

/// Interrupts come as without shadow doorbells: a host that sleeps until one comes always wakes up.
#[test]
fn every_command_interrupts_a_sleeping_host() {
    let mut rig = Rig::new();
    let (mut d, event) = plug(&mut rig);
    use_shadows(&mut d);
    let buffer = d.pages(1);
    for _ in 0..500 {
        let read = d.transfer(2, 0, 1, buffer);
        d.submit(1, read);
        wait_until("an interrupt", || (take_events(&event) > 0).then_some(()));
        assert!(d.poll(1).unwrap().status().is_success());
    }
}

/// Queues that are made later use the buffers too, and a reset ends their use.
#[test]
fn buffers_last_until_a_reset() {
    let mut rig = Rig::new();
    let (mut d, _event) = plug(&mut rig);
    use_shadows(&mut d);
    d.create_queues(2, 8, None).unwrap();
    let buffer = d.pages(1);
    for _ in 0..20 {
        let read = d.transfer(2, 0, 1, buffer);
        d.execute(2, read).unwrap();
    }
    d.disable();
    d.shadow = None;
    d.enable();
    d.create_queues(1, 16, None).unwrap();
    let rings = d.rings;
    d.read(0, 1, buffer).unwrap();
    assert_eq!(d.rings - rings, 2);
}

/// What a host may get wrong is refused, or fails its own controller.
#[test]
fn bad_buffers_and_indices_are_survived() {
    let mut rig = Rig::new();
    let (mut d, _event) = plug(&mut rig);
    let pages = d.pages(2);
    let bare = |status: Status| Status(status.code());
    assert_eq!(
        configure(&mut d, pages + 8, pages),
        Err(bare(Status::INVALID_FIELD))
    );
    assert_eq!(
        configure(&mut d, pages, pages + 4),
        Err(bare(Status::INVALID_FIELD))
    );
    assert_eq!(
        configure(&mut d, 1 << 60, pages),
        Err(bare(Status::DATA_TRANSFER_ERROR))
    );
    use_shadows(&mut d);
    let (doorbells, _) = d.shadow.unwrap();
    // No such tail: reported, and not followed.
    d.store(doorbells + 8, &0xffff_u32.to_le_bytes());
    d.write32(0x1008, 0);
    let buffer = d.pages(1);
    d.store(doorbells + 8, &0u32.to_le_bytes());
    d.read(0, 1, buffer).unwrap();
    // A head past the tail: not followed, and the queue goes on once it is right again.
    d.store(doorbells + 12, &9u32.to_le_bytes());
    d.write32(0x100c, 9);
    d.store(doorbells + 12, &1u32.to_le_bytes());
    d.read(0, 1, buffer).unwrap();
    assert!(!d.status().cfs());
    // Memory that is gone: the controller fails, and a reset brings it back.
    d.function.unmap_host_memory(doorbells, 4096).unwrap();
    d.write32(0x1008, 0);
    d.wait_status("CSTS.CFS", |csts| csts.cfs());
    d.shadow = None;
    d.disable();
    d.enable();
    d.create_queues(1, 16, None).unwrap();
    d.read(0, 1, buffer).unwrap();
}

/// Where the CPU reaches memory of the controller's by messages, a doorbell would overtake them: none is offered.
#[test]
fn a_trapped_cmb_excludes_them() {
    let mut rig = Rig::new();
    let mut cfg = config("a");
    cfg.shadow_doorbells = true;
    let mut d = rig.plug(cfg);
    d.enable();
    let pages = d.pages(2);
    let refused = Err(Status(Status::INVALID_OPCODE.code()));
    assert_eq!(configure(&mut d, pages, pages + 4096), refused);
}

/// Two submission queues with one completion queue, which is full most of the time: their workers look at its head at
/// once, and none takes it back to what another one has passed. That would be an Invalid Doorbell Write Value.
#[test]
fn workers_that_share_a_completion_queue_agree_on_its_head() {
    let mut rig = Rig::new();
    let (mut d, _event) = plug(&mut rig);
    d.create_queues(2, 4, None).unwrap();
    // Queue 3 completes where queue 2 does.
    let sq = d.pages(1);
    let mut create = Command {
        opcode: admin::CREATE_IO_SQ,
        prp1: sq.into(),
        ..Command::default()
    };
    (create.cdw10, create.cdw11) = ((3u32 | 15 << 16).into(), (1u32 | 2 << 16).into());
    d.admin(create).unwrap();
    let mut third = d.queue(2).clone();
    (third.id, third.sq, third.entries, third.tail) = (3, sq, 16, 0);
    d.io_queues.push(third);
    use_shadows(&mut d);
    let buffer = d.pages(1);
    for _ in 0..4000 {
        for index in [2, 3] {
            for _ in 0..3 {
                let read = d.transfer(2, 0, 1, buffer);
                d.push(index, read);
            }
        }
        d.ring_doorbell(2);
        d.ring_doorbell(3);
        for _ in 0..6 {
            assert!(d.complete(2).status().is_success());
        }
    }
    let errors = d.log_page(1, 8);
    assert_eq!(errors, [0; 8], "an error was logged");
}
