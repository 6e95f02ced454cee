//! Running the kernel's own build on a directory, and what it says when it fails.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::root::{Root, WORK};
use super::{BuildError, Strictness};
use crate::{ArtifactError, child};

/// Where the headers lie that patches change.
const HEADERS: &str = "include";

/// Most lines of a compiler that are repeated.
const MOST_LINES: usize = 60;

/// Builds the modules, then leaves a copy of each without debug information in `stripped/`. Words: the kernel's build
/// directory, the directory to build, where its results go, `strip`, and make's further arguments.
pub(super) const SCRIPT: &str = r#"
set -e
kernel=$1 build=$2 stripped=$3 strip=$4
shift 4
make -C "$kernel" M="$build" "$@"
rm -rf "$stripped"
mkdir "$stripped"
for module in "$build"/*.ko; do
    [ ! -e "$module" ] || "$strip" --strip-debug -o "$stripped/${module##*/}" "$module"
done
"#;

/// Where the kernel's build is.
#[derive(Debug, Clone)]
pub(super) enum Place {
    /// Fetched headers, used in a root of their own.
    Packaged(Root),
    /// The user's own tree, with the host's tools.
    Tree(PathBuf),
}

/// What is to be built.
#[derive(Debug)]
pub(super) struct Order<'a> {
    /// Its name, for messages.
    pub module: &'a str,
    /// The kernel's release.
    pub release: &'a str,
    /// The directory below `work` that is built.
    pub directory: &'a str,
    /// The modules to build; none for all that the directory's Kbuild names.
    pub modules: &'a [String],
    pub strictness: Strictness,
    /// Standard input of what is started.
    pub stdin: Stdio,
}

impl Place {
    /// Runs the build. The results are in `work/stripped`.
    pub(super) fn make(&self, work: &Path, order: Order<'_>) -> Result<(), ArtifactError> {
        let mut words = Vec::new();
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        words.push(format!("-j{jobs}"));
        // Type information for BPF is made of a kernel image, which headers have not.
        words.push("CONFIG_DEBUG_INFO_BTF_MODULES=".to_owned());
        if order.strictness == Strictness::WarningsAreErrors {
            words.extend(["W=1".to_owned(), "KCFLAGS=-Werror".to_owned()]);
        }
        if let Self::Tree(tree) = self {
            words.extend(compiler_of(tree).map(str::to_owned));
        }
        match order.modules {
            [] => words.push("modules".to_owned()),
            modules => words.extend(modules.iter().map(|module| format!("{module}.ko"))),
        }
        let kernel = match self {
            Self::Packaged(_) => format!("/usr/src/linux-headers-{}", order.release),
            Self::Tree(tree) => tree.display().to_string(),
        };
        let base = match self {
            Self::Packaged(_) => Path::new(WORK),
            Self::Tree(_) => work,
        };
        let build = base.join(order.directory);
        if work.join(HEADERS).is_dir() {
            // Before the kernel's own; it stands first on the compiler's command line.
            let headers = base.join(HEADERS);
            words.push(format!("NOSTDINC_FLAGS=-nostdinc -I{}", headers.display()));
        }
        let strip = match self {
            Self::Packaged(_) => "x86_64-linux-gnu-strip",
            Self::Tree(_) => "strip",
        };
        let mut command = ["sh", "-c", SCRIPT, "p2plab-build", &kernel]
            .map(str::to_owned)
            .to_vec();
        for path in [&build, &base.join("stripped")] {
            command.push(path.display().to_string());
        }
        command.push(strip.to_owned());
        command.append(&mut words);
        let out = self.run_with(work, &command, order.stdin)?;
        if out.status.success() {
            return Ok(());
        }
        // A shell says so of what it waits for by a status of 128 and the signal.
        if out.status.code().is_none_or(|code| code > 128) {
            return Err(BuildError::Interrupted {
                module: order.module.to_owned(),
                status: out.status,
            }
            .into());
        }
        if let Self::Tree(tree) = self {
            require_programs(tree)?;
        }
        Err(BuildError::Compile {
            module: order.module.to_owned(),
            release: order.release.to_owned(),
            lines: complaint(&out),
        }
        .into())
    }

