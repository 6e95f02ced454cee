//! Get Features and Set Features (Base 5.15, 5.27).

use crate::controller::Shared;
use crate::dma::{Direction, Dma};
use crate::features::{self, Features};
use crate::io;
use crate::locks::{lock, read};
use crate::spec::command::{Command, GetFeaturesCdw10, NSID_ALL, SetFeaturesCdw10, feature};
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// Select, of Get Features.
mod select {
    pub(super) const CURRENT: u8 = 0;
    pub(super) const DEFAULT: u8 = 1;
    pub(super) const SAVED: u8 = 2;
    pub(super) const CAPABILITIES: u8 = 3;
}

pub(super) fn get(
    shared: &Shared,
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<u32, Status> {
    let cdw10 = GetFeaturesCdw10::from_bits(command.cdw10.get());
    let (fid, nsid) = (cdw10.fid(), command.nsid.get());
    let feature = features::find(fid).ok_or(Status::INVALID_FIELD)?;
    if cdw10.sel() == select::CAPABILITIES {
        // Saveable, namespace specific, changeable.
        return Ok(u32::from(feature.saveable) | u32::from(feature.per_namespace) << 1 | 1 << 2);
    }
    if feature.per_namespace {
        io::namespace(shared, nsid)?;
    }
    let values = match cdw10.sel() {
        select::CURRENT => lock(&shared.features).clone(),
        select::SAVED if feature.saveable => lock(&shared.saved_features).clone(),
        select::DEFAULT | select::SAVED => Features::new(shared.config.io_queues),
        _ => return Err(Status::INVALID_FIELD),
    };
    let value = values.value(fid, command.cdw11.get(), nsid)?;
    if let Some(data) = values.data(fid) {
        super::reply(dma, command, &data, transfer)?;
    }
    Ok(value)
}

pub(super) fn set(
    shared: &Shared,
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<u32, Status> {
    let cdw10 = SetFeaturesCdw10::from_bits(command.cdw10.get());
    let (fid, cdw11) = (cdw10.fid(), command.cdw11.get());
    let feature = features::find(fid).ok_or(Status::INVALID_FIELD)?;
    if cdw10.sv() && !feature.saveable {
        return Err(Status::FEATURE_NOT_SAVEABLE);
    }
    let nsids = addressed(shared, feature.per_namespace, command.nsid.get())?;
    match fid {
        feature::NUMBER_OF_QUEUES => {
            let exist = read(&shared.queues).has_io_queues();
            return lock(&shared.features).set_queues(cdw11, exist);
        }
        feature::TIMESTAMP => {
            let mut data = [0; 8];
            dma.data(
                command,
                feature.data,
                Direction::ToController,
                transfer,
                |memory, _| memory.drain_to_slice(&mut data),
            )?;
            lock(&shared.features).set_timestamp(data);
            return Ok(0);
        }
        _ => lock(&shared.features).set(fid, cdw11, &nsids)?,
    }
    if cdw10.sv() {
        lock(&shared.saved_features).set(fid, cdw11, &nsids)?;
    }
    take_effect(shared, fid, cdw11)?;
    Ok(0)
}

/// The namespaces that the command's NSID stands for; none for a feature of the controller.
fn addressed(shared: &Shared, per_namespace: bool, nsid: u32) -> Result<Vec<u32>, Status> {
    match (per_namespace, nsid) {
        (true, NSID_ALL) => Ok(shared.namespaces.ids(true)),
        (false, 0 | NSID_ALL) => Ok(Vec::new()),
        _ => {
            io::namespace(shared, nsid)?;
            if per_namespace {
                Ok(vec![nsid])
            } else {
                Err(Status::FEATURE_NOT_NAMESPACE_SPECIFIC)
            }
        }
    }
}

/// What a new value causes beyond being kept.
fn take_effect(shared: &Shared, fid: u8, cdw11: u32) -> Result<(), Status> {
    match fid {
        // Turning the cache off must not leave anything in it (NVM 4.1.3.2).
        feature::VOLATILE_WRITE_CACHE if cdw11 & 1 == 0 => {
            let flushed = shared.namespaces.flush_all();
            flushed.map_err(|_| Status::WRITE_FAULT)?;
        }
        feature::TEMPERATURE_THRESHOLD => shared.check_health(),
        feature::INTERRUPT_COALESCING | feature::INTERRUPT_VECTOR_CONFIG => {
            let (sqs, cqs) = {
                let queues = read(&shared.queues);
                (queues.io_sqs(), queues.io_cqs())
            };
            let features = lock(&shared.features).clone();
            cqs.iter().for_each(|cq| cq.follow(&features));
            // What waits for its interrupt may have waited long enough.
            sqs.iter().for_each(|sq| sq.wake.notify());
        }
        feature::ASYNC_EVENT_CONFIG => {
            lock(&shared.events).configure(cdw11);
            shared.check_health();
        }
        _ => {}
    }
    Ok(())
}
