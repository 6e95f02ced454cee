//! Finds the kernel's reports in the console's bytes. Pure: bytes and instants in, reports out.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::fault::{FaultKind, GuestFault};

/// Lines kept for a report's tail: an oops with registers and trace has about 60.
const LINES_KEPT: usize = 100;
/// The longest line kept; the rest of a longer one is passed over.
const LINE_KEPT: usize = 1024;
/// Warnings kept. A guest that warns in a loop fills no memory.
const WARNINGS_KEPT: usize = 100;
/// A report is over when the console has been silent for this long,
const QUIET: Duration = Duration::from_millis(300);
/// or, should it never be, this long after its first line.
const LONGEST_REPORT: Duration = Duration::from_secs(2);
/// A panic has a last line of its own; between its trace and that the kernel stops the other CPUs, in silence. It is
/// over without that line only after this long.
const LONGEST_PANIC: Duration = Duration::from_secs(10);

/// What the scanner knows of the console.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    line: Vec<u8>,
    lines: VecDeque<String>,
    warnings: Vec<String>,
    report: Option<Report>,
}

/// A report whose end has not come yet.
#[derive(Debug)]
struct Report {
    kind: FaultKind,
    line: String,
    began: Instant,
    latest: Instant,
    complete: bool,
}

impl Scanner {
    /// Takes the next bytes, cut anywhere.
    pub(super) fn feed(&mut self, bytes: &[u8], now: Instant) {
        for &byte in bytes {
            match byte {
                b'\n' => self.end_line(now),
                _ if self.line.len() < LINE_KEPT => self.line.push(byte),
                _ => {}
            }
        }
        if let Some(report) = &mut self.report {
            report.latest = now;
        }
    }