    /// Runs a command where the build runs, with `work` as its directory to work on.
    pub(super) fn run(&self, work: &Path, command: &[String]) -> Result<Output, ArtifactError> {
        self.run_with(work, command, Stdio::null())
    }

    fn run_with(
        &self,
        work: &Path,
        command: &[String],
        stdin: Stdio,
    ) -> Result<Output, ArtifactError> {
        match self {
            Self::Packaged(root) => root.run(work, command, stdin),
            Self::Tree(_) => {
                let mut words = command.iter();
                let mut host = Command::new(words.next().map_or("true", String::as_str));
                // What a make that started us meant for its own children.
                for name in [
                    "MAKEFLAGS",
                    "MFLAGS",
                    "MAKELEVEL",
                    "KBUILD_OUTPUT",
                    "KBUILD_EXTMOD",
                ] {
                    host.env_remove(name);
                }
                child::output_with(host.args(words).current_dir(work), stdin)
            }
        }
    }

    /// How a command that [`run`](Self::run) starts finds `work`.
    pub(super) fn work(&self, work: &Path) -> PathBuf {
        match self {
            Self::Packaged(_) => PathBuf::from(WORK),
            Self::Tree(_) => work.to_owned(),
        }
    }
}

/// What `make` must be told of the compiler that a tree was built with.
fn compiler_of(tree: &Path) -> Option<&'static str> {
    let config = std::fs::read_to_string(tree.join(".config")).ok()?;
    config
        .lines()
        .any(|line| line == "CONFIG_CC_IS_CLANG=y")
        .then_some("LLVM=1")
}

/// Looks for what a failed build in a tree may have lacked.
fn require_programs(tree: &Path) -> Result<(), BuildError> {
    for program in ["make", "strip"] {
        let mut command = Command::new(program);
        if let Err(ArtifactError::ProgramMissing { program }) =
            child::output(command.arg("--version"))
        {
            return Err(BuildError::ProgramMissing {
                program,
                tree: tree.to_owned(),
            });
        }
    }
    Ok(())
}

/// What the compiler and modpost wrote, without make's account of how it gave up.
pub(super) fn complaint(out: &Output) -> String {
    let text = String::from_utf8_lossy(&out.stderr);
    let of_make = |line: &str| line.starts_with("make") && line.contains("***");
    let lines: Vec<&str> = text.lines().filter(|line| !of_make(line)).collect();
    if lines.is_empty() {
        return child::reason(out);
    }
    let mut said = lines
        .get(..MOST_LINES.min(lines.len()))
        .unwrap_or_default()
        .join("\n");
    if lines.len() > MOST_LINES {
        said.push_str(&format!("\n({} lines more)", lines.len() - MOST_LINES));
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_compiler_says_is_kept_and_make_s_account_is_not() {
        let script = "echo 'x.c:3:1: error: unknown type' >&2; echo '    3 | foo' >&2; \
                      echo 'make[3]: *** [x.o] Error 1' >&2; exit 2";
        let out = child::output(Command::new("sh").args(["-c", script])).unwrap();
        assert_eq!(complaint(&out), "x.c:3:1: error: unknown type\n    3 | foo");
        let script = "i=0; while [ $i -lt 70 ]; do echo line $i >&2; i=$((i+1)); done; exit 2";
        let out = child::output(Command::new("sh").args(["-c", script])).unwrap();
        assert!(complaint(&out).ends_with("(10 lines more)"));
        let out = child::output(Command::new("sh").args(["-c", "exit 2"])).unwrap();
        assert!(complaint(&out).contains('2'));
    }
}
