//! The end of a controller that works in the background. Alone in its process: it counts threads.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::os::unix::fs::FileExt;

use driver::{Rig, config, wait_until};
use p2plab_nvme::spec::command::{NSID_ALL, admin};

fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.ok()?.path().join("comm")).ok()
    };
    let names = tasks.filter_map(name);
    names.filter(|name| name.starts_with("nvme-")).collect()
}

/// Operations that are held, and ones that run, over resets: an unplugged controller leaves no thread.
#[test]
fn operations_end_with_the_controller() {
    for (hold, code) in [(true, 1u32), (true, 2), (false, 1), (false, 2)] {
        let mut rig = Rig::new();
        let mut d = rig.plug(config("a"));
        let file = d.controller.namespace_file(1).unwrap();
        file.write_all_at(&vec![7; 32 << 20], 0).unwrap();
        d.controller.hold_background(hold);
        d.enable();
        d.simple_admin(admin::DEVICE_SELF_TEST, NSID_ALL, [code, 0, 0])
            .unwrap();
        d.flr();
        d.restore_config_space();
        d.enable();
        d.simple_admin(admin::SANITIZE, 0, [3, 0xff, 0]).unwrap();
        if hold {
            // A thread gives itself its name.
            wait_until("the operation's thread", || {
                threads().contains(&"nvme-sanitize\n".into()).then_some(())
            });
        }
        d.flr();
        rig.fabric.unplug("nvme0").unwrap();
        // All were joined; the last traces of one in /proc may outlive that by a moment.
        wait_until("the end of all threads", || {
            threads().is_empty().then_some(())
        });
    }
}
