//! What init does once: mounts, environment, kernel command line, and a voice on the console.

use std::fmt::Arguments;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};

/// Source, place, type, options. In order, for later ones lie in earlier ones.
const MOUNTS: &[(&str, &str, &str, &std::ffi::CStr)] = &[
    ("proc", "/proc", "proc", c""),
    ("sysfs", "/sys", "sysfs", c""),
    ("devtmpfs", "/dev", "devtmpfs", c""),
    ("devpts", "/dev/pts", "devpts", c"mode=0620,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", "tmpfs", c"mode=1777"),
    ("tmpfs", "/run", "tmpfs", c"mode=0755"),
    ("tmpfs", "/tmp", "tmpfs", c"mode=1777"),
    ("debugfs", "/sys/kernel/debug", "debugfs", c""),
    ("configfs", "/sys/kernel/config", "configfs", c""),
];

/// Writes a line to the console.
pub fn say(what: Arguments<'_>) {
    let line = format!("p2plab-agent: {what}\r\n");
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(line.as_bytes());
    }
}

/// Mounts what is not mounted yet; file systems that the kernel does not have are passed over.
pub fn mount_all() {
    let mounted = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    for (source, place, kind, options) in MOUNTS {
        if mounted
            .lines()
            .any(|line| line.split(' ').nth(1) == Some(place))
        {
            continue;
        }
        // In sysfs and devtmpfs a missing directory means a missing feature, or cannot be made.
        let _ = std::fs::create_dir_all(place);
        let result = mount(*source, *place, *kind, MountFlags::empty(), *options);
        let optional = *kind == "configfs" || *kind == "debugfs";
        match result {
            Err(rustix::io::Errno::BUSY) | Ok(()) => {}
            Err(_) if optional => {}
            Err(error) => say(format_args!("cannot mount {kind} on {place}: {error}")),
        }
    }
}

/// The `p2plab.` options of the kernel command line.
#[derive(Debug, Clone)]
pub struct Options {
    /// `p2plab.console=ttyS0`: where the shell is; `none` for no shell. Default: the last console that
    /// the kernel uses.
    pub console: String,
    /// `p2plab.hostname=NAME`.
    pub hostname: String,
    /// `p2plab.modules=off` loads none at boot.
    pub modules: bool,
    /// `p2plab.system=vda`: the disk with the system image.
    pub system: Option<String>,
}

impl Options {
    /// Reads /proc/cmdline; unknown options are named on the console and passed over.
    pub fn from_command_line() -> Self {
        let active = std::fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
        let mut options = Self {
            console: active
                .split_whitespace()
                .last()
                .unwrap_or("ttyS0")
                .to_owned(),
            hostname: "p2plab".to_owned(),
            modules: true,
            system: None,
        };
        let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
        for option in line
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("p2plab."))
        {
            match option.split_once('=') {
                Some(("console", value)) => options.console = value.to_owned(),
                Some(("hostname", value)) => options.hostname = value.to_owned(),
                Some(("modules", value)) => options.modules = value != "off",
                Some(("system", value)) => options.system = Some(value.to_owned()),
                _ => say(format_args!(
                    "unknown option p2plab.{option} on the command line"
                )),
            }
        }
        options
    }
}

/// Lets programs have huge pages for their buffers, as on any machine that has SSDs: with less than 512 MiB of memory
/// (what is free of a machine that has 512) Linux takes that from all, whatever its command line says (mm/huge_memory.c,
/// hugepage_init), and a transfer of 1 MiB then has 256 pieces.
pub fn allow_huge_pages() {
    let setting = "/sys/kernel/mm/transparent_hugepage/enabled";
    let is_ours = std::fs::read_to_string("/proc/cmdline")
        .is_ok_and(|line| !line.contains("transparent_hugepage="));
    if is_ours && let Err(error) = std::fs::write(setting, "madvise") {
        say(format_args!("no huge pages: {error}"));
    }
}

/// Hostname, loopback, working directory.
pub fn set_environment(options: &Options) {
    if let Err(error) = rustix::system::sethostname(options.hostname.as_bytes()) {
        say(format_args!(
            "cannot set the hostname {:?}: {error}",
            options.hostname
        ));
    }
    if let Err(error) = p2plab_guest::loopback_up() {
        say(format_args!(
            "cannot bring the loopback interface up: {error}"
        ));
    }
    let _ = std::env::set_current_dir("/");
}

/// Keeps a failing loop from taking the machine for itself.
#[derive(Debug, Default)]
pub struct Retry {
    failures: u32,
}

impl Retry {
    /// Says why, then holds the thread for up to two seconds, longer each time.
    pub fn after(&mut self, why: Arguments<'_>) {
        say(why);
        self.failures = self.failures.saturating_add(1);
        std::thread::sleep(Duration::from_millis(100) * self.failures.min(20));
    }
}
