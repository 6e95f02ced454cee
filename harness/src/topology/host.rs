//! What a topology needs of the host it is started on.

use std::fs::Metadata;
use std::path::Path;

use super::device::{Backing, DeviceOptions};
use super::error::{TopologyError, TopologyFault};
use super::{EndpointOptions, Topology, sizes};

impl Topology {
    /// Checks what depends on the host: that kernel, modules, QEMU and backing files exist and are large
    /// enough. Nothing is created or changed.
    ///
    /// # Errors
    /// The first that is missing.
    pub fn check_host(&self) -> Result<(), TopologyError> {
        let guest = &self.guest;
        let files = [("kernel", &guest.kernel), ("qemu", &guest.qemu)];
        for (field, path) in files
            .into_iter()
            .filter_map(|(field, path)| Some((field, path.as_ref()?)))
        {
            let found = look(
                field,
                "the guest",
                path,
                "give the path of an existing file",
            )?;
            if !found.is_file() {
                let mend = "name the file itself";
                return Err(refuse((field, "the guest", path, "is not a file", mend)));
            }
        }
        if let Some(path) = &guest.modules {
            let mend = "give the folder `/lib/modules/VERSION` that belongs to the kernel";
            if !look("modules", "the guest", path, mend)?.is_dir() {
                return Err(refuse((
                    "modules",
                    "the guest",
                    path,
                    "is not a folder",
                    mend,
                )));
            }
        }
        self.endpoints.iter().try_for_each(check_endpoint)
    }
}

fn check_endpoint(endpoint: &EndpointOptions) -> Result<(), TopologyError> {
    let owner = format!("endpoint `{}`", endpoint.name);
    let options = match &endpoint.device {
        DeviceOptions::Nvme(options) => options,
        DeviceOptions::Nvram(card) => {
            return check_backing("file", &owner, &card.backing, card.size);
        }
    };
    for namespace in &options.namespaces {
        check_backing("file", &owner, &namespace.backing, namespace.size)?;
    }
    match &options.pmr {
        Some(pmr) => check_backing("pmr", &owner, &pmr.backing, pmr.size),
        None => Ok(()),
    }
}

fn check_backing(
    field: &'static str,
    owner: &str,
    backing: &Backing,
    bytes: u64,
) -> Result<(), TopologyError> {
    let Backing::File { path, create } = backing else {
        return Ok(());
    };
    if *create && !path.exists() {
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
            let mend = "make the folder first";
            return Err(refuse((field, owner, folder, "is not a folder", mend)));
        }
        return Ok(());
    }
    let size = sizes::format(bytes);
    let mend = format!(
        "make it with `truncate -s {} {}`, or set `create = true`",
        bytes,
        path.display()
    );
    let found = look(field, owner, path, &mend)?;
    if found.is_file() && found.len() < bytes {
        let problem = format!("has {}, {size} are needed", sizes::format(found.len()));
        let mend = format!(
            "enlarge it with `truncate -s {} {}`, or make `size` smaller",
            bytes,
            path.display()
        );
        return Err(refuse((field, owner, path, &problem, &mend)));
    }
    if found.is_dir() {
        return Err(refuse((
            field,
            owner,
            path,
            "is a folder",
            "name a file in it",
        )));
    }
    Ok(())
}

fn look(
    field: &'static str,
    owner: &str,
    path: &Path,
    mend: &str,
) -> Result<Metadata, TopologyError> {
    path.metadata().map_err(|error| {
        let problem = match error.kind() {
            std::io::ErrorKind::NotFound => "does not exist".to_owned(),
            _ => error.to_string(),
        };
        refuse((field, owner, path, &problem, mend))
    })
}

/// (field, owner, path, problem, mend)
fn refuse(
    (field, owner, path, problem, mend): (&'static str, &str, &Path, &str, &str),
) -> TopologyError {
    let fault = TopologyFault::HostPath {
        field,
        owner: owner.to_owned(),
        path: path.to_owned(),
        problem: problem.to_owned(),
        mend: mend.to_owned(),
    };
    TopologyError {
        place: None,
        fault: fault.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{GIB, Nvme};
    use super::*;

    fn with(options: Nvme) -> Topology {
        let builder = Topology::builder("t").root_port("rp0");
        builder.nvme("ssd0", "rp0", options).build().unwrap()
    }

    #[test]
    fn a_missing_backing_file_is_named_with_the_command_that_makes_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("disk");
        let error = with(Nvme::file(&file, GIB))
            .check_host()
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("endpoint `ssd0`") && error.contains("truncate -s 1073741824"),
            "{error}"
        );
        with(Nvme::file(&file, GIB).create()).check_host().unwrap();
        assert!(!file.exists());
    }

    #[test]
    fn a_backing_file_that_is_too_small_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("disk");
        std::fs::write(&file, [0; 4096]).unwrap();
        let error = with(Nvme::file(&file, GIB))
            .check_host()
            .unwrap_err()
            .to_string();
        assert!(error.contains("has 4KiB, 1GiB are needed"), "{error}");
        std::fs::File::create(&file).unwrap().set_len(GIB).unwrap();
        with(Nvme::file(&file, GIB)).check_host().unwrap();
        let error = with(Nvme::file(folder.path(), GIB))
            .check_host()
            .unwrap_err()
            .to_string();
        assert!(error.contains("is a folder"), "{error}");
    }

    #[test]
    fn a_kernel_that_is_not_there_is_refused() {
        let topology = Topology::builder("t")
            .root_port("rp0")
            .kernel("no/bzImage", "no/modules");
        let error = topology
            .build()
            .unwrap()
            .check_host()
            .unwrap_err()
            .to_string();
        assert!(error.contains("no/bzImage: does not exist"), "{error}");
    }
}
