//! The system image: Debian's tools, mounted below [`ROOT`] with what the guest has bound into it.

use std::fs::create_dir_all;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Result;
use rustix::mount::{MountFlags, mount, mount_bind_recursive};

use crate::boot::say;

/// A root file system to chroot into.
const ROOT: &str = "/system";
/// Where its layers are: the image, and a tmpfs for what is written.
const LAYERS: &str = "/run/p2plab-system";
/// The guest's own, to be found in it, too. `/run` would hold the layers once more: it stays out, and the root has
/// one of its own.
const BOUND: [&str; 4] = ["/dev", "/proc", "/sys", "/tmp"];
/// How long the disk may take to appear: its driver has been loaded, and usually it is there.
const PATIENCE: Duration = Duration::from_secs(5);

/// Mounts the image on `disk` (a name below /dev); what goes wrong is said on the console.
pub fn mount_image(disk: &str) {
    if let Err((what, error)) = try_mount(&format!("/dev/{disk}")) {
        say(format_args!("no system image: {what}: {error}"));
    }
}

fn try_mount(disk: &str) -> std::result::Result<(), (String, rustix::io::Errno)> {
    let until = Instant::now() + PATIENCE;
    while !Path::new(disk).exists() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    if !Path::new(disk).exists() {
        return Err((disk.to_owned(), rustix::io::Errno::NOENT));
    }
    let on = |place: String, result: Result<()>| result.map_err(|error| (place, error));
    let flags = MountFlags::empty();
    let layer = |name: &str| format!("{LAYERS}/{name}");
    for folder in [LAYERS, ROOT] {
        let _ = create_dir_all(folder);
    }
    on(
        LAYERS.to_owned(),
        mount("tmpfs", LAYERS, "tmpfs", flags, c"mode=0700"),
    )?;
    for name in ["image", "upper", "work"] {
        let _ = create_dir_all(layer(name));
    }
    let image = layer("image");
    let read_only = MountFlags::RDONLY;
    on(
        disk.to_owned(),
        mount(disk, &*image, "erofs", read_only, None),
    )?;
    let options = format!(
        "lowerdir={image},upperdir={},workdir={}",
        layer("upper"),
        layer("work")
    );
    let options = std::ffi::CString::new(options).unwrap_or_default();
    on(
        ROOT.to_owned(),
        mount("overlay", ROOT, "overlay", flags, &*options),
    )?;
    for place in BOUND {
        let target = format!("{ROOT}{place}");
        let bound = mount_bind_recursive(place, &*target);
        on(target, bound)?;
    }
    let run = format!("{ROOT}/run");
    let mounted = mount("tmpfs", &*run, "tmpfs", flags, c"mode=0755");
    on(run, mounted)
}
