//! Peer memory comes and goes, at length: `cargo test` does a few rounds, ci/p2pmem-stress.sh a thousand in one guest.

use std::time::Instant;

use p2plab::topology::{CmbOptions, MIB, Nvme, Nvram, PmrOptions, Topology, TopologyBuilder};
use p2plab_tests::TestLab;
use p2plab_tests::p2pmem::{AWAY, CMB_BAR, Memory, NVRAM_BAR, PMR_BAR, complaints_in, start, user};

/// Rounds, where the variable does not say another number.
const ROUNDS: usize = 20;
/// See [`ROUNDS`].
const VARIABLE: &str = "P2PLAB_P2PMEM_ROUNDS";
/// Rounds between two lines about them, in a long run.
const TOLD: usize = 20;
/// Rounds after which the guest's kernel has what it needs.
const WARM_UP: usize = 10;
/// What its unreclaimable memory may grow by afterwards, in KiB: at all, where caches fill and empty, and in each round. A
/// thousand rounds show a leak of two pages in each; without one they took a third of a page each.
const GROWTH: (u64, u64) = (2048, 4);
/// Bytes of each memory.
const SIZE: u64 = 64 * MIB;
/// Endpoints with memory, and its BAR: one is pulled out in each round, in turn.
const PROVIDERS: [(&str, u8); 3] = [("nv0", NVRAM_BAR), ("ssd0", CMB_BAR), ("ssd2", PMR_BAR)];

/// An NVRAM card, an SSD with a CMB, one with a PMR, and `ssd1` that uses them.
fn topology() -> TopologyBuilder {
    let ssd = || Nvme::memory(16 * MIB).intx();
    let cmb = CmbOptions::new(SIZE).data_only().mapped();
    Topology::builder("p2pmem-stress")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvram("nv0", "sw0.0", Nvram::memory(SIZE).mapped())
        .nvme("ssd0", "sw0.1", ssd().cmb_with(cmb))
        .nvme(
            "ssd2",
            "sw0.2",
            ssd().pmr(PmrOptions::memory(SIZE).mapped()),
        )
        .nvme("ssd1", "sw0.3", user())
        .own_module("nvme")
}

/// Says which round it was that panicked.
struct Round(usize);

impl Drop for Round {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in round {}", self.0);
        }
    }
}

/// In each round memory is bound, mapped, copied through, held in all ways and pulled out at another moment of the copy,
/// and what was pulled out in the round before comes back. In every other round a second device goes at the same time,
/// by unbinding or by removal from the kernel's list. In each, all of the memory is free again when users have come and
/// gone, nothing but the failed transfers is in the kernel's log, and the counters keep their laws. The kernel's memory
/// does not grow with the rounds.
#[test]
fn comes_and_goes_under_load() {
    let rounds: usize = match std::env::var(VARIABLE) {
        Ok(text) => (text.parse()).unwrap_or_else(|error| panic!("{VARIABLE}={text}: {error}")),
        Err(_) => ROUNDS,
    };
    assert!(rounds > 0, "{VARIABLE}");
    let ssds = ["ssd0", "ssd1", "ssd2"];
    let mut lab = start("p2pmem_comes_and_goes_under_load", topology(), &ssds);
    let memories = PROVIDERS.map(|(name, bar)| Memory::of(&lab, name, bar, SIZE));
    let lost = memories[0].lost_transfers();
    let lost = lost.each_ref().map(String::as_str);
    let (since, mut kernel) = (Instant::now(), kernel_memory(&lab));
    let mut pulled = [0; PROVIDERS.len()];
    let mut seconds = [0; AWAY.len()];
    for round in 0..rounds {
        let _round = Round(round);
        let (victim, next) = (round % PROVIDERS.len(), (round + 1) % PROVIDERS.len());
        let second = (round % 2 == 1).then_some(round / 2 % AWAY.len());
        let meanwhile = second.map(|way| (&memories[next], AWAY[way]));
        pull_out(&mut lab, &memories[victim], round, meanwhile);
        pulled[victim] += 1;
        if let Some(way) = second {
            seconds[way] += 1;
        }
        if round > 0 {
            let before = &memories[(round - 1) % PROVIDERS.len()];
            lab.attach(&before.name).unwrap();
            before.is_free(&lab);
        }
        let log = lab.guest().unwrap().sh("dmesg -r -c").unwrap();
        assert!(log.contains("Card not present"), "{log}");
        assert_eq!(complaints_in(&log, &lost), Vec::<String>::new());
        assert_eq!(lab.traffic().check(), Ok(()));
        if round + 1 == WARM_UP {
            kernel = kernel_memory(&lab);
        }
        if rounds > ROUNDS && (round + 1) % TOLD == 0 {
            let elapsed = since.elapsed().as_secs();
            println!("round {} of {rounds}, {elapsed} s", round + 1);
        }
    }
    let last = &memories[(rounds - 1) % PROVIDERS.len()];
    lab.attach(&last.name).unwrap();
    for memory in &memories {
        memory.back(&lab);
    }
    let (elapsed, kernel_after) = (since.elapsed().as_secs(), kernel_memory(&lab));
    memories[0].sh(&lab, "rmmod p2pmem && rmmod dmabuf_importer");
    let log = lab.guest().unwrap().sh("dmesg -r -c").unwrap();
    assert_eq!(complaints_in(&log, &lost), Vec::<String>::new());
    lab.finish();
    println!(
        "{rounds} rounds in {elapsed} s; pulled out: NVRAM {}, CMB {}, PMR {}; meanwhile unbound {}, removed {}; \
         unreclaimable memory of the guest's kernel: {kernel} KiB after the warm-up, {kernel_after} KiB at the end",
        pulled[0], pulled[1], pulled[2], seconds[0], seconds[1]
    );
    if let Some(more) = rounds.checked_sub(WARM_UP) {
        let bound = kernel + GROWTH.0 + GROWTH.1 * more as u64;
        assert!(kernel_after <= bound, "{kernel_after} KiB, not {bound}");
    }
}

/// One round, but for the return of what was pulled out. `second`: the device that goes meanwhile, and how.
fn pull_out(
    lab: &mut TestLab,
    memory: &Memory,
    round: usize,
    second: Option<(&Memory, (&str, &str))>,
) {
    let others = second.iter().map(|(other, _)| *other);
    for held in std::iter::once(memory).chain(others) {
        held.back(lab);
        held.hold(lab);
    }
    let before = memory.copy(lab);
    if let Some((other, (away, again))) = second {
        // In the background, so that both go at once.
        other.sh(lab, &format!("({away}; {again}; touch /tmp/again-NAME) &"));
    }
    // Each round at another moment of the copy, over 50 ms.
    memory.sh(lab, &format!("usleep {}", round * 7919 % 50_000));
    lab.surprise_remove(&memory.name).unwrap();
    memory.released(lab);
    memory.copy_failed(lab, &before);
    memory.gone(lab);
    if let Some((other, _)) = second {
        other.released(lab);
        let again = "until rm /tmp/again-NAME 2> /dev/null; do usleep 10000; done";
        other.sh(lab, again);
        other.is_free(lab);
    }
}

/// Memory of the guest's kernel that cannot be reclaimed, in KiB.
fn kernel_memory(lab: &TestLab) -> u64 {
    let line = "awk '/^SUnreclaim/ { print $2 }' /proc/meminfo";
    let text = lab.guest().unwrap().sh(line).unwrap();
    text.trim().parse().unwrap()
}
