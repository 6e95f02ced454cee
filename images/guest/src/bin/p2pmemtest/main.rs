//! Drives all that `/dev/p2pmemN` does and refuses, from user space; a scenario reads what it prints.
//!
//! | `p2pmemtest` ... | does |
//! |---|---|
//! | `info DEVICE` | prints what the memory is |
//! | `distance DEVICE ADDRESS...` | prints the hops to PCI devices; as `why`, the kernel's log says what is refused |
//! | `check DEVICE DISK` | goes through everything that works, then through everything that is refused; `DISK` can reach the memory, and loses its first blocks |
//! | `import DEVICE ADDRESS` | exports memory, has it mapped for the PCI device at ADDRESS, prints the DMA addresses |
//! | `busy DEVICE ADDRESS` | the same, with an importer that is busy until standard input ends |
//! | `keep DEVICE` | keeps a dma-buf and nothing else until standard input ends |
//! | `scattered DEVICE BYTES` | takes memory that lies in single pages, and prints how many |
//! | `dirty DEVICE VALUE` | prints how many pages do not begin with 0, and makes all begin with VALUE |
//! | `ends DEVICE DISK` | takes all that is free and has the disk fill pages at its beginning, around its middle and at its end, and read them back |
//! | `hold DEVICE DISK [ADDRESS]` | uses memory in all ways at once, says `ready`, waits until the device is taken away, and checks what is left |

mod cases;
mod ends;
mod hold;
mod import;
mod refused;
mod works;

use std::process::ExitCode;

use p2plab_guest::p2pmem::{Address, P2pmem, VERBOSE};

const HELP: &str = "usage: p2pmemtest info DEVICE | distance|why DEVICE ADDRESS... | check DEVICE DISK \
                    | import DEVICE ADDRESS | busy DEVICE ADDRESS | keep DEVICE | scattered DEVICE BYTES | dirty DEVICE VALUE \
                    | ends DEVICE DISK | hold DEVICE DISK [ADDRESS]";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["info", device] => info(device),
        ["distance", device, addresses @ ..] => distance(device, addresses, 0),
        ["why", device, addresses @ ..] => distance(device, addresses, VERBOSE),
        ["check", device, disk] => check(device, disk),
        ["import", device, address] => import::import(device, address),
        ["busy", device, address] => import::busy(device, address),
        ["keep", device] => import::keep(device),
        ["scattered", device, bytes] if bytes.parse::<u64>().is_ok() => {
            works::scattered(device, bytes.parse().unwrap_or_default())
        }
        ["dirty", device, value] if value.parse::<u8>().is_ok() => {
            works::dirty(device, value.parse().unwrap_or_default())
        }
        ["ends", device, disk] => ends::ends(device, disk),
        ["hold", device, disk] => hold::hold(device, disk, None),
        ["hold", device, disk, address] => hold::hold(device, disk, Some(address)),
        _ => {
            eprintln!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("p2pmemtest: {why}");
            ExitCode::FAILURE
        }
    }
}

fn open(device: &str) -> Result<P2pmem, String> {
    P2pmem::open(device).map_err(|error| format!("cannot open {device}: {error}"))
}

fn info(device: &str) -> Result<(), String> {
    let i = open(device)?.info().map_err(|error| error.to_string())?;
    println!(
        "{:04x}:{:02x}:{:02x}.{} bar {} id {:04x}:{:04x} subsystem {:04x}:{:04x} class {:06x} offset {} size {} free {}",
        i.domain,
        i.bus,
        i.devfn >> 3,
        i.devfn & 7,
        i.bar,
        i.vendor,
        i.device,
        i.subsystem_vendor,
        i.subsystem_device,
        i.class,
        i.offset,
        i.size,
        i.free
    );
    Ok(())
}

fn distance(device: &str, addresses: &[&str], flags: u32) -> Result<(), String> {
    let clients = addresses
        .iter()
        .map(|a| address(a).ok_or_else(|| format!("{a} is no PCI address such as 0000:03:00.0")))
        .collect::<Result<Vec<Address>, String>>()?;
    let hops = open(device)?
        .distance(&clients, flags)
        .map_err(|error| error.to_string())?;
    println!("{hops}");
    Ok(())
}

/// `0000:03:00.0`.
fn address(text: &str) -> Option<Address> {
    let (domain, rest) = text.split_once(':')?;
    let (bus, rest) = rest.split_once(':')?;
    let (device, function) = rest.split_once('.')?;
    let device = u8::from_str_radix(device, 16).ok().filter(|d| *d < 32)?;
    let function = u8::from_str_radix(function, 8).ok().filter(|f| *f < 8)?;
    Some(Address {
        domain: u32::from_str_radix(domain, 16).ok()?,
        bus: u8::from_str_radix(bus, 16).ok()?,
        devfn: (device << 3) | function,
        reserved: 0,
    })
}

fn check(device: &str, disk: &str) -> Result<(), String> {
    let before = open(device)?.info().map_err(|error| error.to_string())?;
    let mut cases = cases::Cases::default();
    works::all(&mut cases, device, disk);
    refused::all(&mut cases, device);
    cases.case("all memory is free again", || {
        cases::equal(open(device)?.info()?, before)
    });
    cases.end()
}
