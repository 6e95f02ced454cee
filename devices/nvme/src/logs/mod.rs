//! Log pages: what they say (Base 5.16.1).

mod effects;
mod error;
mod smart;

pub(crate) use effects::writes;
pub(crate) use error::{ELPE_Z, ErrorLog};

use zerocopy::IntoBytes;

use crate::controller::Shared;
use crate::features;
use crate::locks::lock;
use crate::spec::log::lid;
use crate::spec::status::Status;

/// The pages that there are. LPA bit 5 asks for that of NVMe-MI commands, too, of which there are none.
const PAGES: &[u8] = &[
    lid::SUPPORTED_LOG_PAGES,
    lid::ERROR_INFORMATION,
    lid::SMART,
    lid::FIRMWARE_SLOT,
    lid::CHANGED_NAMESPACES,
    lid::COMMANDS_SUPPORTED,
    lid::DEVICE_SELF_TEST,
    lid::TELEMETRY_HOST,
    lid::TELEMETRY_CONTROLLER,
    lid::FEATURES_SUPPORTED,
    lid::MI_COMMANDS_SUPPORTED,
    lid::SANITIZE_STATUS,
];

/// Log Page Attributes (LPA): Commands Supported and Effects, extended data (offsets), telemetry, and the pages
/// that say what is supported. SMART is the controller's alone.
pub(crate) const LPA: u8 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5;

/// The whole of log page `lid`.
pub(crate) fn page(shared: &Shared, lid: u8) -> Result<Vec<u8>, Status> {
    if !PAGES.contains(&lid) {
        return Err(Status::INVALID_LOG_PAGE);
    }
    Ok(match lid {
        lid::SUPPORTED_LOG_PAGES => supported(),
        lid::ERROR_INFORMATION => lock(&shared.errors).page(),
        lid::SMART => smart::page(shared).as_bytes().to_vec(),
        lid::FIRMWARE_SLOT => lock(&shared.firmware).page(),
        lid::CHANGED_NAMESPACES => lock(&shared.events).changed_namespaces(),
        lid::COMMANDS_SUPPORTED => effects::page(&shared.config),
        lid::DEVICE_SELF_TEST => shared.self_test.page(),
        lid::TELEMETRY_HOST | lid::TELEMETRY_CONTROLLER => {
            lock(&shared.telemetry).page(lid, lid == lid::TELEMETRY_HOST)
        }
        lid::FEATURES_SUPPORTED => features::effects_page(),
        lid::MI_COMMANDS_SUPPORTED => vec![0; 4096],
        lid::SANITIZE_STATUS => shared.sanitize.page(shared),
        _ => return Err(Status::INTERNAL_ERROR),
    })
}

/// A dword of 1 (LSUPP) for each page that there is (Base 5.16.1.1).
fn supported() -> Vec<u8> {
    (0..=u8::MAX)
        .flat_map(|lid| u32::from(PAGES.contains(&lid)).to_le_bytes())
        .collect()
}
