//! The Identify data structures of a controller (Base 5.17, NVM 4.1.5).

use std::sync::Arc;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use crate::config::NvmeConfig;
use crate::events::{AERL_Z, OAES};
use crate::firmware::{FRMW, FWUG, MTFA, Revision};
use crate::health::{CRITICAL_TEMPERATURE, WARNING_TEMPERATURE};
use crate::logs::{ELPE_Z, LPA};
use crate::namespace::Namespace;
use crate::regs::VERSION;
use crate::sanitize::SANICAP;
use crate::self_test::{DSTO, EDSTT};
use crate::spec::PAGE_SIZE;
use crate::spec::command::{NSID_ALL, cns};
use crate::spec::identify::{
    IdentifyController, IdentifyNamespace, IdentifyNamespaceIndependent, LbaFormat,
};
use crate::spec::status::Status;

/// Vendor and subsystem vendor.
pub(crate) const VENDOR_ID: u16 = 0x1de5;
/// Device and subsystem.
pub(crate) const DEVICE_ID: u16 = 0x2000;

const SIZE: usize = PAGE_SIZE as usize;

/// A number that is as good as unique for `text` (FNV-1a, then mixed so that all bits depend on all).
pub(crate) fn digest(text: &str, salt: u64) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64 ^ salt.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for byte in text.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// A version 8 UUID (RFC 9562) for `text`.
fn uuid(text: &str, salt: u64) -> [u8; 16] {
    let number = u128::from(digest(text, salt)) << 64 | u128::from(digest(text, !salt));
    let mut bytes = number.to_be_bytes();
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

/// An EUI-64 for a namespace; the controller's own has NSID 0. The local bit is set: no registry gave it.
pub(crate) fn eui64(serial: &str, nsid: u32) -> u64 {
    digest(serial, 0x6e76_6d65 + u64::from(nsid)) & !(3 << 56) | 2 << 56
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
    namespaces: &[Arc<Namespace>],
    firmware: Revision,
    cns: u8,
    nsid: u32,
    csi: u8,
) -> Result<Vec<u8>, Status> {
    let find = || {
        let found = namespaces.iter().find(|ns| ns.nsid == nsid);
        found.ok_or(Status::INVALID_NAMESPACE)
    };
    match cns {
        cns::NAMESPACE => Ok(namespace(&config.serial, find()?).as_bytes().to_vec()),
        cns::CONTROLLER => Ok(controller(config, namespaces, firmware).as_bytes().to_vec()),
        cns::ACTIVE_NAMESPACES => active(namespaces, nsid),
        cns::NAMESPACE_DESCRIPTORS => Ok(descriptors(&config.serial, find()?)),
        cns::NAMESPACE_INDEPENDENT => Ok(independent(find()?)),
        // Command set 0, NVM, is the only one.
        cns::NAMESPACE_CSI | cns::CONTROLLER_CSI | cns::ACTIVE_NAMESPACES_CSI if csi != 0 => {
            Err(Status::INVALID_FIELD)
        }
        cns::ACTIVE_NAMESPACES_CSI => active(namespaces, nsid),
        // No protection information, no storage tags, no limits: all zero (NVM 4.1.5.3 and 4.1.5.4).
        cns::NAMESPACE_CSI => find().map(|_| vec![0; SIZE]),
        cns::CONTROLLER_CSI => Ok(vec![0; SIZE]),
        _ => Err(Status::INVALID_FIELD),
    }
}

fn controller(
    config: &NvmeConfig,
    namespaces: &[Arc<Namespace>],
    firmware: Revision,
) -> IdentifyController {
    let mut id = IdentifyController::new_zeroed();
    id.vid = U16::new(VENDOR_ID);
    id.ssvid = U16::new(VENDOR_ID);
    text(&mut id.sn, &config.serial);
    text(&mut id.mn, &config.model);
    id.fr = firmware;
    // The transfer size is a power of two of at least a page.
    id.mdts = u8::try_from((config.max_transfer / PAGE_SIZE).trailing_zeros()).unwrap_or(0);
    id.ver = U32::new(VERSION);
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
    let capacity = namespaces
        .iter()
        .fold(0u64, |sum, ns| sum.saturating_add(ns.size()));
    id.tnvmcap[0] = U64::new(capacity);
    id.sqes = 6 << 4 | 6;
    id.cqes = 4 << 4 | 4;
    id.nn = U32::new(u32::try_from(namespaces.len()).unwrap_or(0));
    // Dataset Management, Write Zeroes, Save and Select fields, Timestamp.
    id.oncs = U16::new(1 << 2 | 1 << 3 | 1 << 4 | 1 << 6);
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

fn namespace(serial: &str, ns: &Namespace) -> IdentifyNamespace {
    let mut id = IdentifyNamespace::new_zeroed();
    id.nsze = U64::new(ns.blocks);
    id.ncap = id.nsze;
    id.nuse = id.nsze;
    // Deallocated blocks read as zeros, and Write Zeroes may deallocate.
    id.dlfeat = 1 | 1 << 3;
    id.nvmcap[0] = U64::new(ns.size());
    id.nsattr = u8::from(ns.read_only);
    id.nguid = nguid(serial, ns.nsid);
    id.eui64 = eui64(serial, ns.nsid).to_be_bytes();
    id.lbaf[0] = LbaFormat {
        ms: U16::new(0),
        lbads: ns.block_shift,
        rp: 0,
    };
    id
}

fn nguid(serial: &str, nsid: u32) -> [u8; 16] {
    let number =
        u128::from(digest(serial, 2 + u64::from(nsid))) << 64 | u128::from(eui64(serial, nsid));
    number.to_be_bytes()
}

fn active(namespaces: &[Arc<Namespace>], after: u32) -> Result<Vec<u8>, Status> {
    if after >= NSID_ALL - 1 {
        return Err(Status::INVALID_NAMESPACE);
    }
    let ids = namespaces
        .iter()
        .map(|ns| ns.nsid)
        .filter(|nsid| *nsid > after)
        .take(SIZE / 4);
    Ok(padded(ids.flat_map(u32::to_le_bytes).collect()))
}

fn descriptors(serial: &str, ns: &Namespace) -> Vec<u8> {
    let mut list = Vec::new();
    let mut add = |kind: u8, value: &[u8]| {
        list.extend([kind, u8::try_from(value.len()).unwrap_or(0), 0, 0]);
        list.extend(value);
    };
    add(1, &eui64(serial, ns.nsid).to_be_bytes());
    add(2, &nguid(serial, ns.nsid));
    add(3, &uuid(serial, 0x1_0000_0000 + u64::from(ns.nsid)));
    add(4, &[0]);
    padded(list)
}

fn independent(ns: &Namespace) -> Vec<u8> {
    let mut id = IdentifyNamespaceIndependent::new_zeroed();
    id.nsattr = u8::from(ns.read_only);
    // Ready.
    id.nstat = 1;
    padded(id.as_bytes().to_vec())
}

fn padded(mut page: Vec<u8>) -> Vec<u8> {
    page.resize(SIZE, 0);
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NamespaceConfig;

    fn pages(serial: &str, cns: u8, nsid: u32) -> Result<Vec<u8>, Status> {
        let config = NvmeConfig::new(serial);
        let ns = |nsid| Arc::new(Namespace::open(nsid, &NamespaceConfig::memory(1 << 20)).unwrap());
        page(&config, &[ns(1), ns(2)], *b"1.0     ", cns, nsid, 0)
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
            pages("a", cns::NAMESPACE, 3),
            Err(Status::INVALID_NAMESPACE)
        );
    }

    #[test]
    fn the_controller_names_its_subsystem() {
        let page = pages("a", cns::CONTROLLER, 0).unwrap();
        assert!(page[768..].starts_with(b"nqn.2014-08.org.nvmexpress:uuid:"));
        assert_eq!(page[77], 10);
    }
}
