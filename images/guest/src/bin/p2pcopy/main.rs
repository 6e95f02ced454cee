//! Copies between block devices (or files) through a chosen buffer: the counterpart of p2pmem-test.
//!
//! With a buffer from `p2pmem/allocate` the two devices move the bytes between themselves and a third
//! device's memory (or their own), and guest memory stays out of it.

mod arguments;
mod check;
mod copy;
mod open;
mod report;

use std::process::ExitCode;

use arguments::{Arguments, Parsed};
use p2plab_guest::Mapping;

/// What went wrong, and with which exit status to say so.
#[derive(Debug)]
enum Failure {
    /// The arguments make no sense: status 2.
    Usage(String),
    /// The system or the data: status 1.
    Io(String),
}

fn main() -> ExitCode {
    let result = match arguments::parse(std::env::args().skip(1)) {
        Ok(Parsed::Help) => {
            println!("{}", arguments::HELP);
            return ExitCode::SUCCESS;
        }
        Ok(Parsed::Copy(arguments)) => run(&arguments),
        Err(why) => Err(Failure::Usage(why)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(why)) => {
            eprintln!("p2pcopy: {why}");
            ExitCode::from(2)
        }
        Err(Failure::Io(why)) => {
            eprintln!("p2pcopy: {why}");
            ExitCode::from(1)
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let plan = copy::plan(arguments)?;
    let buffer: Mapping = open::buffer(arguments, plan.buffer_bytes)?;
    if arguments.check && !arguments.seeded {
        check::seed(&plan)?;
    }
    let seconds = copy::copy(&plan, &buffer)?;
    let mismatch = if arguments.check {
        Some(check::compare(&plan)?)
    } else {
        None
    };
    report::print(arguments, &plan, seconds, mismatch);
    match mismatch.flatten() {
        Some(at) => Err(Failure::Io(format!(
            "the copy differs from the pattern of seed {} first at byte {at} of {}",
            plan.seed, arguments.destination
        ))),
        None => Ok(()),
    }
}
