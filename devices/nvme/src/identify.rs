//! The Identify data structures of a controller (Base 5.17, NVM 4.1.5). Those of namespaces are in `namespace`.

mod namespace;

pub(crate) use p2plab_pcie::digest;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use crate::config::NvmeConfig;
use crate::events::{AERL_Z, OAES};
use crate::firmware::{FRMW, FWUG, MTFA, Revision};
use crate::health::{CRITICAL_TEMPERATURE, WARNING_TEMPERATURE};
use crate::io;
use crate::logs::{ELPE_Z, LPA};
use crate::namespaces::{MAX_NAMESPACES, Namespaces};
use crate::regs::version;
use crate::sanitize::SANICAP;
use crate::self_test::{DSTO, EDSTT};
use crate::spec::PAGE_SIZE;
use crate::spec::command::cns;
use crate::spec::identify::IdentifyController;
use crate::spec::status::Status;

/// Vendor and subsystem vendor.
pub(crate) const VENDOR_ID: u16 = 0x1de5;
/// Device and subsystem.
pub(crate) const DEVICE_ID: u16 = 0x2000;

/// Controller identifier: the only one of its subsystem.
pub(crate) const CNTLID: u16 = 0;

const SIZE: usize = PAGE_SIZE as usize;

/// What an Identify command asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) cns: u8,
    pub(crate) cntid: u16,
    pub(crate) nsid: u32,
    pub(crate) csi: u8,
    /// The revision that runs.
    pub(crate) firmware: Revision,
}

