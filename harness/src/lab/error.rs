//! What can go wrong with a lab.

use p2plab_images::ArtifactError;
use p2plab_nvme::NvmeError;
use p2plab_nvram::NvramError;
use p2plab_pcie::FabricError;
use p2plab_vfio_user::ServeError;

use crate::agent::AgentError;
use crate::qemu::StartError;
use crate::qemu::fault::Fault;
use crate::qemu::qmp::QmpError;
use crate::qemu::snapshot::SnapshotError;
use crate::run_directory::RunDirectoryError;
use crate::topology::{MIB, TopologyError, sizes};
use crate::wait::DeadlineExceeded;

/// Why a lab could not be built, started or used. Each is one sentence, some followed by lines of a log.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The topology.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// What the lab runs on.
    #[error(transparent)]
    Artifacts(#[from] ArtifactError),
    /// The tree of ports.
    #[error(transparent)]
    Fabric(#[from] FabricError),
    /// An NVMe controller's options.
    #[error(transparent)]
    Nvme(#[from] NvmeError),
    /// An NVRAM card's options.
    #[error(transparent)]
    Nvram(#[from] NvramError),
    /// An endpoint's socket.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// QEMU did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// QEMU refused something.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// A base image could not be saved or restored.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The guest agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The guest broke: panic, oops, QEMU's end.
    #[error("{0}")]
    Fault(std::sync::Arc<Fault>),
    /// Something did not happen in time.
    #[error(transparent)]
    Deadline(#[from] DeadlineExceeded),
    /// A condition in the guest did not come true.
    #[error("waited in the guest for {what}: {source}")]
    GuestCondition {
        /// What was waited for.
        what: String,
        /// How the wait ended.
        source: Box<AgentError>,
    },
    /// No endpoint of that name.
    #[error("there is no endpoint `{name}` in this lab; it has: {}", names.join(", "))]
    UnknownEndpoint {
        /// What was asked for.
        name: String,
        /// What there is.
        names: Vec<String>,
    },
    /// The counters broke their own laws.
    #[error("the traffic counters contradict each other: {}", .0.join("; "))]
    Conservation(Vec<String>),
    /// Not enough memory on the host.
    #[error(
        "the lab needs {} of memory and this host has {} left; use a smaller guest (guest.memory), smaller \
         SSDs (--size), or SSDs in files (--media DIR, or the field `file` of a topology)",
        sizes::format(*needed / MIB * MIB), sizes::format(*available / MIB * MIB)
    )]
    Memory {
        /// Bytes needed.
        needed: u64,
        /// Bytes available.
        available: u64,
    },
    /// The run directory.
    #[error(transparent)]
    Run(#[from] RunDirectoryError),
    /// The host refused something about a directory.
    #[error("directory {}: {source}", path.display())]
    Directory {
        /// The directory.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// An option that makes no sense.
    #[error("{0}")]
    BadOption(String),
    /// The file or memory behind an SSD.
    #[error("the medium of an SSD: {0}")]
    Medium(std::io::Error),
    /// An error with the place of its logs.
    #[error("{error}\nThe logs are in {}", path.display())]
    InRun {
        /// The error.
        error: Box<LabError>,
        /// The run directory.
        path: std::path::PathBuf,
    },
    /// Something answered as it should not.
    #[error("{0}")]
    Unexpected(String),
}

impl LabError {
    /// A write to what is behind an SSD failed.
    pub(crate) fn medium(source: std::io::Error) -> Self {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        if matches!(source.kind(), StorageFull | QuotaExceeded) {
            return Self::BadOption(format!(
                "no space for what the SSDs hold ({source}): free some, give a smaller --size, or another folder \
                 with --media"
            ));
        }
        Self::Medium(source)
    }

    /// Adds where the logs of the run are, once.
    pub(crate) fn in_run(self, path: &std::path::Path) -> Self {
        match self {
            Self::InRun { .. } => self,
            error => Self::InRun {
                error: Box::new(error),
                path: path.to_owned(),
            },
        }
    }

    /// Whether the user's input or the host is to blame, rather than the lab or its guest: exit status 2.
    pub fn is_bad_input(&self) -> bool {
        if let Self::InRun { error, .. } = self {
            return error.is_bad_input();
        }
        matches!(
            self,
            Self::Topology(_)
                | Self::Artifacts(_)
                | Self::Fabric(_)
                | Self::Nvme(_)
                | Self::UnknownEndpoint { .. }
                | Self::BadOption(_)
                | Self::Memory { .. }
                | Self::Run(_)
                | Self::Directory { .. }
        )
    }
}
