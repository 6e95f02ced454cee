//! What can be wrong with a topology, in one sentence each.

use std::fmt;
use std::path::PathBuf;

use super::sizes::{self, BadSize};
use super::times::BadTime;

/// Why a topology is refused: what, where, and how to mend it.
#[derive(Debug)]
pub struct TopologyError {
    /// Where in which file; `None` for a topology built in Rust.
    pub place: Option<Place>,
    /// What is wrong.
    pub fault: Box<TopologyFault>,
}

impl fmt::Display for TopologyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        self.fault.fmt(f)
    }
}

impl std::error::Error for TopologyError {}

/// A position in a topology file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: PathBuf,
    /// Line and column, both counted from 1, in characters; `None` where the file as a whole is meant.
    pub position: Option<(usize, usize)>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        match self.position {
            Some((line, column)) => write!(f, ":{line}:{column}"),
            None => Ok(()),
        }
    }
}

/// The fault itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyFault {
    /// The file cannot be read.
    #[error("cannot read the topology: {0}")]
    Unreadable(std::io::Error),
    /// Not TOML.
    #[error("this is not TOML: {0}")]
    Syntax(String),
    /// A field that does not exist there.
    #[error("{context} has no field `{field}`; {hint}")]
    UnknownField {
        /// What it was said of, such as "an nvme endpoint".
        context: &'static str,
        /// The field.
        field: String,
        /// The nearest or all valid names.
        hint: String,
    },
    /// A word that is not among those allowed.
    #[error("`{word}` is not a value of `{field}`; {hint}")]
    UnknownWord {
        /// The field.
        field: &'static str,
        /// The word.
        word: String,
        /// The nearest or all valid words.
        hint: String,
    },
    /// A field that must be there.
    #[error("{context} needs the field `{field}`, as in `{example}`")]
    MissingField {
        /// What lacks it.
        context: &'static str,
        /// The field.
        field: &'static str,
        /// A valid line.
        example: &'static str,
    },
    /// A value of another type.
    #[error("`{field}` must be {wanted}, not {found}")]
    WrongType {
        /// The field.
        field: String,
        /// What it must be.
        wanted: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// Not a size.
    #[error("`{field}`: {error}")]
    BadSize {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        error: BadSize,
    },
    /// Not a time.
    #[error("`{field}`: {error}")]
    BadTime {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        error: BadTime,
    },
    /// A name with other characters, empty or too long.
    #[error("`{0}` is not a name: use 1 to 32 characters of a-z, A-Z, 0-9, `.`, `_` and `-`")]
    BadName(String),
    /// Two things of one name.
    #[error("the name `{name}` is taken by {first}; give {second} another one")]
    DuplicateName {
        /// The name.
        name: String,
        /// What has it.
        first: &'static str,
        /// What wants it, too.
        second: &'static str,
    },
    /// No such port.
    #[error("`{user}` is to be connected to port `{port}`, which does not exist; {hint}")]
    UnknownPort {
        /// What is below it.
        user: String,
        /// The port.
        port: String,
        /// The nearest or all ports.
        hint: String,
    },
    /// Two things in one port.
    #[error("port `{port}` holds `{first}` already; connect `{second}` to another port")]
    PortTaken {
        /// The port.
        port: String,
        /// What it holds.
        first: String,
        /// What is to be there, too.
        second: String,
    },
    /// Switches below each other.
    #[error(
        "switch `{0}` hangs below itself; follow its `below` up and connect one switch to a root port"
    )]
    Loop(String),
    /// Switches in too long a chain.
    #[error("switch `{switch}` is {depth} switches deep, at most {limit} are supported")]
    TooDeep {
        /// The lowest switch.
        switch: String,
        /// How deep it is.
        depth: usize,
        /// The limit.
        limit: usize,
    },
    /// Too many of something, or none where one is needed.
    #[error("there are {count} {what}, {min} to {max} are supported")]
    BadCount {
        /// Of what.
        what: String,
        /// How many.
        count: usize,
        /// At least.
        min: usize,
        /// At most.
        max: usize,
    },
    /// A number out of its bounds.
    #[error("`{field}` is {value}, it must be {min} to {max}")]
    OutOfBounds {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// At least.
        min: String,
        /// At most.
        max: String,
    },
    /// A size that is not a power of two.
    #[error("`{field}` is {}, it must be a power of two, such as {}", sizes::format(*.value), sizes::format(*.nearest))]
    NotPowerOfTwo {
        /// The field.
        field: &'static str,
        /// Its bytes.
        value: u64,
        /// The next power of two.
        nearest: u64,
    },
    /// A size that is not a multiple.
    #[error("`{field}` is {}, it must be a multiple of {}", sizes::format(*.value), sizes::format(*.unit))]
    NotMultiple {
        /// The field.
        field: &'static str,
        /// Its bytes.
        value: u64,
        /// Of what.
        unit: u64,
    },
    /// The BARs of an endpoint do not fit behind its port.
    #[error(
        "{what} of `{endpoint}` takes {} and does not fit into a window of {}; set `window = \"{}\"` under \
         [guest] or make them smaller",
        sizes::format(*.bar), sizes::format(*.window), sizes::format(*.wanted)
    )]
    WindowTooSmall {
        /// What of it.
        what: &'static str,
        /// The endpoint.
        endpoint: String,
        /// Bytes of its BARs.
        bar: u64,
        /// Bytes of the window.
        window: u64,
        /// Bytes of a window that would do.
        wanted: u64,
    },
    /// All windows together are larger than the guest's physical address space allows.
    #[error(
        "{slots} slots with windows of {} need {} of the guest's address space, at most {} are \
         supported; make `window` under [guest] smaller or use fewer ports",
        sizes::format(*.window), sizes::format(*.total), sizes::format(*.limit)
    )]
    WindowsTooLarge {
        /// Number of slots.
        slots: usize,
        /// Bytes of each window.
        window: u64,
        /// Bytes of all.
        total: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A text with characters that cannot be passed on.
    #[error("`{field}` = `{value}`: {rule}")]
    BadText {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it must look like.
        rule: &'static str,
    },
    /// Two fields that do not go together.
    #[error("`{field}` needs `{needs}`, too")]
    Needs {
        /// The field that is there.
        field: &'static str,
        /// The field that is not.
        needs: &'static str,
    },
    /// Two fields of which only one may be there.
    #[error("`{field}` and `{other}` do not go together; {cure}")]
    Conflict {
        /// One.
        field: &'static str,
        /// The other.
        other: &'static str,
        /// What to do.
        cure: &'static str,
    },
    /// A file or folder that is not there, or of the wrong kind.
    #[error("`{field}` of {owner}: {}: {problem}; {mend}", .path.display())]
    HostPath {
        /// The field.
        field: &'static str,
        /// `the guest`, or an endpoint.
        owner: String,
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// How to mend it.
        mend: String,
    },
}

/// A hint at valid names: the nearest ones, or all where none is near.
pub(super) fn hint(wrong: &str, what: &str, valid: &[&str]) -> String {
    // A name from a file can be of any length; comparing costs the product of both lengths.
    let wrong = wrong.chars().take(64).collect::<String>();
    let mut near: Vec<(f64, &str)> = valid
        .iter()
        .map(|name| (strsim::jaro_winkler(&wrong, name), *name))
        .filter(|(likeness, _)| *likeness > 0.8)
        .collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    let quote = |names: &[&str]| {
        names
            .iter()
            .map(|name| format!("`{name}`"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let near = near
        .into_iter()
        .take(3)
        .map(|(_, name)| name)
        .collect::<Vec<_>>();
    match (near.is_empty(), valid.is_empty()) {
        (false, _) => format!("did you mean {}?", quote(&near)),
        (true, false) => format!("valid are {}", quote(valid)),
        (true, true) => format!("there is no {what} at all"),
    }
}
