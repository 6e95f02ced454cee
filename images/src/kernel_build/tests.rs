//! Builds in a user's own tree, of which as much is there as a build needs: a Makefile that compiles.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::patch::write;
use super::root::Root;
use super::*;
use crate::Silent;

/// Compiles `tiny.c` into a file that has a module's `.modinfo`, and notes that it did.
const MAKEFILE: &str =
    "modules:\n\techo built >> $(M)/count\n\t$(CC) -c $(KCFLAGS) -I. $(M)/tiny.c -o $(M)/tiny.ko\n";
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
            ("tree/answer.h", "#define ANSWER 41\n"),
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

    /// Where it is built.
    fn directory(&self) -> PathBuf {
        self.builder()
            .build_directory(&ModuleSource::own(&self.path("tiny")))
    }

    /// How often the Makefile ran since the directory was last made anew.
    fn compilations(&self) -> usize {
        let count = self.directory().join("work/count");
        fs::read_to_string(count).unwrap().lines().count()
    }
}

#[test]
fn what_make_finds_unchanged_is_and_what_it_finds_changed_is_new() {
    let bench = Bench::new();
    bench.source(RELEASE, "#include \"answer.h\"\nint tiny = ANSWER;");
    let (modules, built) = bench.build().unwrap();
    assert!(built);
    assert_eq!(modules.len(), 1);
    assert_eq!(modules[0].name, "tiny");
    assert!(modules[0].path.is_file() && modules[0].with_debug.is_file());
    let (again, built) = bench.build().unwrap();
    assert!(!built);
    assert_eq!(again, modules);

    bench.source(RELEASE, "int tiny, changed;");
    let (changed, built) = bench.build().unwrap();
    assert!(built);
    assert_ne!(changed[0].path, modules[0].path);
    // Back again, it is what it was, with the debug information that belongs to it.
    bench.source(RELEASE, "#include \"answer.h\"\nint tiny = ANSWER;");
    assert_eq!(bench.build().unwrap(), (modules, false));
    // A header of the kernel is as good a reason as the source.
    write(&bench.path("tree/answer.h"), b"#define ANSWER 42\n").unwrap();
    assert!(bench.build().unwrap().1);
    assert_eq!(bench.compilations(), 5);
}

#[test]
fn what_was_read_is_what_is_built() {
    let bench = Bench::new();
    let (builder, source) = (bench.builder(), ModuleSource::own(&bench.path("tiny")));
    let inputs = Inputs::read(&source, &builder.against, &bench.cache, &mut Silent).unwrap();
    bench.source(RELEASE, "int tiny = nothing;");
    builder
        .build_by_make(&source, &inputs, &mut Silent)
        .unwrap();
}

#[test]
fn a_build_that_makes_no_module_is_refused() {
    let bench = Bench::new();
    write(&bench.path("tree/Makefile"), b"modules:\n\ttrue\n").unwrap();
    assert_eq!(
        bench.build().unwrap_err().to_string(),
        "the Kbuild of tiny names no module: give it a line such as `obj-m := tiny.o`"
    );
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
             changed since it was prepared, so run `make` in it"
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
    bench.build().unwrap();
    // Kills make, as a host does that has no memory left.
    write(
        &bench.path("tree/Makefile"),
        b"modules:\n\techo half > $(M)/tiny.o\n\tkill -9 $$PPID\n",
    )
    .unwrap();
    let said = bench.build().unwrap_err().to_string();
    assert!(
        said.starts_with("the build of tiny was ended from outside")
            && said.contains("run it again"),
        "{said}"
    );
    let half = bench.directory().join("work/tiny.o");
    assert!(half.exists());
    write(&bench.path("tree/Makefile"), MAKEFILE.as_bytes()).unwrap();
    bench.build().unwrap();
    assert_eq!(bench.compilations(), 1);
    assert!(!half.exists());
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
    assert_eq!(bench.compilations(), 4);
}

/// Names, to the process that is killed, the directory that it builds in.
const TO_KILL: &str = "P2PLAB_BUILD_TO_KILL";

#[test]
fn a_build_dies_with_the_process_that_runs_it() {
    if let Some(directory) = std::env::var_os(TO_KILL) {
        return build_for_ever(Path::new(&directory));
    }
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("work")).unwrap();
    let lock = File::create(dir.path().join("lock")).unwrap();
    let mut builder = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "kernel_build::tests::a_build_dies_with_the_process_that_runs_it",
        ])
        .env(TO_KILL, dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = dir.path().join("work/started");
    until("the build to start", || started.exists());
    let now = FlockOperation::NonBlockingLockExclusive;
    assert!(flock(&lock, now).is_err());
    builder.kill().unwrap();
    builder.wait().unwrap();
    // Held by each process of the build, as its standard input.
    until("the build to be dead", || flock(&lock, now).is_ok());
}

/// A build in a root that is the host's, with a process in it that never ends.
fn build_for_ever(directory: &Path) {
    let lock = File::open(directory.join("lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let root = Root {
        toolchain: PathBuf::from("/"),
        headers: None,
    };
    let script = "(trap '' HUP TERM; sleep 600) & echo > /work/started; wait";
    let command = ["sh", "-c", script].map(str::to_owned);
    let ended = root.run(&directory.join("work"), &command, Stdio::from(lock));
    panic!("the build has ended: {ended:?}");
}

fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "waited 60 s for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
