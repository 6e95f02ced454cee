//! Guests boot, restore, reboot and end as they should.

use p2plab_tests::{TestLab, two_ssds};

/// A lab starts from its base image and its agent answers.
#[test]
fn warm_start_reaches_the_agent() {
    let lab = TestLab::start("warm_start_reaches_the_agent", two_ssds("warm"));
    let guest = lab.guest().unwrap();
    assert!(guest.sh("uname -r").unwrap().starts_with("7."));
    lab.finish();
}
