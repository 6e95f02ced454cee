//! The Identify data structures of namespaces, and the lists of them (Base 5.17.2, NVM 4.1.5).

use std::sync::Arc;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use super::{CNTLID, SIZE, digest, eui64, padded, uuid};
use crate::io;
use crate::namespace::{FORMATS, METADATA, Namespace};
use crate::namespaces::Namespaces;
use crate::spec::command::{NSID_ALL, cns};
use crate::spec::identify::{
    IdentifyControllerNvm, IdentifyNamespace, IdentifyNamespaceIndependent, LbaFormat,
};
use crate::spec::status::Status;

/// The structure that `cns` names, of the namespace `nsid`.
pub(super) fn page(
    serial: &str,
    namespaces: &Namespaces,
    cns: u8,
    nsid: u32,
) -> Result<Vec<u8>, Status> {
    // An NSID that has no active, or no allocated, namespace is described by zeros.
    let describe =
        |found: Result<Arc<Namespace>, Status>, page: &dyn Fn(&Namespace) -> Vec<u8>| match found {
            Ok(ns) => Ok(page(&ns)),
            Err(Status::INVALID_FIELD) => Ok(vec![0; SIZE]),
            Err(status) => Err(status),
        };
    let full = |ns: &Namespace| namespace(serial, ns).as_bytes().to_vec();
    match cns {
        cns::NAMESPACE if nsid == NSID_ALL => Ok(common().as_bytes().to_vec()),
        cns::NAMESPACE => describe(namespaces.get(nsid), &full),
        cns::ALLOCATED_NAMESPACE => describe(namespaces.allocated(nsid), &full),
        cns::NAMESPACE_INDEPENDENT => describe(namespaces.get(nsid), &independent),
        // Guards of 16 bits and no storage tags: all zero (NVM 4.1.5.3).
        cns::NAMESPACE_CSI if nsid == NSID_ALL => Ok(vec![0; SIZE]),
        cns::NAMESPACE_CSI => describe(namespaces.get(nsid), &|_| vec![0; SIZE]),
        cns::NAMESPACE_DESCRIPTORS => namespaces.get(nsid).map(|ns| descriptors(serial, &ns)),
        _ => Err(Status::INVALID_FIELD),
    }
}

/// The limits of NVM commands (NVM 4.1.5.4). Write Uncorrectable and Dataset Management have none: they move no data.
pub(super) fn limits() -> Vec<u8> {
    let mut id = IdentifyControllerNvm::new_zeroed();
    id.vsl = io::VSL;
    id.wzsl = io::WZSL;
    padded(id.as_bytes().to_vec())
}

/// What all namespaces have in common.
fn common() -> IdentifyNamespace {
    let mut id = IdentifyNamespace::new_zeroed();
    // NPWG and the like are not reported; there is no thin provisioning.
    id.nlbaf_z = (FORMATS.len() - 1) as u8;
    for (slot, (shift, metadata)) in id.lbaf.iter_mut().zip(FORMATS) {
        *slot = LbaFormat {
            ms: U16::new(if metadata { METADATA as u16 } else { 0 }),
            lbads: shift,
            rp: 0,
        };
    }
    // Metadata in a buffer of its own.
    id.mc = 1 << 1;
    // Protection information of type 1, which is the first and the last 8 bytes of metadata, and all of it.
    id.dpc = 1 | 1 << 3 | 1 << 4;
    // Deallocated blocks read as zeros, and Write Zeroes may deallocate. Their protection information is all FFh.
    id.dlfeat = 1 | 1 << 3;
    id
}

fn namespace(serial: &str, ns: &Namespace) -> IdentifyNamespace {
    let mut id = common();
    id.nsze = U64::new(ns.blocks);
    id.ncap = id.nsze;
    id.nuse = id.nsze;
    id.flbas = ns.format.index;
    id.dps = ns.format.dps();
    id.nvmcap[0] = U64::new(ns.size());
    let copy = io::MAX_COPY >> ns.block_shift;
    id.mssrl = U16::new(u16::try_from(copy).unwrap_or(u16::MAX));
    id.mcl = U32::new(u32::try_from(copy).unwrap_or(u32::MAX));
    id.msrc_z = io::MSRC_Z;
    id.nsattr = u8::from(ns.read_only);
    id.nguid = nguid(serial, ns.identity);
    id.eui64 = eui64(serial, ns.identity).to_be_bytes();
    id
}

fn nguid(serial: &str, identity: u64) -> [u8; 16] {
    let number = u128::from(digest(serial, identity.wrapping_add(2))) << 64
        | u128::from(eui64(serial, identity));
    number.to_be_bytes()
}

/// The list of the first NSIDs above `after`, of all or of the active namespaces.
pub(super) fn list(namespaces: &Namespaces, active: bool, after: u32) -> Result<Vec<u8>, Status> {
    if after >= NSID_ALL - 1 {
        return Err(Status::INVALID_NAMESPACE);
    }
    let ids = namespaces.ids(active).into_iter();
    let ids = ids.filter(|nsid| *nsid > after).take(SIZE / 4);
    Ok(padded(ids.flat_map(u32::to_le_bytes).collect()))
}

/// The list of controllers from identifier `first` on: of the subsystem, or of those that `nsid` is attached to. There
/// is one controller.
pub(super) fn controllers(
    namespaces: &Namespaces,
    nsid: Option<u32>,
    first: u16,
) -> Result<Vec<u8>, Status> {
    let attached = nsid.map_or(Ok(true), |nsid| namespaces.is_attached(nsid))?;
    let listed = attached && (first..).contains(&CNTLID);
    let list = listed.then_some(CNTLID);
    let count = u16::from(listed).to_le_bytes();
    Ok(padded(
        count
            .into_iter()
            .chain(list.into_iter().flat_map(u16::to_le_bytes))
            .collect(),
    ))
}

fn descriptors(serial: &str, ns: &Namespace) -> Vec<u8> {
    let mut list = Vec::new();
    let mut add = |kind: u8, value: &[u8]| {
        list.extend([kind, u8::try_from(value.len()).unwrap_or(0), 0, 0]);
        list.extend(value);
    };
    add(1, &eui64(serial, ns.identity).to_be_bytes());
    add(2, &nguid(serial, ns.identity));
    add(
        3,
        &uuid(serial, 0x1_0000_0000_u64.wrapping_add(ns.identity)),
    );
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
