//! Modules that the lab builds for its guest: those of `guest-kernel/` that the topology names.
//!
//! One that takes the place of a module of the kernel's own (nvme, with patches) is loaded in its stead, at boot, and
//! so is part of the base image. Any other is put into the running guest before endpoints arrive: base images do not
//! depend on it, and a changed one costs no boot.

use std::path::PathBuf;

use p2plab_images::{
    ArtifactError, Artifacts, BuildTarget, Cache, Module, ModuleBuilder, ModuleSource, ModulesDir,
    Progress,
};

use super::machine::Machine;
use super::{LabError, wait};

/// What was built, by when it is loaded.
#[derive(Clone, Debug, Default)]
pub(super) struct OwnModules {
    /// Names, with parameters, of those that stand in for the kernel's own; the artifacts know where they are.
    pub at_boot: Vec<String>,
    /// Those to be put into the running guest, and what they need, in the order in which they load.
    later: Vec<Module>,
}

/// Builds the modules that a topology names, each with its parameters after it, for the lab's kernel.
pub(super) fn build(
    cache: &Cache,
    artifacts: &mut Artifacts,
    wanted: &[String],
    progress: &mut dyn Progress,
) -> Result<OwnModules, LabError> {
    let mut own = OwnModules::default();
    if wanted.is_empty() {
        return Ok(own);
    }
    let kernel = &mut artifacts.kernel;
    // A mistake in a name should not wait for a download.
    let sources = wanted.iter().map(|item| ModuleSource::find(name_of(item)));
    let sources = sources.collect::<Result<Vec<_>, _>>()?;
    let builder = ModuleBuilder::open(cache, &BuildTarget::of(kernel)?, progress)?;
    builder.require_release(&kernel.release)?;
    let stock = kernel.modules.clone().unwrap_or_else(|| ModulesDir {
        path: PathBuf::from("/nonexistent"),
        release: kernel.release.clone(),
        replaced: Default::default(),
    });
    let (mut at_boot, mut all) = (stock.clone(), stock.clone());
    let mut later = Vec::new();
    for (item, source) in wanted.iter().zip(&sources) {
        let (built, _) = builder.build(source, progress)?;
        for module in built {
            let name = module.name.replace('-', "_");
            if stock.is_built_in(&module.name) {
                return Err(built_in(&module.name, &kernel.release));
            }
            // The parameters are those of the module that the topology names.
            let is_named = name == source.name.replace('-', "_");
            let line = if is_named {
                item.clone()
            } else {
                module.name.clone()
            };
            if stock.has(&name) {
                own.at_boot.push(line);
                at_boot.replaced.insert(name.clone(), module.path.clone());
            } else {
                later.push(line);
            }
            all.replaced.insert(name, module.path);
        }
    }
    own.later = all.resolve(&later)?;
    if !own.at_boot.is_empty() {
        kernel.modules = Some(at_boot);
    }
    Ok(own)
}

impl OwnModules {
    /// Loads those that are not loaded at boot. One that is loaded already stays as it is.
    pub(super) fn load(&self, machine: &Machine) -> Result<(), LabError> {
        let mut lines = Vec::new();
        for module in &self.later {
            let path = &module.guest_path;
            machine
                .agent
                .put(&module.contents, path, 0o644, wait::BOOT)?;
            lines.push(
                format!("{path} {}", module.parameters)
                    .trim_end()
                    .to_owned(),
            );
        }
        if lines.is_empty() {
            return Ok(());
        }
        let (_, failed) = machine
            .agent
            .load_modules(&lines, wait::BOOT)
            .map_err(|error| machine.cause(error.into()))?;
        match failed.first() {
            None => Ok(()),
            Some(failure) => Err(LabError::Unexpected(format!(
                "the guest did not load {}: {}; its console says why",
                failure.path, failure.error
            ))),
        }
    }
}

/// The first word: the others are parameters.
pub(super) fn name_of(item: &str) -> &str {
    item.split_whitespace().next().unwrap_or_default()
}

fn built_in(module: &str, release: &str) -> LabError {
    LabError::BadOption(format!(
        "the kernel {release} has {module} built in, so own_modules cannot put another in its place: build that kernel \
         with {module} as a module, or leave {module} out of own_modules"
    ))
}

impl From<p2plab_images::BuildError> for LabError {
    fn from(error: p2plab_images::BuildError) -> Self {
        ArtifactError::from(error).into()
    }
}
