//! `p2plab run` and `p2plab list`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use p2plab::scenarios::media::check_media;
use p2plab::scenarios::{BufferOwner, SCENARIOS, Scenario, ScenarioOptions};
use p2plab_images::Terminal;

use super::{CliError, OwnArgs, size};

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// The scenario; `p2plab list` names them
    scenario: String,
    /// Bytes to copy in each mode [default: 1GiB]
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// Bytes moved by one read and one write [default: 1MiB]
    #[arg(long, value_parser = size)]
    chunk: Option<u64>,
    /// Threads that copy [default: 2]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: Option<u32>,
    /// Chunks that each thread has in flight [default: 4]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    depth: Option<u32>,
    /// SSD whose memory a peer-to-peer copy goes through [default: source]
    #[arg(long, value_enum)]
    buffer: Option<Buffer>,
    /// Boot the guest from scratch instead of restoring it from a base image
    #[arg(long)]
    cold: bool,
    /// Keep the SSDs' contents in files of this folder, which is there, instead of in memory
    #[arg(long, value_name = "DIR")]
    media: Option<PathBuf>,
    /// Write what the table says, and more, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    own: OwnArgs,
}

/// [`BufferOwner`] on the command line.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Buffer {
    /// The SSD that is read
    Source,
    /// The SSD that is written
    Destination,
    /// An SSD that takes no part otherwise
    Third,
}

impl Buffer {
    fn owner(self) -> BufferOwner {
        match self {
            Self::Source => BufferOwner::Source,
            Self::Destination => BufferOwner::Destination,
            Self::Third => BufferOwner::Third,
        }
    }
}

/// `p2plab list`.
pub(super) fn list() {
    for scenario in &SCENARIOS {
        say!("{:18} {}", scenario.name, scenario.summary);
    }
}

/// `p2plab run`.
pub(super) fn run(args: &RunArgs) -> Result<ExitCode, CliError> {
    let scenario = find(&args.scenario)?;
    if let Some(media) = &args.media {
        check_media(media)?;
    }
    if let Some(path) = &args.json {
        writable(path)?;
    }
    args.check_taken_by(scenario)?;
    let default = ScenarioOptions::default();
    let options = ScenarioOptions {
        size: args.size.unwrap_or(default.size),
        chunk: args.chunk.unwrap_or(default.chunk),
        threads: args.threads.unwrap_or(default.threads),
        depth: args.depth.unwrap_or(default.depth),
        buffer: args.buffer.map_or(default.buffer, Buffer::owner),
        cold: args.cold,
        media: args.media.clone(),
        run_directory: None,
        own: args.own.own(),
    };
    let report = (scenario.run)(&options, &mut Terminal::new())?;
    say!("{}", report.to_string().trim_end());
    if let Some(path) = &args.json {
        report
            .write_json(path)
            .map_err(|error| not_written(path, &error))?;
    }
    Ok(if report.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl RunArgs {
    /// Refuses options that would change nothing.
    fn check_taken_by(&self, scenario: &Scenario) -> Result<(), CliError> {
        let given = [
            ("size", self.size.is_some()),
            ("chunk", self.chunk.is_some()),
            ("threads", self.threads.is_some()),
            ("depth", self.depth.is_some()),
            ("buffer", self.buffer.is_some()),
            ("cold", self.cold),
            ("media", self.media.is_some()),
        ];
        for (option, given) in given {
            if given && scenario.fixed.contains(&option) {
                return Err(CliError::Input(format!(
                    "{} chooses by itself what --{option} says; leave --{option} out",
                    scenario.name
                )));
            }
        }
        Ok(())
    }
}

fn find(name: &str) -> Result<&'static Scenario, CliError> {
    SCENARIOS
        .iter()
        .find(|scenario| scenario.name == name)
        .ok_or_else(|| {
            let names: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
            let nearest = names.iter().max_by(|a, b| {
                strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name))
            });
            CliError::Input(format!(
                "there is no scenario `{name}`; did you mean `{}`? There are: {}",
                nearest.copied().unwrap_or_default(),
                names.join(", ")
            ))
        })
}

/// Finds out before the work, not after it, that the file cannot be written.
pub(super) fn writable(path: &std::path::Path) -> Result<(), CliError> {
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map(drop)
        .map_err(|error| not_written(path, &error))
}

pub(super) fn not_written(path: &std::path::Path, error: &std::io::Error) -> CliError {
    CliError::Input(format!(
        "--json {} cannot be written: {error}",
        path.display()
    ))
}
