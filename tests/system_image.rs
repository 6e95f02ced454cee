//! The system image: there after each way to start a guest, and only where a topology asks for it.

use p2plab_tests::tools::with_tools;
use p2plab_tests::{TestLab, two_ssds};

/// The tools run after a warm start and after a reboot, see what the guest has, and may write; what they write goes
/// with a reboot.
#[test]
fn a_guest_has_the_system_image() {
    let name = "a_guest_has_the_system_image";
    let lab = TestLab::start(name, with_tools("system", []));
    let guest = lab.guest().unwrap();
    guest
        .system("echo kept > /etc/note; echo seen > /tmp/note")
        .unwrap();
    assert_eq!(
        guest.sh("cat /system/etc/note /tmp/note").unwrap(),
        "kept\nseen\n"
    );

    lab.reboot().unwrap();
    let guest = lab.guest().unwrap();
    guest.system("! [ -e /etc/note ]").unwrap();
    let versions = "nvme version && fio --version && lspci --version && mkfs.ext4 -V && mkfs.xfs -V && lsblk -V";
    let said = guest.system(versions).unwrap();
    assert!(said.starts_with("nvme version"), "{said}");
    let line = "[ -c /dev/null ] && [ -d /proc/1 ] && [ -d /sys/bus/pci ] && df / | grep overlay";
    guest.system(line).unwrap();
    let failed = guest.try_system("exit 7").unwrap();
    assert_eq!(failed.status, p2plab_guest::protocol::Exit::Status(7));
    lab.finish();
}

/// Where the topology does not ask for it, there is none, and a sentence says how to get it.
#[test]
fn a_guest_without_the_system_image_says_so() {
    let name = "a_guest_without_the_system_image_says_so";
    let lab = TestLab::start(name, two_ssds("plain"));
    let error = lab.guest().unwrap().system("nvme list").unwrap_err();
    assert!(error.to_string().contains("`.system()`"), "{error}");
    assert!(error.is_bad_input());
    lab.guest().unwrap().sh("! [ -e /dev/vda ]").unwrap();
    lab.finish();
}
