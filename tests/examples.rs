//! The examples of the talk as their users run them: what the commands print and write is what a copy must have moved.
//!
//! What that is, is calculated here, from the specifications and from what is copied.

use std::collections::BTreeMap;

use p2plab::topology::MIB;
use p2plab_tests::HostShare;
use serde_json::Value;

use crate::command_line::{run, text};

/// Bytes copied.
const SIZE: u64 = 64 * MIB;
/// Bytes of one read and of one write, of which each is one command.
const CHUNK: u64 = MIB;
/// Commands: reads of ssd0, and writes of ssd1, behind which is a flush.
const COMMANDS: [(&str, u64); 2] = [("ssd0", SIZE / CHUNK), ("ssd1", SIZE / CHUNK + 1)];
/// Bytes of a submission queue entry, of a completion queue entry, and of an SGL descriptor (NVMe Base 2.0, sections
/// 3.3.3.1, 3.3.3.2 and 4.1.2).
const SUBMISSION: u64 = 64;
/// See [`SUBMISSION`].
const COMPLETION: u64 = 16;
/// See [`SUBMISSION`].
const DESCRIPTOR: u64 = 16;
/// What Linux leaves in Device Control: Max_Payload_Size.
const PACKET: u64 = 128;
/// And Max_Read_Request_Size.
const REQUEST: u64 = 512;

/// A DMA of all the data: from, to, and how.
type Way = (&'static str, &'static str, &'static str);
/// Payload bytes, packets, and bytes asked for.
type Sums = [u64; 3];
/// What was sent, by from, to, and kind.
type Matrix = BTreeMap<[String; 3], Sums>;

const MODES: [&str; 2] = ["classic", "p2p"];
const CLASSIC: [Way; 2] = [("ssd0", "memory", "MemWr"), ("memory", "ssd1", "MemRd")];

/// An example as it is run, and what it must show.
struct Example {
    name: &'static str,
    options: &'static [&'static str],
    /// What the copy goes through, peer to peer.
    through: &'static str,
    /// What is in the switch's first ports.
    endpoints: &'static [&'static str],
    /// The SSD in whose CMB its submission queues are.
    own_queues: Option<&'static str>,
    /// The DMAs of the data, peer to peer: what an SSD moves within itself is none.
    ways: &'static [Way],
    /// What the talk's hardware had, in MB/s.
    talk: Option<u64>,
}

/// One DMA into the card by Memory Writes, one out of it by Memory Reads.
#[test]
fn nvram_copy_prints_two_dmas() {
    Example {
        name: "nvram-copy",
        options: &[],
        through: "the NVRAM card nv0",
        endpoints: &["ssd0", "ssd1", "nv0"],
        own_queues: None,
        ways: &[("ssd0", "nv0", "MemWr"), ("nv0", "ssd1", "MemRd")],
        talk: Some(600),
    }
    .holds();
}

/// The main job, as the README has it, with the CMB of the source: ssd1 reads from it.
#[test]
fn nvme_cmb_copy_prints_one_dma() {
    Example {
        name: "nvme-cmb-copy",
        options: &[],
        through: "the CMB of ssd0",
        endpoints: &["ssd0", "ssd1"],
        own_queues: Some("ssd0"),
        ways: &[("ssd0", "ssd1", "MemRd")],
        talk: Some(1600),
    }
    .holds();
}

/// The CMB of the destination, into which ssd0 writes, and that of a third, which takes two DMAs.
#[test]
fn nvme_cmb_copy_prints_the_dmas_of_other_buffers() {
    Example {
        name: "nvme-cmb-copy",
        options: &["--buffer", "destination"],
        through: "the CMB of ssd1",
        endpoints: &["ssd0", "ssd1"],
        own_queues: Some("ssd1"),
        ways: &[("ssd0", "ssd1", "MemWr")],
        talk: Some(1600),
    }
    .holds();
    Example {
        name: "nvme-cmb-copy",
        options: &["--buffer", "third"],
        through: "the CMB of ssd2",
        endpoints: &["ssd0", "ssd1", "ssd2"],
        own_queues: None,
        ways: &[("ssd0", "ssd2", "MemWr"), ("ssd2", "ssd1", "MemRd")],
        talk: Some(1600),
    }
    .holds();
}

