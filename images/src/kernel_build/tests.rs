//! Builds in a user's own tree, of which as much is there as a build needs: a Makefile that compiles.

use std::time::{Duration, Instant};

use super::*;
use crate::Silent;

/// Compiles `tiny.c` into a file that has a module's `.modinfo`, and notes that it did.
const MAKEFILE: &str =
    "modules:\n\techo built >> $(M)/count\n\t$(CC) -c $(KCFLAGS) $(M)/tiny.c -o $(M)/tiny.ko\n";
const RELEASE: &str = "7.9.0-rc1+";

struct Bench {
    dir: tempfile::TempDir,
    cache: Cache,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bench = Self {
            cache: Cache::at(dir.path().join("cache")),
            dir,
        };
        bench.cache.directory("").unwrap();
        for (name, text) in [
            ("tree/Makefile", MAKEFILE),
            ("tree/.config", "CONFIG_X86_64=y\nCONFIG_PCI_P2PDMA=y\n"),
            ("tree/Module.symvers", ""),
            ("tree/include/config/kernel.release", RELEASE),
            ("tiny/Kbuild", "obj-m := tiny.o\n"),
        ] {
            write(&bench.path(name), text.as_bytes()).unwrap();
        }
        bench.source(RELEASE, "int tiny;");
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn source(&self, release: &str, text: &str) {
        let info = format!(
            "{text}\n__attribute__((section(\".modinfo\"), used)) static const char v[] = \"vermagic={release} SMP\";\n"
        );
        write(&self.path("tiny/tiny.c"), info.as_bytes()).unwrap();
    }

    fn builder(&self) -> ModuleBuilder {
        let target = BuildTarget::Tree(self.path("tree"));
        ModuleBuilder::open(&self.cache, &target, &mut Silent).unwrap()
    }

    fn build(&self) -> Result<(Vec<BuiltModule>, bool), ArtifactError> {
        self.builder()
            .build(&ModuleSource::own(&self.path("tiny")), &mut Silent)
    }

    /// How often the Makefile ran in the directory that is kept.
    fn compilations(&self) -> usize {
        let (modules, _) = self.build().unwrap();
        let count = modules[0].with_debug.with_file_name("count");
        fs::read_to_string(count).unwrap().lines().count()
    }
}

#[test]
fn nothing_is_done_where_nothing_changed() {
    let bench = Bench::new();
    let (modules, built) = bench.build().unwrap();
    assert!(built);
    assert_eq!(modules.len(), 1);
    assert_eq!(modules[0].name, "tiny");
    assert!(modules[0].path.is_file() && modules[0].with_debug.is_file());
    let (again, built) = bench.build().unwrap();
    assert!(!built);
    assert_eq!(again, modules);
    assert_eq!(bench.compilations(), 1);

    bench.source(RELEASE, "int tiny, changed;");
    let (changed, built) = bench.build().unwrap();
    assert!(built);
    assert_ne!(changed[0].path, modules[0].path);
    assert_eq!(bench.compilations(), 2);
    // The kernel is as good a reason as the source.
    write(&bench.path("tree/vmlinux"), b"anew").unwrap();
    assert!(bench.build().unwrap().1);
}

#[test]
fn what_does_not_compile_says_what_the_compiler_says() {
    let bench = Bench::new();
    bench.source(RELEASE, "int tiny = nothing;");
    let said = bench.build().unwrap_err().to_string();
    assert!(
        said.starts_with("tiny does not build for kernel 7.9.0-rc1+; correct"),
        "{said}"
    );
    assert!(
        said.contains("nothing") && said.contains("error:"),
        "{said}"
    );
    assert!(!said.contains("***"), "{said}");
    // And the next one starts from there.
    bench.source(RELEASE, "int tiny;");
    assert!(bench.build().unwrap().1);
}

