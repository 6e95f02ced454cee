//! Cases, what they expect, and how they are told.

use std::error::Error;
use std::fmt::Debug;
use std::io;

/// What a case ends with.
pub type Outcome = Result<(), Box<dyn Error>>;

/// Cases that have been gone through.
#[derive(Debug, Default)]
pub struct Cases {
    passed: usize,
    failed: usize,
}

impl Cases {
    /// Goes through one case and says how it ended.
    pub fn case(&mut self, name: &str, work: impl FnOnce() -> Outcome) {
        match work() {
            Ok(()) => {
                self.passed += 1;
                println!("ok {name}");
            }
            Err(why) => {
                self.failed += 1;
                println!("FAILED {name}: {why}");
            }
        }
    }

    /// The sum of it.
    pub fn end(self) -> Result<(), String> {
        println!("{} passed, {} failed", self.passed, self.failed);
        if self.failed == 0 {
            Ok(())
        } else {
            Err(format!("{} of the cases failed", self.failed))
        }
    }
}

/// Whether two values are the same.
pub fn equal<T: PartialEq + Debug>(value: T, expected: T) -> Outcome {
    if value == expected {
        Ok(())
    } else {
        Err(format!("got {value:?}, expected {expected:?}").into())
    }
}

/// Whether something was refused, with that error.
pub fn refused<T: Debug>(result: io::Result<T>, errno: i32) -> Outcome {
    let expected = io::Error::from_raw_os_error(errno);
    match result {
        Err(error) if error.raw_os_error() == Some(errno) => Ok(()),
        Err(error) => Err(format!("got {error}, expected {expected}").into()),
        Ok(value) => Err(format!("got {value:?}, expected {expected}").into()),
    }
}