/// The same for each PMR. The talk is older, and the output says that it has no figures for it.
#[test]
fn nvme_pmr_copy_prints_the_dmas_of_each_buffer() {
    Example {
        name: "nvme-pmr-copy",
        options: &["--buffer", "source"],
        through: "the PMR of ssd0",
        endpoints: &["ssd0", "ssd1"],
        own_queues: None,
        ways: &[("ssd0", "ssd1", "MemRd")],
        talk: None,
    }
    .holds();
    Example {
        name: "nvme-pmr-copy",
        options: &["--buffer", "destination"],
        through: "the PMR of ssd1",
        endpoints: &["ssd0", "ssd1"],
        own_queues: None,
        ways: &[("ssd0", "ssd1", "MemWr")],
        talk: None,
    }
    .holds();
    Example {
        name: "nvme-pmr-copy",
        options: &["--buffer", "third"],
        through: "the PMR of ssd2",
        endpoints: &["ssd0", "ssd1", "ssd2"],
        own_queues: None,
        ways: &[("ssd0", "ssd2", "MemWr"), ("ssd2", "ssd1", "MemRd")],
        talk: None,
    }
    .holds();
}

impl Example {
    /// Runs it and holds all that it prints and writes.
    fn holds(&self) {
        let shown = Shown::run(self);
        shown.holds_head(self);
        shown.holds_speed();
        for (mode, ways) in MODES.into_iter().zip([&CLASSIC[..], self.ways]) {
            shown.holds_ways(mode, ways);
            let (dma, rest) = shown.matrix(mode);
            self.holds_dma(mode, dma, ways);
            self.holds_signals(rest);
        }
        shown.holds_ports(self.endpoints);
    }

    /// What was moved by DMA is what the commands ask for, to the byte and packet.
    fn holds_dma(&self, mode: &str, dma: Matrix, ways: &[Way]) {
        let mut expected = Matrix::new();
        for (from, to, by) in ways {
            match *by {
                "MemWr" => write(&mut expected, from, to, SIZE, SIZE / PACKET),
                _ => read(
                    &mut expected,
                    to,
                    from,
                    SIZE,
                    [SIZE / REQUEST, SIZE / PACKET],
                ),
            }
        }
        for (ssd, commands) in COMMANDS {
            if self.own_queues != Some(ssd) {
                read(
                    &mut expected,
                    ssd,
                    "memory",
                    commands * SUBMISSION,
                    [commands; 2],
                );
            }
            write(
                &mut expected,
                ssd,
                "memory",
                commands * COMPLETION,
                commands,
            );
            if mode == "p2p" {
                // A chunk is one run of addresses there, and Linux makes a list of it all the same.
                let chunks = SIZE / CHUNK;
                read(
                    &mut expected,
                    ssd,
                    "memory",
                    chunks * DESCRIPTOR,
                    [chunks; 2],
                );
            }
        }
        if mode == "p2p" {
            assert_eq!(dma, expected, "{}", self.name);
            return;
        }
        // Whether a chunk of host memory needs a list is the kernel's luck with large pages.
        assert!(dma.keys().eq(expected.keys()), "{dma:?} {expected:?}");
        for (key, sums) in dma {
            let least = expected[&key];
            let lists = SIZE / 4096 * DESCRIPTOR;
            match key.each_ref().map(String::as_str) {
                ["memory", _, "CplD"] => assert!(sums[0] - least[0] <= lists, "{key:?} {sums:?}"),
                [_, "memory", "MRd"] => assert!(sums[2] - least[2] <= lists, "{key:?} {sums:?}"),
                _ => assert_eq!(sums, least, "{key:?}"),
            }
        }
    }

    /// Beside DMA there are doorbells, at most two for a command, interrupts, at most one, submission queue entries that
    /// the CPU writes into a CMB, and a few accesses to configuration space.
    fn holds_signals(&self, mut rest: Matrix) {
        for (ssd, commands) in COMMANDS {
            let mut take = |from: &str, to: &str| {
                rest.remove(&[from, to, "MWr"].map(str::to_owned))
                    .unwrap_or_default()
            };
            let entries = match self.own_queues {
                Some(owner) if owner == ssd => commands * SUBMISSION,
                _ => 0,
            };
            let written = take("cpu", ssd)[0];
            let doorbells = entries + 4..=entries + 2 * 4 * commands;
            assert!(
                doorbells.contains(&written),
                "{ssd}: {written} {doorbells:?}"
            );
            let signalled = take(ssd, "interrupts")[0];
            assert!(
                (4..=4 * commands).contains(&signalled),
                "{ssd}: {signalled}"
            );
        }
        let others: u64 = rest.values().map(|sums| sums[0]).sum();
        assert!(others < 512, "{rest:?}");
    }
}

