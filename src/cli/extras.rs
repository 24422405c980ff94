//! What is made of a result besides its file: a summary or event, a report, a Modelfile, a package, a model in Ollama.

use super::args::Args;
use super::nested_name;
use putri_gguf::gguf::GgufFile;
use putri_gguf::ollama::{self, Stored};
use putri_gguf::package::{self, Package};
use putri_gguf::report::{event, page as page_of, report, summary};
use putri_gguf::{Job, JobError, Outcome};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// What shall be made of one result.
#[derive(Clone, Debug)]
pub struct Extras {
    report: Option<PathBuf>,
    modelfile: Option<PathBuf>,
    package: Option<PathBuf>,
    /// What the package is not to hold or replace: the model that it is made of, and all else that is read or written.
    output: PathBuf,
    others: Vec<PathBuf>,
    json: bool,
    force: bool,
}

impl Extras {
    /// What `args` ask for; of several results, with the share `nested` in its names.
    pub fn new(args: &Args, nested: Option<f64>) -> Extras {
        let named = |path: &PathBuf| nested.map_or(path.clone(), |share| nested_name(path, share));
        Extras {
            report: args.report.as_ref().map(named),
            modelfile: args.modelfile.then(|| named(&args.output).with_extension("Modelfile")),
            package: args.package.as_ref().map(named),
            output: named(&args.output),
            others: [Some(&args.input), args.imatrix_out.as_ref(), args.report.as_ref()]
                .into_iter()
                .flatten()
                .chain(&args.file)
                .cloned()
                .collect(),
            json: args.json,
            force: args.force,
        }
    }

    /// Refuses what is there already, or cannot be, before any work.
    pub fn check(&self) -> Result<(), JobError> {
        if let Some(folder) = &self.package {
            let others: Vec<&Path> = self.others.iter().map(PathBuf::as_path).collect();
            package::check(folder, &self.output, &others, self.force)?;
        }
        [&self.report, &self.modelfile].into_iter().flatten().try_for_each(|path| self.check_file(path))
    }

    fn check_file(&self, path: &Path) -> Result<(), JobError> {
        if !self.force && path.symlink_metadata().is_ok() {
            return Err(JobError::Exists(path.into()));
        }
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        tempfile::tempfile_in(folder).map_err(|source| JobError::Io { path: path.into(), source })?;
        Ok(())
    }

    /// Makes it, of a model that came from `source` if that was in Ollama's store, and says what came of the job: as an
    /// event, or as a summary that ends with `more` and the output's path.
    pub fn make(
        &self,
        job: &Job,
        outcome: &Outcome,
        source: Option<&Stored>,
        more: &str,
    ) -> Result<(), JobError> {
        let name = outcome.output.file_name().unwrap_or_default().to_string_lossy();
        let modelfile = ollama::modelfile(&format!("./{name}"), source);
        if let Some(path) = &self.modelfile {
            write(path, &modelfile)?;
        }
        if self.report.is_some() || self.package.is_some() || self.json {
            let found = document(job, outcome)?;
            if let Some(path) = &self.report {
                let page = path.extension().is_some_and(|e| e == "html");
                write(path, &if page { page_of(&found) } else { format!("{found:#}\n") })?;
            }
            if let Some(folder) = &self.package {
                let licenses = source.map_or(&[][..], |s| &s.licenses);
                Package { model: &outcome.output, modelfile: &modelfile, report: &found, licenses }
                    .write(folder, self.force)?;
            }
            if self.json {
                event(&serde_json::json!({ "event": "done", "report": found }));
                return Ok(());
            }
        }
        super::show(&format!("{}{more}{}\n", summary(outcome), outcome.output.display()));
        Ok(())
    }
}

fn write(path: &Path, text: &str) -> Result<(), JobError> {
    std::fs::write(path, text).map_err(|source| JobError::Io { path: path.into(), source })
}

/// The report's data, for which the output is hashed.
fn document(job: &Job, outcome: &Outcome) -> Result<Value, JobError> {
    let written = GgufFile::open(&outcome.output)?;
    Ok(report(job, outcome, &written.sha256()))
}
