//! VERSION: what both sides can do.

use p2plab_pcie::Function;
use rustix::io::Errno;
use serde_json::{Value, json};

use crate::session::prefix;
use crate::stream::{MAX_DATA, MAX_FDS, Outbox};
use crate::wire;

/// The vfio-user protocol version that we speak: 0.1.
const MINOR: u16 = 1;

/// What the client lets us send it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Descriptors in one message.
    pub(crate) fds: u64,
    /// Most data of one REGION_READ or REGION_WRITE, in bytes.
    pub(crate) data: usize,
}

/// Reads the client's proposal and writes ours: the same minor version or a lower one.
///
/// # Errors
/// `EPROTONOSUPPORT` for another major version; `EINVAL` for what is not NUL-terminated JSON, an object,
/// or holds a limit that is no number.
pub(crate) fn negotiate(payload: &[u8], outbox: &mut Outbox) -> Result<Limits, Errno> {
    let (version, json): (wire::Version, _) = prefix(payload)?;
    if version.major != 0 {
        return Err(Errno::PROTONOSUPPORT);
    }
    let limits = parse(json)?;
    outbox.push(&wire::Version {
        major: 0,
        minor: version.minor.min(MINOR),
    });
    // write_multiple is not announced: in QEMU 11.1 that flag's value contains the one that sends every
    // message through another thread (VFIO_PROXY_USE_MULTI is 0x16, with 0x4 in it), which costs more
    // than joining a few posted writes saves.
    let ours = json!({
        "capabilities": {
            "max_msg_fds": MAX_FDS,
            "max_data_xfer_size": MAX_DATA,
            "pgsizes": wire::PAGE_SIZE,
            "max_dma_maps": Function::MAX_HOST_MAPPINGS,
        }
    });
    outbox.push_bytes(ours.to_string().as_bytes());
    outbox.push_bytes(&[0]);
    Ok(limits)
}

/// Defaults are the specification's, where the client leaves a limit out.
fn parse(json: &[u8]) -> Result<Limits, Errno> {
    let mut limits = Limits {
        fds: 1,
        data: MAX_DATA,
    };
    if json.is_empty() {
        return Ok(limits);
    }
    let (end, text) = json.split_last().ok_or(Errno::INVAL)?;
    if *end != 0 {
        return Err(Errno::INVAL);
    }
    let value: Value = serde_json::from_slice(text).map_err(|_| Errno::INVAL)?;
    let capabilities = match value.as_object().ok_or(Errno::INVAL)?.get("capabilities") {
        None => return Ok(limits),
        Some(capabilities) => capabilities.as_object().ok_or(Errno::INVAL)?,
    };
    if let Some(fds) = capabilities.get("max_msg_fds") {
        limits.fds = fds.as_u64().ok_or(Errno::INVAL)?;
    }
    if let Some(data) = capabilities.get("max_data_xfer_size") {
        let data = data.as_u64().filter(|data| *data > 0).ok_or(Errno::INVAL)?;
        limits.data = usize::try_from(data).unwrap_or(MAX_DATA).min(MAX_DATA);
    }
    Ok(limits)
}
