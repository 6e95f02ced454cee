//! Admin commands of hosts that mean harm.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::cell::RefCell;

use driver::{Driver, Rig, config, wait_until};
use p2plab_nvme::spec::command::{Command, NSID_ALL, admin};
use p2plab_nvme::spec::log::lid;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use zerocopy::FromBytes;

const OPCODES: &[u8] = &[
    admin::GET_LOG_PAGE,
    admin::IDENTIFY,
    admin::ABORT,
    admin::SET_FEATURES,
    admin::GET_FEATURES,
    admin::ASYNC_EVENT_REQUEST,
    admin::FIRMWARE_COMMIT,
    admin::FIRMWARE_IMAGE_DOWNLOAD,
    admin::DEVICE_SELF_TEST,
    admin::SANITIZE,
];

/// A command that is likely to get past the first checks: small numbers and large ones, few in between.
fn plausible() -> impl Strategy<Value = Command> {
    let number = prop_oneof![
        8 => 0u32..0x200,
        2 => (0u32..32).prop_map(|bit| 1 << bit),
        1 => (0u32..32).prop_map(|bit| u32::MAX << bit),
        1 => any::<u32>(),
    ];
    let nsid = prop::sample::select(vec![0, 1, 2, NSID_ALL]);
    let address = prop_oneof![
        4 => (0u64..1024).prop_map(|page| (32 << 20) + page * 4096),
        1 => any::<u64>(),
    ];
    let dwords = prop::array::uniform6(number);
    (
        prop::sample::select(OPCODES),
        nsid,
        dwords,
        address.clone(),
        address,
    )
        .prop_map(|(opcode, nsid, dwords, prp1, prp2)| {
            let [cdw10, cdw11, cdw12, cdw13, cdw14, cdw15] = dwords.map(Into::into);
            Command {
                opcode,
                nsid: nsid.into(),
                prp1: prp1.into(),
                prp2: prp2.into(),
                cdw10,
                cdw11,
                cdw12,
                cdw13,
                cdw14,
                cdw15,
                ..Command::default()
            }
        })
}

fn any_command() -> impl Strategy<Value = Command> {
    let bytes = any::<[u8; 64]>();
    let random = bytes.prop_map(|bytes| Command::read_from_bytes(&bytes[..]).unwrap());
    prop_oneof![4 => plausible(), 1 => random]
}

/// The controller answers as it should after whatever has happened; a sanitize operation may still be going on.
fn works(d: &mut Driver) {
    d.enable();
    wait_until("the end of a sanitize operation", || {
        let page = d.log_page(lid::SANITIZE_STATUS, 512);
        (page[2] & 7 != 2).then_some(())
    });
    d.create_queues(1, 64, None).unwrap();
    let first = d.pages(0);
    let page = d.pages(1);
    d.read(0, 8, page).unwrap();
    d.rewind(first);
    d.disable();
}

/// Whatever admin commands a host sends, with resets in between: each is answered, and the controller works on.
#[test]
fn no_admin_command_is_the_end_of_a_controller() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("a"));
    let first = d.pages(0);
    let d = RefCell::new(d);
    let strategy = prop::collection::vec((any_command(), 0u8..12), 1..30);
    TestRunner::new(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })
    .run(&strategy, |commands| {
        let mut d = d.borrow_mut();
        d.rewind(first);
        d.enable();
        let mut unanswered = 0;
        for (command, what_next) in commands {
            d.submit(0, command);
            unanswered += 1;
            match what_next {
                0 => d.disable(),
                1 => {
                    d.flr();
                    d.restore_config_space();
                }
                _ => {
                    while d.poll(0).is_some() {
                        unanswered -= 1;
                    }
                    continue;
                }
            }
            d.enable();
            unanswered = 0;
        }
        // Asynchronous Event Requests, at most four, may go without an answer.
        wait_until("answers", || {
            while d.poll(0).is_some() {
                unanswered -= 1;
            }
            (unanswered <= 4).then_some(())
        });
        prop_assert!(!d.status().cfs());
        d.disable();
        works(&mut d);
        Ok(())
    })
    .unwrap();
}
