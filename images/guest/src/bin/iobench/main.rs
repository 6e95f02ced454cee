//! Measures a block device with O_DIRECT and Linux AIO: operations a second at a block size and depth.
//!
//! Small on purpose: under emulation the guest's CPU is what limits, and a large tool would measure itself.

mod arguments;
mod measure;

use std::process::ExitCode;

use arguments::Parsed;

fn main() -> ExitCode {
    let arguments = match arguments::parse(std::env::args().skip(1)) {
        Ok(Parsed::Help) => {
            println!("{}", arguments::HELP);
            return ExitCode::SUCCESS;
        }
        Ok(Parsed::Measure(arguments)) => arguments,
        Err(why) => {
            eprintln!("iobench: {why}");
            return ExitCode::from(2);
        }
    };
    match measure::measure(&arguments) {
        Ok(result) => {
            println!("{}", result.text(arguments.json));
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("iobench: {why}");
            ExitCode::from(1)
        }
    }
}
