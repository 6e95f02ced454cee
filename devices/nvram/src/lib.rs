//! An NVRAM card: memory in a PCI Express BAR that keeps its contents when the power fails.
//!
//! The card of the talk's first example, a Microsemi card with the ids 11f8:f117: memory behind BAR 4, and a capacitor
//! that lets the card save it to flash when the power goes. To a driver it is peer-to-peer memory and nothing else; it
//! never is a bus master, but for its interrupts. What the vendor's registers are is not public: those here, in BAR 0,
//! are this card's own.
//!
//! # Parts
//!
//! - [`spec`]: the registers as a driver sees them, and nothing else.
//! - `card`: [`NvramCard`], the `Endpoint`: what it declares, its interrupt, its resets, the power cut.
//! - `regs`: the registers: what they hold, what a write does, what follows from a fault.
//! - `memory`: BAR 4: where its bytes are, how they become durable, how they are lost.
//! - `config`: what a user chooses, and the sentences that refuse a bad choice.
//!
//! # BARs
//!
//! | BAR | Size | Kind | What |
//! |---|---|---|---|
//! | 0 | 16 KiB | 64-bit | registers; the MSI-X table at 0x2000 and its Pending Bit Array at 0x3000, if the card has MSI-X |
//! | 4 | 64 MiB to 8 GiB, a power of two | 64-bit, prefetchable | the memory |
//!
//! # Registers
//!
//! Little-endian. A read may have any length and alignment; a write must be aligned to 4 bytes and have 4 or 8, other
//! writes are ignored and counted. What is not listed, and reserved bits, read as zero and ignore writes.
//!
//! | Offset | Bytes | Name | Access | Meaning |
//! |---|---|---|---|---|
//! | 0x00 | 4 | ID | RO | 0x4d52564e, the letters `NVRM` in memory |
//! | 0x04 | 4 | VS | RO | version of this map: major in bits 31:16, minor in 15:0; 1.0 |
//! | 0x08 | 8 | SIZE | RO | bytes of the memory, all of BAR 4 |
//! | 0x10 | 8 | SN | RO | serial number, that of the Device Serial Number capability |
//! | 0x18 | 4 | CAP | RO | [`Cap`](spec::Cap): bit 0 FILE: the contents outlive the card's process |
//! | 0x1c | 4 | CTRL | RW | [`Ctrl`](spec::Ctrl): bit 0 ARM: the contents are to be saved when the power fails |
//! | 0x20 | 4 | STS | RO | [`Sts`](spec::Sts): bit 0 ARMED, bit 1 ARMING, bit 2 FLUSHING |
//! | 0x24 | 4 | HEALTH | RO | [`Health`](spec::Health): bit 0 CAP: the capacitor has failed; bit 1 FLASH: the flash has; bit 2 MEDIUM: a flush has failed since power on |
//! | 0x28 | 4 | PFAIL | RO | [`Pfail`](spec::Pfail): what the last loss of power did, see below |
//! | 0x2c | 4 | FLUSH | WO | bit 0: start a flush; reads as zero |
//! | 0x30 | 4 | EVENT | RW1C | [`Event`](spec::Event): bit 0 POWER: the power was gone and is back; bit 1 HEALTH changed; bit 2 ARMED changed; bit 3 FLUSHED: a flush has ended |
//! | 0x34 | 4 | INTEN | RW | which events interrupt, bit for bit |
//! | 0x40 | 8 | POWER_CUTS | RO | losses of power |
//! | 0x48 | 8 | RESTORES | RO | of these, those after which the contents were there |
//! | 0x50 | 8 | LOSSES | RO | and those after which they were not |
//! | 0x58 | 8 | FLUSHES | RO | flushes that succeeded |
//! | 0x60 | 8 | FLUSH_ERRORS | RO | flushes that failed |
//! | 0x68 | 8 | RESETS | RO | resets by the bus, of all kinds |
//! | 0x70 | 8 | MISTAKES | RO | register writes that were ignored for their shape |
//!
//! Statistics begin at zero with the card's process. What goes in and out of BAR 4 is the switch's to count: the card
//! sees no access to its memory.
//!
//! # Arming
//!
//! A loss of power keeps the contents where STS.ARMED is set, and loses them where it is not. Software sets CTRL.ARM;
//! the card flushes, and then is armed (STS.ARMING meanwhile). Clearing CTRL.ARM disarms at once, and flushes. A failed
//! capacitor or flash clears STS.ARMED for as long as it lasts, whatever CTRL.ARM says. If a flush fails, then or
//! later, HEALTH.MEDIUM is set and the card is not armed: software may clear and set CTRL.ARM to try again. Where the host
//! itself has failed to write (not a test that lets it), all flushes fail until the file is opened again: what it lost,
//! nobody knows. After power on the card is armed,
//! or not, as it is configured. Resets change nothing of this.
//!
//! PFAIL bits 7:0 tell afterwards: 0: there was no loss of power yet; 1: the contents were saved and restored; 2: the card
//! was not armed, the contents are lost; 3: it was, or was to be, but could not save them: lost, too. Lost memory reads
//! as 0xff, as erased flash does; what nobody ever wrote reads as zeros.
//!
//! # Interrupt
//!
//! INTx is asserted while EVENT and INTEN have a bit in common. With MSI-X, which it has if configured, vector 0 is sent
//! for each bit that becomes common to both: clear EVENT first, then look at what happened.
//!
//! # What "durable" means
//!
//! A write that has arrived is in the memory, and that is memory of a file, mapped shared: there is no copy of it in the
//! card that would have to be written back. It has arrived when a later read of the card returns; a DMA of a peer, when
//! that is complete. What such a write survives:
//!
//! | What ends | What is kept |
//! |---|---|
//! | guest: crash, reboot, reset; Function Level Reset, hot reset, D3hot | everything |
//! | QEMU, killed | everything |
//! | the card's process, killed at any moment (SIGKILL) | everything, where CAP.FILE is set: the host's kernel has it |
//! | the model's power ([`NvramCard::power_cut`]), which it also loses with its slot in a lab | everything, where STS.ARMED is set |
//! | the host's power, or its kernel | what the last flush that succeeded had found, and whatever else the kernel had written back by then, in no order |
//!
//! A flush (fdatasync) brings all that has arrived before it to the file's medium, as well as the host's drives keep what
//! they acknowledge. The card flushes when FLUSH is written, when it is armed and disarmed, when a power cut is survived,
//! when QEMU is gone, and when it is unplugged or dropped. It runs beside everything else; the last three of these are
//! over when the call returns but for QEMU's end, which nobody waits for. Without a file there is nothing to flush, and it
//! ends at once.
//!
//! The file's space is set aside when it is opened: a full file system refuses the card, not a write.
//!
//! # Not implemented
//!
//! The vendor's register and management interface; time that saving and restoring take; a capacitor that charges; wear;
//! partial saves; writes that are lost on their way into an armed card; the loss of the link and of config space in a
//! power cut (`Function::reset` does that). While the power is off, a BAR 4 that is mapped into a guest answers the
//! guest's CPU all the same, and what that writes then may or may not be kept.

mod card;
mod config;
mod memory;
mod regs;
pub mod spec;

pub use card::NvramCard;
pub use config::{MAX_SIZE, MIN_SIZE, NvramConfig, NvramError};
pub use p2plab_pcie::MemoryBacking;
pub use regs::Fault;