#[test]
fn a_module_of_another_kernel_is_refused() {
    let bench = Bench::new();
    bench.source("7.8.1", "int tiny;");
    let said = bench.build().unwrap_err().to_string();
    let tree = fs::canonicalize(bench.path("tree")).unwrap();
    let tree = tree.display();
    assert_eq!(
        said,
        format!(
            "tiny came out for kernel 7.8.1, but {tree} is of kernel 7.9.0-rc1+ and would not load it: that tree has \
             changed since it was prepared, so run `make modules_prepare` in it, or `make`"
        )
    );
    // Nothing of it is kept.
    assert!(bench.build().is_err());
    let said = bench
        .builder()
        .require_release("7.3.4")
        .unwrap_err()
        .to_string();
    assert_eq!(
        said,
        format!(
            "the headers in {tree} are of kernel 7.9.0-rc1+, and the modules are to run on 7.3.4: give the headers of \
             7.3.4, or the kernel 7.9.0-rc1+"
        )
    );
}

#[test]
fn what_a_killed_build_left_is_not_built_upon() {
    let bench = Bench::new();
    let (modules, _) = bench.build().unwrap();
    let directory = modules[0]
        .with_debug
        .parent()
        .unwrap()
        .parent()
        .unwrap()
        .to_owned();
    write(&directory.join(UNFINISHED), b"").unwrap();
    write(&directory.join("work/tiny.o"), b"half of it").unwrap();
    bench.source(RELEASE, "int tiny, changed;");
    bench.build().unwrap();
    assert_eq!(bench.compilations(), 1);
    assert!(!directory.join("work/tiny.o").exists());
}

#[test]
fn equal_files_keep_their_times_and_vanished_ones_vanish() {
    let dir = tempfile::tempdir().unwrap();
    let files = |pairs: &[(&str, &str)]| -> Files {
        let pairs = pairs.iter();
        pairs
            .map(|(name, text)| (PathBuf::from(name), text.as_bytes().to_vec()))
            .collect()
    };
    let work = begin(
        dir.path(),
        &files(&[("a.c", "a"), ("b.c", "b"), ("d/h.h", "h")]),
    )
    .unwrap();
    finish(dir.path()).unwrap();
    let time = |name: &str| fs::metadata(work.join(name)).unwrap().modified().unwrap();
    let (a, b) = (time("a.c"), time("b.c"));
    write(&work.join("x.mod.c"), b"made").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    begin(dir.path(), &files(&[("a.c", "a"), ("b.c", "other")])).unwrap();
    assert_eq!(time("a.c"), a);
    assert_ne!(time("b.c"), b);
    assert!(!work.join("d/h.h").exists() && work.join("x.mod.c").exists());
}

#[test]
fn of_two_at_once_one_builds() {
    let bench = Bench::new();
    let built: Vec<bool> = std::thread::scope(|scope| {
        let builds: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| bench.build().unwrap().1))
            .collect();
        builds
            .into_iter()
            .map(|build| build.join().unwrap())
            .collect()
    });
    assert_eq!(built.iter().filter(|&&built| built).count(), 1, "{built:?}");
    assert_eq!(bench.compilations(), 1);
}

#[test]
fn a_build_dies_with_the_thread_that_runs_it() {
    // A root without a build: what runs in it is what must die.
    let mut command = std::process::Command::new("unshare");
    command.args([
        "--map-root-user",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--",
    ]);
    let marker = tempfile::tempdir().unwrap();
    let pid_file = marker.path().join("pid");
    let script = "sh -c 'sleep 600' & echo started > $0; wait";
    command.args(["sh", "-c", script]).arg(&pid_file);
    let child = std::thread::spawn(move || {
        let child = crate::child::dies_with_us(&mut command).spawn().unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while !pid_file.exists() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(pid_file.exists());
        child
    });
    let mut child = child.join().unwrap();
    // Ends at once; unshare that waited for its child would hold the test for ten minutes.
    assert!(!child.wait().unwrap().success());
}
