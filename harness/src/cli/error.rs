//! What a command can fail with, and the exit status for it.

use std::process::ExitCode;

use p2plab::agent::AgentError;
use p2plab::lab::LabError;
use p2plab::topology::TopologyError;
use p2plab_images::ArtifactError;

/// One sentence for the user.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The lab.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// The user's input, or the host.
    #[error("{0}")]
    Input(String),
    /// Something failed that is neither.
    #[error("{0}")]
    Failed(String),
}

impl CliError {
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Lab(error) if error.is_bad_input() => ExitCode::from(2),
            Self::Input(_) => ExitCode::from(2),
            Self::Lab(_) | Self::Failed(_) => ExitCode::from(1),
        }
    }
}

impl From<TopologyError> for CliError {
    fn from(error: TopologyError) -> Self {
        LabError::from(error).into()
    }
}

impl From<ArtifactError> for CliError {
    fn from(error: ArtifactError) -> Self {
        LabError::from(error).into()
    }
}

impl From<AgentError> for CliError {
    fn from(error: AgentError) -> Self {
        LabError::from(error).into()
    }
}
