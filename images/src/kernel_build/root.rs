//! A root of its own for a build, without root: toolchain and headers where they expect to be.
//!
//! Debian's headers name `/usr/src` and `/usr/lib`, and its compiler its own loader, so a build has to be entered
//! (user, mount and PID namespaces, chroot). A build is to write to `/work` only.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::BuildError;
use crate::{ArtifactError, child};

/// Where a build finds what it works on.
pub(super) const WORK: &str = "/work";

/// What the script ends with when the host refuses it the first mount; no program of a build does.
const REFUSED: i32 = 99;
/// What it ends with when it fails after that.
const BROKEN: i32 = 98;

/// Arguments: an empty directory for the root, the toolchain, the headers (or an empty word), what becomes /work, and
/// the command. objtool wants /proc. Compiler and headers, which are the whole cache's, are read-only. The mounts end
/// with the namespace, and with it the processes in it.
pub(super) const SCRIPT: &str = r#"
set -e
new=$1 tools=$2 headers=$3 work=$4
shift 4
# chroot and, on some systems, mount: not every user's path has them.
PATH=$PATH:/usr/sbin:/sbin
mount -t tmpfs -o mode=0755 p2plab-build "$new" || exit 99
trap 'exit 98' EXIT
mkdir -p "$new/usr/lib" "$new/usr/src" "$new/proc" "$new/dev" "$new/tmp" "$new/work"
bind() {
    if [ -d "$1" ]; then mkdir -p "$2"; else : > "$2"; fi
    mount --bind "$1" "$2"
    # Not where the host mounts it with flags that nobody but root may change.
    mount -o remount,bind,ro "$2" 2> /dev/null || :
}
for path in "$tools"/usr/*; do
    case $path in */lib | */src) ;; *) bind "$path" "$new/usr/${path##*/}" ;; esac
done
for path in "$tools"/usr/lib/* ${headers:+"$headers"/usr/lib/*}; do
    bind "$path" "$new/usr/lib/${path##*/}"
done
[ -z "$headers" ] || bind "$headers/usr/src" "$new/usr/src"
for name in bin sbin lib lib64; do ln -s "usr/$name" "$new/$name"; done
: > "$new/dev/null"
mount --bind /dev/null "$new/dev/null"
mount --rbind /proc "$new/proc"
mount --bind "$work" "$new/work"
trap - EXIT
exec chroot "$new" /usr/bin/env -i PATH=/usr/bin:/usr/sbin HOME=/tmp LC_ALL=C "$@"
"#;

/// A root to build in.
#[derive(Debug, Clone)]
pub(super) struct Root {
    /// Unpacked compiler and tools.
    pub toolchain: PathBuf,
    /// Unpacked headers; `None` for commands that need none.
    pub headers: Option<PathBuf>,
}

impl Root {
    /// Runs a command in the root, with `work` as `/work`. Whatever it starts dies with us. A failing status is no
    /// error here.
    pub(super) fn run(
        &self,
        work: &Path,
        command: &[String],
        stdin: Stdio,
    ) -> Result<Output, ArtifactError> {
        let needed = [Some(&self.toolchain), self.headers.as_ref()];
        for path in needed.into_iter().flatten().map(|root| root.join("usr")) {
            if !path.is_dir() {
                return Err(ArtifactError::CacheDamaged { path });
            }
        }
        // In what becomes /work, where a killed build's is swept away; hidden from whoever looks for sources.
        let mount_point = tempfile::Builder::new()
            .prefix(".root-")
            .tempdir_in(work)
            .map_err(|error| ArtifactError::writing(work, error))?;
        let headers = self.headers.as_deref().unwrap_or(Path::new(""));
        let mut unshare = unshare();
        unshare
            .args(["sh", "-c", SCRIPT, "p2plab-build"])
            .args([mount_point.path(), &self.toolchain, headers, work])
            .args(command);
        entered(child::output_with(&mut unshare, stdin)?)
    }
}

fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.args([
        "--map-root-user",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
    ]);
    command.arg("--");
    command
}

/// Tells a build that failed from a root that could not be entered.
fn entered(out: Output) -> Result<Output, ArtifactError> {
    let text = String::from_utf8_lossy(&out.stderr);
    let by_unshare = !out.status.success() && text.starts_with("unshare: ");
    if by_unshare || out.status.code() == Some(REFUSED) {
        return Err(BuildError::NamespaceRefused {
            detail: child::reason(&out),
        }
        .into());
    }
    if out.status.code() == Some(BROKEN) {
        return Err(ArtifactError::ProgramFailed {
            program: "making a root to build modules in".to_owned(),
            detail: child::reason(&out),
        });
    }
    Ok(out)
}

/// Makes of the unpacked toolchain what its packages' installation would have: awk is a name that several offer.
pub(super) fn finish_toolchain(root: &Path) -> Result<(), ArtifactError> {
    let awk = root.join("usr/bin/awk");
    if awk.symlink_metadata().is_ok() {
        return Ok(());
    }
    std::os::unix::fs::symlink("mawk", &awk).map_err(|error| ArtifactError::writing(&awk, error))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_host_without_user_namespaces_is_told_from_a_failed_build() {
        let refused =
            "echo 0 > /proc/sys/user/max_user_namespaces && exec unshare --map-root-user true";
        let mut command = unshare();
        command.args(["sh", "-c", refused]);
        let error = entered(child::output(&mut command).unwrap()).unwrap_err();
        let said = error.to_string();
        let (what, cure) = said.split_once(" (").unwrap();
        let (why, cure) = cure.split_once("): ").unwrap();
        assert_eq!(
            what,
            "this host does not let its users enter a root of their own, in which modules are built"
        );
        assert!(why.starts_with("unshare: unshare failed: "), "{why}");
        assert_eq!(
            cure,
            "allow user namespaces (sysctl user.max_user_namespaces=10000, and where they are there \
             kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0), or build for a \
             kernel tree of yours with --kdir DIR, which needs none"
        );

        let failed =
            child::output(Command::new("sh").args(["-c", "echo x.c:1: error >&2; exit 2"]));
        assert_eq!(entered(failed.unwrap()).unwrap().status.code(), Some(2));
    }

    #[test]
    fn a_mount_that_is_refused_is_said_so_and_a_toolchain_that_is_not_there_too() {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("work");
        fs::create_dir(&work).unwrap();
        let run = |toolchain: &Path| {
            let root = Root {
                toolchain: toolchain.to_owned(),
                headers: None,
            };
            root.run(&work, &["true".into()], Stdio::null())
        };
        let error = run(&dir.path().join("none")).unwrap_err();
        assert!(
            matches!(&error, ArtifactError::CacheDamaged { .. }),
            "{error}"
        );

        // A mount without privileges, as where unshare gives none.
        let nowhere = dir.path().join("nowhere");
        let mut script = Command::new("sh");
        script.args(["-c", SCRIPT, "p2plab-build"]);
        script.args([&nowhere, Path::new("/"), Path::new(""), &work]);
        let error = entered(child::output(&mut script).unwrap()).unwrap_err();
        let is_refusal = matches!(
            &error,
            ArtifactError::Build(BuildError::NamespaceRefused { .. })
        );
        assert!(is_refusal, "{error}");

        // A path as Debian gives to users who are not root.
        let mut entered = unshare();
        entered.args(["sh", "-c", SCRIPT, "p2plab-build"]);
        let mount_point = dir.path().join("root");
        fs::create_dir(&mount_point).unwrap();
        entered.args([&mount_point, Path::new("/"), Path::new(""), &work]);
        entered
            .arg("true")
            .env("PATH", "/usr/local/bin:/usr/bin:/bin");
        let out = child::output(&mut entered).unwrap();
        assert!(out.status.success(), "{}", child::reason(&out));
    }
}
