//! The init process of the guest: prepares the system, keeps a shell on the console, and serves the
//! harness over a virtio-serial port. It must not end, so nothing in here is fatal.

mod boot;
mod console;
mod port;
mod power;
mod system;

use std::sync::Arc;

use p2plab_guest::children::{Children, Reaping};
use p2plab_guest::modules;
use p2plab_guest::server::Server;

use boot::Options;

fn main() {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some(console::ARGUMENT) => console::become_shell(&arguments.next().unwrap_or_default()),
        Some(console::AWAIT_ARGUMENT) => {
            if let Err(error) = console::await_shell() {
                eprintln!("cannot wait for the shell: {error}");
                std::process::exit(1);
            }
            return;
        }
        _ => {}
    }
    if std::process::id() != 1 {
        eprintln!("p2plab-agent is the init process of a p2plab guest; it does nothing elsewhere");
        std::process::exit(2);
    }
    boot::mount_all();
    let options = Options::from_command_line();
    boot::set_environment(&options);
    boot::allow_huge_pages();
    let failed = load_modules(&options);
    // Some file systems exist only once their module is there.
    boot::mount_all();
    if let Some(disk) = &options.system {
        system::mount_image(disk);
    }
    let mut retry = boot::Retry::default();
    let children = loop {
        match Children::new(Reaping::Everything) {
            Ok(children) => break children,
            Err(error) => retry.after(format_args!("cannot start the reaper: {error}")),
        }
    };
    let console = console::Console::start(children.clone(), &options);
    if let Err(error) = power::obey_signals(children.clone(), Arc::clone(&console)) {
        boot::say(format_args!("poweroff and reboot will not work: {error}"));
    }
    let server = loop {
        let (others, shell) = (children.clone(), Arc::clone(&console));
        let shutdown = Box::new(move |power| power::end(power, &others, &shell));
        match Server::new(children.clone(), failed.clone(), shutdown) {
            Ok(server) => break server,
            Err(error) => retry.after(format_args!("cannot start the server: {error}")),
        }
    };
    loop {
        let error = port::serve(&server);
        retry.after(format_args!(
            "the port {}: {error}",
            p2plab_guest::protocol::PORT_NAME
        ));
    }
}

fn load_modules(options: &Options) -> Vec<p2plab_guest::protocol::ModuleFailure> {
    if !options.modules {
        return Vec::new();
    }
    let outcome = modules::load(&modules::listed());
    for failure in &outcome.failed {
        boot::say(format_args!(
            "module {} did not load: {}",
            failure.path, failure.error
        ));
    }
    outcome.failed
}
