//! VM scenarios. Each is a plain test: it builds a topology, starts a lab, acts in the guest, reads the
//! traffic, and asserts. One file per system or example of the talk.
#![allow(clippy::unwrap_used)]

mod acs;
mod bad_input;
mod boot;
mod cleanup;
mod cmb;
mod command_line;
mod counters;
mod disks;
mod example;
mod faults;
mod faults_on_demand;
mod file_systems;
mod kernel_modules;
mod legality;
mod lifecycle;
mod lspci;
mod nvme_cmb_copy;
mod nvme_pmr_copy;
mod nvram;
mod nvram_copy;
mod own_kernel;
mod own_tree;
mod p2pmem_device;
mod p2pmem_fio;
mod p2pmem_nvram;
mod p2pmem_pmr;
mod p2pmem_removal;
mod patience;
mod pmr;
mod pmr_kernel;
mod power;
mod power_cut;
mod refusal;
mod serve;
mod shell;
mod ssd_options;
mod system_image;
mod tools_fio;
mod tools_nvme_cli;
mod tools_nvme_cli_changes;
mod two_root_ports;
