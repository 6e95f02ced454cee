//! ACS redirection at a root port, where Linux asks about it: between the functions of one device below it.
//!
//! Of two peers, Linux asks every bridge up to the lowest that both are below, that one included. Below a switch these are
//! the switch's ports, and no switch of QEMU's has ACS; its root ports have it, and one is the lowest bridge where nothing
//! else is between: for two functions of a device. A lab's topology has no such devices, so here two endpoints of a fabric
//! of their own are plugged into a lab's root port. What the kernel decides is real, and so are the bytes; what of them
//! crosses which port is not looked at.

use p2plab::agent::Output;
use p2plab::lab::Devices;
use p2plab::topology::{CmbOptions, GIB, MIB, Nvme, Topology, TopologyBuilder};
use p2plab::wait::{self, Deadline};
use p2plab_guest::protocol::Exit;
use p2plab_pcie::TlpKind;
use p2plab_tests::TestLab;
use p2plab_tests::p2pmem::{self, LOAD_IMPORTER, LOAD_P2PMEM};

/// Bytes of each copy.
const SIZE: u64 = 2 * MIB;
/// The only root port of these labs.
const ROOT_PORT: &str = "0000:00:08.0";
/// ACS Control (PCI Express Base 6.0, section 7.7.11.3): P2P Request Redirect and P2P Completion Redirect.
const REDIRECT: u64 = 0xc;

/// A lab with an empty root port.
fn machine(name: &str) -> TopologyBuilder {
    Topology::builder(name).root_port("rp0")
}

/// A lab, and the two SSDs that are functions 0 and 1 in its root port.
struct TwoFunctions {
    lab: TestLab,
    /// After the lab: QEMU does not survive that they go.
    devices: Devices,
}

impl TwoFunctions {
    fn plug(lab: TestLab) -> Self {
        let ssd = || Nvme::memory(GIB / 4).cmb_with(CmbOptions::new(64 * MIB).data_only());
        let functions = Topology::builder("functions")
            .root_port("rp0")
            .switch("sw0", "rp0", 2)
            .nvme("ssd0", "sw0.0", ssd())
            .nvme("ssd1", "sw0.1", ssd())
            .build()
            .unwrap();
        let devices = Devices::start(&functions, None).unwrap();
        let slot = lab.devices().shape().slot("rp0").unwrap();
        // Function 0 is the last: with it, the guest looks for all.
        for function in [1, 0] {
            let mut argument = devices.device_argument(&format!("ssd{function}")).unwrap();
            argument["bus"] = slot.bus.as_str().into();
            argument["addr"] = format!("0.{function}").into();
            argument["multifunction"] = true.into();
            let deadline = Deadline::new("QEMU to add a function", wait::HOTPLUG);
            let qmp = &lab.qemu().unwrap().qmp;
            qmp.device_add(argument, &deadline).unwrap();
        }
        for function in [0, 1] {
            let line = format!("[ -b /dev/$(basename {}) ]", disk_in_sysfs(function));
            let guest = lab.guest().unwrap();
            guest
                .wait_until("the nvme driver", &line, wait::HOTPLUG)
                .unwrap();
        }
        Self { lab, devices }
    }

    fn sh(&self, line: &str) -> String {
        let text = self.lab.guest().unwrap().sh(line).unwrap();
        text.trim().to_owned()
    }

    /// PCI address of a function.
    fn address(&self, function: u8) -> String {
        self.sh(&format!("basename {}", folder(function)))
    }

    fn redirects(&self) -> bool {
        let control = self.sh(&format!("setpci -s {ROOT_PORT} ECAP_ACS+6.w"));
        let set = u64::from_str_radix(&control, 16).unwrap() & REDIRECT;
        assert!(set == 0 || set == REDIRECT, "{control}");
        set != 0
    }

    /// Copies from function 0 through its CMB to function 1.
    fn copy(&self) -> Output {
        let disk = |function| self.sh(&format!("basename {}", disk_in_sysfs(function)));
        let buffer = self.sh(&format!("echo {}/p2pmem/allocate", folder(0)));
        let line = format!(
            "p2pcopy --check --size {SIZE} --depth 2 --buffer {buffer} /dev/{} /dev/{}",
            disk(0),
            disk(1)
        );
        self.lab.guest().unwrap().try_sh(&line).unwrap()
    }