    fn end_line(&mut self, now: Instant) {
        let line = String::from_utf8_lossy(&self.line)
            .trim_end_matches('\r')
            .to_owned();
        self.line.clear();
        let message = message(&line);
        if is_warning(message) && self.warnings.len() < WARNINGS_KEPT {
            self.warnings.push(line.clone());
        }
        match (fault_kind(message), &mut self.report) {
            (Some(kind), None) => {
                let line = message.to_owned();
                self.report = Some(Report {
                    kind,
                    line,
                    began: now,
                    latest: now,
                    complete: false,
                });
            }
            // An oops that becomes a panic is a panic.
            (Some(kind), Some(report)) if kind > report.kind => {
                report.kind = kind;
                report.line = message.to_owned();
            }
            _ => {}
        }
        if let Some(report) = &mut self.report {
            report.complete |= message.contains("---[ end Kernel panic");
        }
        if self.lines.len() == LINES_KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// How long the reader may wait for more bytes before [`Scanner::due`] must be asked again.
    pub(super) fn patience(&self, now: Instant) -> Option<Duration> {
        self.report
            .as_ref()
            .map(|report| report.ends().saturating_duration_since(now))
    }

    /// The report, once it is over. `closed`: no more bytes will come.
    pub(super) fn due(&mut self, now: Instant, closed: bool) -> Option<GuestFault> {
        let over = |report: &mut Report| closed || report.complete || report.ends() <= now;
        let Report { kind, line, .. } = self.report.take_if(over)?;
        Some(GuestFault {
            kind,
            line,
            tail: self.tail(),
        })
    }

    /// The last lines, with an unfinished one.
    pub(super) fn tail(&self) -> Vec<String> {
        let unfinished = String::from_utf8_lossy(&self.line);
        let unfinished = Some(unfinished.into_owned()).filter(|line| !line.is_empty());
        self.lines.iter().cloned().chain(unfinished).collect()
    }

    /// Kernel warnings so far (the first hundred).
    pub(super) fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl Report {
    fn ends(&self) -> Instant {
        match self.kind {
            FaultKind::Panic => self.began + LONGEST_PANIC,
            _ => (self.latest + QUIET).min(self.began + LONGEST_REPORT),
        }
    }
}

/// The kernel's message without its prefix, `[   12.345678] ` or `[   12.345678][  T123] `, behind
/// which a shell's prompt or a program's unfinished line may stand.
fn message(line: &str) -> &str {
    let mut stamps = line.match_indices('[').filter_map(|(at, _)| {
        let (stamp, rest) = line.get(at + 1..)?.split_once(']')?;
        let (seconds, fraction) = stamp.trim_start().split_once('.')?;
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        (digits(seconds) && fraction.len() == 6 && digits(fraction)).then_some(rest)
    });
    let Some(rest) = stamps.next_back() else {
        return line;
    };
    let rest = match rest
        .strip_prefix('[')
        .and_then(|caller| caller.split_once(']'))
    {
        Some((_caller, rest)) => rest,
        None => rest,
    };
    rest.trim_start()
}

/// The wordings are those of Linux 6.1 to 7.3: kernel/panic.c, kernel/hung_task.c, kernel/watchdog.c,
/// kernel/rcu/tree_stall.h, lib/bug.c, arch/x86/kernel/dumpstack.c, arch/arm64/kernel/traps.c.
fn fault_kind(message: &str) -> Option<FaultKind> {
    let has = |text: &str| message.contains(text);
    let begins = |text: &str| message.starts_with(text);
    if begins("Kernel panic - not syncing") {
        Some(FaultKind::Panic)
    } else if has("BUG: soft lockup") {
        Some(FaultKind::SoftLockup)
    } else if has("hard LOCKUP") {
        Some(FaultKind::HardLockup)
    } else if begins("Oops: ") || begins("Internal error: ") || begins("general protection fault") {
        Some(FaultKind::Oops)
    } else if begins("BUG: ") || begins("kernel BUG at") || begins("Unable to handle kernel") {
        Some(FaultKind::Bug)
    } else if begins("INFO: task ") && has(" blocked ") && has("for more than") {
        Some(FaultKind::HungTask)
    } else if begins("rcu: INFO: ") && (has("detected stall") || has("self-detected stall")) {
        Some(FaultKind::RcuStall)
    } else {
        None
    }
}

/// `WARNING: CPU: 0 PID: 1 at file:line` up to 6.17, `WARNING: file:line at function, CPU#0: name/1`
/// since; lockdep's have no CPU and count too.
fn is_warning(message: &str) -> bool {
    message.starts_with("WARNING: ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `text` in pieces of `size` bytes, then lets the console be silent.
    fn scan(text: &str, size: usize) -> (Option<GuestFault>, Vec<String>) {
        let mut scanner = Scanner::default();
        let now = Instant::now();
        for piece in text.as_bytes().chunks(size) {
            scanner.feed(piece, now);
        }
        let early = scanner.due(now, false);
        let silent = early.or_else(|| scanner.due(now + QUIET, false));
        let fault = silent.or_else(|| scanner.due(now + LONGEST_PANIC, false));
        (fault, scanner.warnings().to_vec())
    }

    #[test]
    fn every_kind_is_found_however_the_bytes_are_cut() {
        let table = [
            (
                "[    4.2] x\n[    4.277336] Kernel panic - not syncing: sysrq",
                FaultKind::Panic,
            ),
            (
                "[   12.000001][  T123] Oops: 0002 [#1] SMP NOPTI",
                FaultKind::Oops,
            ),
            (
                "[   12.000001] Oops: general protection fault, probably for",
                FaultKind::Oops,
            ),
            ("general protection fault: 0000 [#1]", FaultKind::Oops),
            (
                "[1.000000] BUG: kernel NULL pointer dereference, address: 0",
                FaultKind::Bug,
            ),
            (
                "~ # [    1.000000] kernel BUG at mm/slub.c:563!",
                FaultKind::Bug,
            ),
            (
                "[242.000000] INFO: task cat:9 blocked for more than 120 seconds.",
                FaultKind::HungTask,
            ),
            // Since 7.x, where it waits for I/O.
            (
                "[   21.420551] INFO: task dd:120 blocked in I/O wait for more than 5 seconds.",
                FaultKind::HungTask,
            ),
            (
                "[9.000000] watchdog: BUG: soft lockup - CPU#0 stuck for 26s!",
                FaultKind::SoftLockup,
            ),
            (
                "[9.000000] watchdog: CPU1: Watchdog detected hard LOCKUP on cpu 0",
                FaultKind::HardLockup,
            ),
            (
                "[21.000000] rcu: INFO: rcu_preempt self-detected stall on CPU",
                FaultKind::RcuStall,
            ),
            (
                "[21.000000] rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
                FaultKind::RcuStall,
            ),
            (
                "[    1.000000] Unable to handle kernel paging request at",
                FaultKind::Bug,
            ),
        ];
        for (line, kind) in table {
            for size in [1, 3, 7, 1000] {
                let (fault, _) = scan(&format!("boot\r\n{line}\r\n trace\r\n"), size);
                let fault = fault.unwrap_or_else(|| panic!("{line}"));
                assert_eq!(fault.kind, kind, "{line}");
                assert!(line.ends_with(&fault.line), "{} of {line}", fault.line);
                assert_eq!(fault.tail.last().unwrap(), " trace");
            }
        }
    }

    #[test]
    fn ordinary_lines_are_no_faults() {
        for line in [
            "[    1.000000] Command line: console=ttyS0 panic=-1 oops=panic",
            "[    1.000000] Kernel command line: hung_task_panic=1",
            "grep 'Kernel panic - not syncing' /var/log/messages",
            "# echo BUG: here",
            "[    1.000000] rcu: INFO: everything is fine",
            "[    1.000000] debug: DEBUG: x",
        ] {
            assert_eq!(scan(&format!("{line}\n"), 5).0, None, "{line}");
        }
    }

    #[test]
    fn an_oops_that_ends_in_a_panic_is_one_panic_with_the_whole_tail() {
        let text = "[1.000000] BUG: kernel NULL pointer dereference, address: 0000000000000000\n\
                    [1.000000] Oops: Oops: 0002 [#1] SMP\n[1.000000] RIP: 0010:f\n\
                    [1.000000] ---[ end trace 0000000000000000 ]---\n\
                    [1.000000] Kernel panic - not syncing: Fatal exception\n\
                    [1.000000] ---[ end Kernel panic - not syncing: Fatal exception ]---\n";
        let mut scanner = Scanner::default();
        let now = Instant::now();
        let (first, rest) = text.split_at(150);
        scanner.feed(first.as_bytes(), now);
        assert_eq!(scanner.due(now, false), None, "the report goes on");
        assert_eq!(scanner.patience(now), Some(QUIET));
        scanner.feed(rest.as_bytes(), now);
        let fault = scanner
            .due(now, false)
            .expect("the end marker ends the wait");
        assert_eq!(fault.kind, FaultKind::Panic);
        assert_eq!(fault.tail.len(), 6);
        assert_eq!(scanner.patience(now), None);
    }

    #[test]
    fn a_report_that_never_falls_silent_is_reported_all_the_same() {
        let mut scanner = Scanner::default();
        let start = Instant::now();
        scanner.feed(b"Oops: 1\n", start);
        let late = start + LONGEST_REPORT;
        scanner.feed(b"noise\n", late - Duration::from_millis(1));
        assert_eq!(scanner.due(late - Duration::from_millis(1), false), None);
        assert!(scanner.due(late, false).is_some());
    }

    #[test]
    fn a_console_that_closes_ends_the_report() {
        let mut scanner = Scanner::default();
        let now = Instant::now();
        scanner.feed(b"Kernel panic - not syncing: x\nlast", now);
        assert_eq!(scanner.due(now, true).unwrap().tail.last().unwrap(), "last");
    }

    #[test]
    fn warnings_are_collected_and_bounded() {
        let text = "[1.000000] WARNING: CPU: 0 PID: 1 at a.c:1 f\n[1.000000] WARNING: b.c:2 at g, CPU#1: x/1\n";
        let (fault, warnings) = scan(text, 11);
        assert_eq!((fault, warnings.len()), (None, 2));
        assert_eq!(scan(&"WARNING: x\n".repeat(500), 64).1.len(), WARNINGS_KEPT);
    }

    #[test]
    fn garbage_and_endless_lines_cost_no_memory() {
        let mut scanner = Scanner::default();
        let now = Instant::now();
        for _ in 0..1000 {
            scanner.feed(&[0xff; 1000], now);
        }
        assert!(scanner.line.len() <= LINE_KEPT);
        scanner.feed(b"\nKernel panic - not syncing: after\n", now);
        assert!(scanner.due(now, true).is_some());
    }
}