/// A version 8 UUID (RFC 9562) for `text`.
fn uuid(text: &str, salt: u64) -> [u8; 16] {
    let number = u128::from(digest(text, salt)) << 64 | u128::from(digest(text, !salt));
    let mut bytes = number.to_be_bytes();
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

/// An EUI-64 for a namespace; the controller's own has identity 0. The local bit is set: no registry gave it.
pub(crate) fn eui64(serial: &str, identity: u64) -> u64 {
    digest(serial, identity.wrapping_add(0x6e76_6d65)) & !(3 << 56) | 2 << 56
}

fn text(field: &mut [u8], value: &str) {
    field.fill(b' ');
    for (slot, byte) in field.iter_mut().zip(value.bytes()) {
        *slot = byte;
    }
}

/// The structure that `cns` names.
pub(crate) fn page(
    config: &NvmeConfig,
    namespaces: &Namespaces,
    request: Request,
) -> Result<Vec<u8>, Status> {
    let Request {
        cns,
        cntid,
        nsid,
        csi,
        firmware,
    } = request;
    match cns {
        // Command set 0, NVM, is the only one.
        cns::NAMESPACE_CSI | cns::CONTROLLER_CSI | cns::ACTIVE_NAMESPACES_CSI if csi != 0 => {
            Err(Status::INVALID_FIELD)
        }
        cns::CONTROLLER => Ok(controller(config, namespaces, firmware).as_bytes().to_vec()),
        cns::CONTROLLER_CSI => Ok(namespace::limits()),
        cns::ACTIVE_NAMESPACES | cns::ACTIVE_NAMESPACES_CSI => {
            namespace::list(namespaces, true, nsid)
        }
        cns::ALLOCATED_NAMESPACES => namespace::list(namespaces, false, nsid),
        cns::ATTACHED_CONTROLLERS => namespace::controllers(namespaces, Some(nsid), cntid),
        cns::CONTROLLERS => namespace::controllers(namespaces, None, cntid),
        _ => namespace::page(&config.serial, namespaces, cns, nsid),
    }
}

fn controller(
    config: &NvmeConfig,
    namespaces: &Namespaces,
    firmware: Revision,
) -> IdentifyController {
    let mut id = IdentifyController::new_zeroed();
    id.vid = U16::new(VENDOR_ID);
    id.ssvid = U16::new(VENDOR_ID);
    text(&mut id.sn, &config.serial);
    text(&mut id.mn, &config.model);
    id.fr = firmware;
    // The transfer size is a power of two of at least two pages: 0 would be no limit.
    id.mdts = u8::try_from((config.max_transfer / PAGE_SIZE).trailing_zeros()).unwrap_or(0);
    id.ver = U32::new(version(config.cmb.as_ref()));
    id.cntrltype = 1;
    id.acl_z = 3;
    id.aerl_z = AERL_Z;
    // Firmware Commit and Firmware Image Download.
    id.oacs |= U16::new(1 << 2);
    id.frmw = FRMW;
    id.fwug = FWUG;
    id.mtfa = U16::new(MTFA);
    // Device Self-test.
    id.oacs |= U16::new(1 << 4);
    id.edstt = U16::new(EDSTT);
    id.dsto = DSTO;
    id.sanicap = U32::new(SANICAP);
    id.oaes = U32::new(OAES);
    id.lpa = LPA;
    id.elpe_z = ELPE_Z;
    id.wctemp = U16::new(WARNING_TEMPERATURE);
    id.cctemp = U16::new(CRITICAL_TEMPERATURE);
    let (capacity, unallocated) = namespaces.capacity();
    id.tnvmcap[0] = U64::new(capacity);
    id.unvmcap[0] = U64::new(unallocated);
    // Format NVM, of one namespace or with the broadcast NSID of all (FNA); Namespace Management and Attachment.
    id.oacs |= U16::new(1 << 1 | 1 << 3);
    if config.offers_shadow_doorbells() {
        // Doorbell Buffer Config.
        id.oacs |= U16::new(1 << 8);
    }
    id.sqes = 6 << 4 | 6;
    id.cqes = 4 << 4 | 4;
    id.nn = U32::new(MAX_NAMESPACES);
    id.mnan = U32::new(MAX_NAMESPACES);
    // Dataset Management, Write Zeroes, Save and Select fields, Timestamp.
    id.oncs = U16::new(1 << 2 | 1 << 3 | 1 << 4 | 1 << 6);
    // Compare, Write Uncorrectable, Verify, Copy.
    id.oncs |= U16::new(1 | 1 << 1 | 1 << 7 | 1 << 8);
    // Compare and Write.
    id.fuses = U16::new(1);
    id.acwu_z = U16::new(io::ACWU_Z);
    // Copy descriptor format 0.
    id.ocfs = U16::new(1);
    // Present, and Flush takes the broadcast NSID.
    id.vwc = 0b111;
    id.sgls = U32::new(crate::sgl::SUPPORT);
    let uuid = uuid(&config.serial, 1);
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    let part = |range| hex.get(range).unwrap_or_default();
    let nqn = format!(
        "nqn.2014-08.org.nvmexpress:uuid:{}-{}-{}-{}-{}",
        part(0..8),
        part(8..12),
        part(12..16),
        part(16..20),
        part(20..32)
    );
    for (slot, byte) in id.subnqn.iter_mut().zip(nqn.bytes()) {
        *slot = byte;
    }
    id.psd0_mp = U16::new(2500);
    id
}

fn padded(mut page: Vec<u8>) -> Vec<u8> {
    page.resize(SIZE, 0);
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NamespaceConfig;
    use crate::namespace::Namespace;
    use crate::spec::command::NSID_ALL;

    fn pages(serial: &str, cns: u8, nsid: u32) -> Result<Vec<u8>, Status> {
        let config = NvmeConfig::new(serial);
        let ns = |nsid| Namespace::open(nsid, &NamespaceConfig::memory(1 << 20)).unwrap();
        let namespaces = Namespaces::new([ns(1), ns(2)], 1 << 30, None);
        let request = Request {
            cns,
            cntid: 0,
            nsid,
            csi: 0,
            firmware: *b"1.0     ",
        };
        page(&config, &namespaces, request)
    }

    #[test]
    fn every_structure_is_a_page() {
        for cns in 0..=0xff {
            if let Ok(page) = pages("a", cns, 1) {
                assert_eq!(page.len(), 4096, "CNS {cns:#x}");
            }
        }
    }

    #[test]
    fn identifiers_differ_between_namespaces_and_controllers() {
        let mut seen = std::collections::HashSet::new();
        for serial in ["a", "b", "SSD0", "SSD1"] {
            for nsid in [1, 2] {
                assert!(seen.insert(pages(serial, cns::NAMESPACE_DESCRIPTORS, nsid).unwrap()));
            }
            assert!(seen.insert(pages(serial, cns::CONTROLLER, 0).unwrap()[768..1024].to_vec()));
        }
    }

    #[test]
    fn active_lists_continue_after_an_id() {
        let list = pages("a", cns::ACTIVE_NAMESPACES, 1).unwrap();
        assert_eq!(list[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            pages("a", cns::ACTIVE_NAMESPACES, NSID_ALL),
            Err(Status::INVALID_NAMESPACE)
        );
        assert_eq!(
            pages("a", cns::NAMESPACE, 257),
            Err(Status::INVALID_NAMESPACE)
        );
        assert_eq!(pages("a", cns::NAMESPACE, 3), Ok(vec![0; SIZE]));
    }

    #[test]
    fn the_controller_names_its_subsystem() {
        let page = pages("a", cns::CONTROLLER, 0).unwrap();
        assert!(page[768..].starts_with(b"nqn.2014-08.org.nvmexpress:uuid:"));
        assert_eq!(page[77], 10);
    }
}