    /// Function 1 is not let to function 0's memory, and the kernel says why, and what would help.
    fn assert_refused(&self) {
        let before = self.devices.traffic();
        let output = self.copy();
        assert_eq!(output.status, Exit::Status(1), "{output:?}");
        let refusal = "writing at byte 0 failed: Invalid argument";
        assert!(output.error_text().contains(refusal), "{output:?}");
        let traffic = self.devices.traffic().since(&before);
        assert_eq!(traffic.between("ssd1", "ssd0", TlpKind::MRd).tlps, 0);
        assert_eq!(traffic.between("ssd1", "ssd0", TlpKind::MWr).tlps, 0);
        let (provider, client) = (self.address(0), self.address(1));
        let said = self.sh(&format!(
            "dmesg | grep -o 'nvme {client}: .*\\(ACS\\|cannot\\).*'"
        ));
        let expected = [
            format!("ACS redirect is set between the client and provider ({provider})"),
            format!(
                "to disable ACS redirect for this path, add the kernel parameter: pci=disable_acs_redir={ROOT_PORT}"
            ),
            format!(
                "cannot be used for peer-to-peer DMA as the client and provider ({provider}) do not share an upstream \
                 bridge or whitelisted host bridge"
            ),
        ]
        .map(|sentence| format!("nvme {client}: {sentence}"));
        let said: Vec<&str> = said.lines().collect();
        assert_eq!(said, expected);
    }

    /// Function 1 takes what is copied from function 0's memory.
    fn assert_allowed(&self) {
        let before = self.devices.traffic();
        let output = self.copy();
        assert!(output.status.success(), "{output:?}");
        assert!(output.text().contains("verified"), "{output:?}");
        let traffic = self.devices.traffic().since(&before);
        let taken = traffic.between("ssd0", "ssd1", TlpKind::CplD);
        assert_eq!(taken.payload_bytes, SIZE);
    }

    fn finish(self) {
        let Self { lab, devices } = self;
        lab.finish();
        drop(devices);
    }
}

/// Folder of a function of the root port's device, for the guest's shell.
fn folder(function: u8) -> String {
    format!("/sys/bus/pci/devices/{ROOT_PORT}/0000:*:00.{function}")
}

fn disk_in_sysfs(function: u8) -> String {
    format!("{}/nvme/nvme*/nvme*n1", folder(function))
}

/// With redirection at the root port, Linux refuses what it allows without: by the nvme driver's own mapping, and for
/// those who ask /dev/p2pmemN.
#[test]
fn redirection_at_the_root_port_that_joins_two_functions_is_refused() {
    let name = "redirection_at_the_root_port_that_joins";
    let lab = p2pmem::start(name, machine("acs-functions"), &[]);
    // The kernel decides when it is first asked, and remembers; p2pmem asks when a device comes.
    let unload = "rmmod dmabuf_importer p2pmem";
    lab.guest().unwrap().sh(unload).unwrap();
    let functions = TwoFunctions::plug(lab);
    let set = |value: u64| {
        functions.sh(&format!(
            "setpci -s {ROOT_PORT} ECAP_ACS+6.w={value:x}:{REDIRECT:x}"
        ));
        functions.redirects()
    };
    let client = functions.address(1);
    let memory = format!("/dev/p2pmem/by-address/{}-bar4", functions.address(0));
    let distance = || functions.sh(&format!("p2pmemtest distance {memory} {client}"));
    let import = || {
        let line = format!("p2pmemtest import {memory} {client}");
        functions.lab.guest().unwrap().try_sh(&line).unwrap()
    };
    assert!(set(REDIRECT));
    functions.assert_refused();
    functions.sh(&format!("{LOAD_P2PMEM} && {LOAD_IMPORTER}"));
    assert_eq!(distance(), "-1");
    let refused = import();
    assert!(refused.error_text().contains("os error 95"), "{refused:?}");

    assert!(!set(0));
    // Up one bridge, and down again. Whoever asks for the distance has the kernel decide anew.
    assert_eq!(distance(), "2");
    assert!(import().status.success());
    functions.assert_allowed();
    functions.finish();
}

/// With an IOMMU, Linux itself has root ports redirect, and then refuses; `pci=disable_acs_redir`, which its refusal
/// names, is what makes it allow the same.
#[test]
fn the_kernel_parameter_that_a_refusal_names_lifts_it() {
    let cure = format!("pci=disable_acs_redir={ROOT_PORT}");
    for parameter in [None, Some(cure)] {
        let mut topology = machine("acs-iommu").iommu();
        if let Some(parameter) = &parameter {
            topology = topology.kernel_argument(parameter);
        }
        let name = "the_kernel_parameter_that_a_refusal_names";
        let functions = TwoFunctions::plug(TestLab::start(name, topology.build().unwrap()));
        assert_eq!(functions.redirects(), parameter.is_none());
        if parameter.is_none() {
            functions.assert_refused();
        } else {
            functions.assert_allowed();
        }
        functions.finish();
    }
}
