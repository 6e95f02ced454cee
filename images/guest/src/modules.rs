//! Loading kernel modules with finit_module(2).

use std::ffi::CString;
use std::fs::File;
use std::path::Path;

use crate::protocol::ModuleFailure;

/// Lists the modules to load at boot, in dependency order: one path a line, and its parameters after it
/// (`/lib/modules/.../nvme.ko use_cmb_sqes=1`); `#` begins a comment.
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

/// The lines of [`LIST`]; none if there is no such file.
pub fn listed() -> Vec<String> {
    lines_of(&std::fs::read_to_string(LIST).unwrap_or_default())
}

fn lines_of(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim);
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

/// Loads modules, given as lines of [`LIST`], in that order. One that is loaded already counts as loaded.
pub fn load(lines: &[String]) -> Outcome {
    let mut outcome = Outcome::default();
    for line in lines {
        let (path, parameters) = split(line);
        match load_one(Path::new(path), parameters) {
            Ok(()) => outcome.loaded = outcome.loaded.saturating_add(1),
            Err(error) => {
                outcome.failed.push(ModuleFailure {
                    path: path.to_owned(),
                    error: error.to_string(),
                });
            }
        }
    }
    outcome
}

/// The path and the parameters of one line. Parameters stay one string: the kernel splits them itself, and
/// minds the quotes in them.
fn split(line: &str) -> (&str, &str) {
    let (path, parameters) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    (path, parameters.trim())
}

fn load_one(path: &Path, parameters: &str) -> std::io::Result<()> {
    let parameters = CString::new(parameters)?;
    let file = File::open(path)?;
    let plain = path.extension().is_some_and(|extension| extension == "ko");
    let flags = if plain { 0 } else { COMPRESSED };
    match rustix::system::finit_module(&file, &parameters, flags) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_path_and_its_parameters() {
        let list = "# drivers\n/m/nvme-core.ko\n\n /m/nvme.ko  use_cmb_sqes=1 \tpoll_queues=2 \n";
        let lines = lines_of(list);
        let split: Vec<_> = lines.iter().map(|line| split(line)).collect();
        assert_eq!(
            split,
            [
                ("/m/nvme-core.ko", ""),
                ("/m/nvme.ko", "use_cmb_sqes=1 \tpoll_queues=2")
            ]
        );
    }

    #[test]
    fn a_failure_names_the_path_alone() {
        let outcome = load(&["/no/such/module.ko a=1".to_owned()]);
        assert_eq!(outcome.loaded, 0);
        assert_eq!(outcome.failed[0].path, "/no/such/module.ko");
        assert!(outcome.failed[0].error.contains("No such file"));
        let outcome = load(&["/proc/self/exe a=\0".to_owned()]);
        assert_eq!(outcome.failed.len(), 1);
    }
}
