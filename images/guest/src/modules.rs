//! Loading kernel modules with finit_module(2).

use std::fs::File;
use std::path::Path;

use crate::protocol::ModuleFailure;

/// Lists the modules to load at boot: one path a line, in dependency order; `#` begins a comment.
pub const LIST: &str = "/etc/p2plab/modules";

/// MODULE_INIT_COMPRESSED_FILE of linux/module.h: the kernel decompresses (CONFIG_MODULE_DECOMPRESS).
const COMPRESSED: i32 = 4;

/// What became of a list of modules.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// How many are in the kernel now.
    pub loaded: u32,
    /// The others.
    pub failed: Vec<ModuleFailure>,
}

/// The paths in [`LIST`]; none if there is no such file.
pub fn listed() -> Vec<String> {
    let text = std::fs::read_to_string(LIST).unwrap_or_default();
    let lines = text.lines().map(str::trim);
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

/// Loads modules in the given order. One that is loaded already counts as loaded.
pub fn load(paths: &[String]) -> Outcome {
    let mut outcome = Outcome::default();
    for path in paths {
        match load_one(Path::new(path)) {
            Ok(()) => outcome.loaded = outcome.loaded.saturating_add(1),
            Err(error) => {
                outcome.failed.push(ModuleFailure {
                    path: path.clone(),
                    error: error.to_string(),
                });
            }
        }
    }
    outcome
}

fn load_one(path: &Path) -> std::io::Result<()> {
    let file = File::open(path)?;
    let plain = path.extension().is_some_and(|extension| extension == "ko");
    match rustix::system::finit_module(&file, c"", if plain { 0 } else { COMPRESSED }) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
