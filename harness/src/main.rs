//! The command line.
#![allow(missing_docs)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