/// `bytes` written in as many packets.
fn write(matrix: &mut Matrix, from: &str, to: &str, bytes: u64, packets: u64) {
    add(matrix, [from, to, "MWr"], [bytes, packets, 0]);
}

/// `bytes` read by requests, and brought by completions.
fn read(matrix: &mut Matrix, by: &str, from: &str, bytes: u64, [asked, brought]: [u64; 2]) {
    add(matrix, [by, from, "MRd"], [0, asked, bytes]);
    add(matrix, [from, by, "CplD"], [bytes, brought, 0]);
}

fn add(matrix: &mut Matrix, key: [&str; 3], sums: Sums) {
    let all = matrix.entry(key.map(str::to_owned)).or_default();
    for (all, more) in all.iter_mut().zip(sums) {
        *all += more;
    }
}

/// What a command printed, and the file that it wrote.
struct Shown {
    table: String,
    json: Value,
}

impl Shown {
    fn run(example: &Example) -> Self {
        let _share = HostShare::take();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        let path = path.to_str().unwrap();
        let arguments = ["run", example.name, "--size", "64MiB", "--json", path];
        let output = run(&[&arguments, example.options].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        let json = std::fs::read_to_string(path).unwrap();
        Self {
            table: text(&output.stdout),
            json: serde_json::from_str(&json).unwrap(),
        }
    }

    /// What stands behind `label`, with which exactly one line begins; numbers without their commas.
    fn line(&self, label: &str) -> String {
        let mut rest = self.table.lines().filter_map(|l| l.strip_prefix(label));
        match (rest.next(), rest.next()) {
            (Some(rest), None) => rest.trim().replace(',', ""),
            _ => panic!("not one line with {label:?} in\n{}", self.table),
        }
    }

    fn number(&self, pointer: &str) -> f64 {
        self.json.pointer(pointer).unwrap().as_f64().unwrap()
    }

    /// A figure of both modes.
    fn both(&self, key: &str) -> [f64; 2] {
        MODES.map(|mode| self.number(&format!("/modes/{mode}/{key}")))
    }

    /// Those of the list `key` that are of `mode`.
    fn of<'a>(&'a self, key: &str, mode: &'a str) -> impl Iterator<Item = &'a Value> {
        let all = self.json[key].as_array().unwrap().iter();
        all.filter(move |entry| entry["mode"] == mode)
    }

    /// What was moved by DMA, and the rest: what the CPU sent and got, and interrupts.
    fn matrix(&self, mode: &str) -> (Matrix, Matrix) {
        let (mut dma, mut rest) = (Matrix::new(), Matrix::new());
        for entry in self.of("matrix", mode) {
            let key = ["source", "destination", "kind"].map(|key| entry[key].as_str().unwrap());
            let sums = ["payload_bytes", "tlps", "requested_bytes"];
            let sums = sums.map(|key| entry[key].as_u64().unwrap());
            let is_dma = key[0] != "cpu" && key[1] != "cpu" && key[1] != "interrupts";
            add(if is_dma { &mut dma } else { &mut rest }, key, sums);
        }
        (dma, rest)
    }

    /// Payload bytes and packets between `below` and everyone else.
    fn crossed(&self, mode: &str, below: &[&str]) -> [u64; 2] {
        let (dma, rest) = self.matrix(mode);
        let is_below = |name: &String| below.contains(&name.as_str());
        let all = dma.iter().chain(&rest);
        let crossing = all.filter(|([from, to, _], _)| is_below(from) != is_below(to));
        crossing.fold([0; 2], |sum, (_, more)| {
            [sum[0] + more[0], sum[1] + more[1]]
        })
    }

    /// What was run, and what the talk had.
    fn holds_head(&self, example: &Example) {
        let (name, through) = (example.name, example.through);
        let description =
            format!("from ssd0 to ssd1; classic: through host memory; p2p: through {through}");
        let head =
            format!("{name}: 64MiB in chunks of 1MiB (2 threads, depth 4)\n{description}\n\n");
        assert!(self.table.starts_with(&head), "{}", self.table);
        let talk = match example.talk {
            Some(rate) => format!(
                "The talk, on hardware of 2017, 8 GB: about {rate} MB/s peer to peer; at the upstream port about 16 GB \
                 classic, 15 MB peer to peer."
            ),
            None => "The talk, of 2017, printed no figures for this copy.".to_owned(),
        };
        assert_eq!(self.table.lines().last(), Some(talk.as_str()));
        let written = &self.json["talk"]["p2p_bytes_per_second"];
        assert_eq!(written.as_u64(), example.talk.map(|rate| rate * 1_000_000));
        for (key, value) in [
            ("schema_version", 1),
            ("size_bytes", SIZE),
            ("chunk_bytes", CHUNK),
        ] {
            assert_eq!(self.json[key], value, "{key}");
        }
        assert_eq!(self.json["scenario"], name);
        assert_eq!(self.json["description"], description);
        assert!(
            self.json["versions"]["qemu"].is_string()
                && self.json["versions"]["kernel"].is_string()
        );
    }

    /// Throughput and time of both modes, that every byte was compared, and what the upstream port was spared.
    fn holds_speed(&self) {
        let (seconds, rates) = (self.both("seconds"), self.both("bytes_per_second"));
        for (seconds, rate) in seconds.into_iter().zip(rates) {
            assert!((rate * seconds / SIZE as f64 - 1.0).abs() < 1e-6, "{rate}");
        }
        let words = |label: &str| {
            let line = self.line(label);
            let words = line.split_whitespace().map(str::to_owned);
            words.collect::<Vec<_>>()
        };
        let [classic, p2p] = rates.map(|rate| format!("{:.0}", rate / 1e6));
        assert_eq!(words("throughput"), [&classic, "MB/s", &p2p, "MB/s"]);
        let [classic, p2p] = seconds.map(|seconds| format!("{seconds:.2}"));
        assert_eq!(words("time"), [&classic, "s", &p2p, "s"]);
        assert_eq!(
            self.line("every byte compared")
                .matches("yes right")
                .count(),
            2
        );
        for mode in MODES {
            assert_eq!(self.json["modes"][mode]["verified"], true);
        }
        let upstream = self.both("usp_payload_bytes");
        let ratio = upstream[1] / upstream[0];
        assert!((self.number("/usp_payload_ratio") / ratio - 1.0).abs() < 1e-6);
        assert_eq!(
            self.line("At the upstream port: "),
            format!(
                "{} payload bytes classic {} peer to peer: 1/{:.0}. Throughput: {:.1} times.",
                upstream[0],
                upstream[1],
                1.0 / ratio,
                rates[1] / rates[0]
            )
        );
    }

    /// The DMAs of all the data are `ways`.
    fn holds_ways(&self, mode: &str, ways: &[Way]) {
        let printed: Vec<String> = ways
            .iter()
            .map(|(from, to, by)| format!("{from} -> {to} by {by}"))
            .collect();
        assert_eq!(
            self.line(&format!("DMA of the data, {mode} ")),
            printed.join(" ")
        );
        let written = self.of("transfers", mode).map(|t| {
            assert!(t["payload_bytes"].as_u64() >= Some(SIZE), "{t}");
            ["from", "to", "by"].map(|key| t[key].as_str().unwrap())
        });
        let written: Vec<_> = written.map(|[from, to, by]| (from, to, by)).collect();
        assert_eq!(written, ways);
    }

    /// Each port has, printed and written, the sum of what passed between those below it and those above it.
    fn holds_ports(&self, endpoints: &[&str]) {
        let mut ports = vec![
            ("rp0".to_owned(), " root port".to_owned(), endpoints),
            ("sw0".to_owned(), " USP".to_owned(), endpoints),
        ];
        for at in 0..4 {
            let below = endpoints.get(at..=at).unwrap_or_default();
            let who = below.iter().map(|name| format!(" ({name})"));
            let what = format!(" DSP{}", who.collect::<String>());
            ports.push((format!("sw0.{at}"), what, below));
        }
        for (name, what, below) in ports {
            let expected = MODES.map(|mode| self.crossed(mode, below));
            let row = self.line(&format!("{name}{what} "));
            let printed: Vec<u64> = row.split(' ').filter_map(|n| n.parse().ok()).collect();
            assert_eq!(printed, expected.concat(), "{name}");
            for (mode, expected) in MODES.into_iter().zip(expected) {
                let mut mine = self
                    .of("ports", mode)
                    .filter(|p| p["name"] == name.as_str());
                let port = mine.next().unwrap();
                let written = ["payload_bytes", "tlps"].map(|key| port[key].as_u64().unwrap());
                assert_eq!(written, expected, "{name}");
                let report = &self.json["modes"][mode];
                if name == "sw0" {
                    let keys = ["usp_payload_bytes", "usp_tlps"];
                    assert_eq!(keys.map(|key| report[key].as_u64().unwrap()), expected);
                }
            }
        }
    }
}
