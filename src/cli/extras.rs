//! Additional outputs of a result: a summary or event, a report, a Modelfile, a package, a model in Ollama.

use super::args::{Args, RecoverArgs};
use super::nested_name;
use putri_gguf::gguf::GgufFile;
use putri_gguf::ollama::{self, Stored};
use putri_gguf::package::{self, Package};
use putri_gguf::report::{Report, page as page_of, summary};
use putri_gguf::{Job, JobError, Outcome, check_distinct, check_output, write_whole};
use std::path::{Path, PathBuf};

/// Additional outputs of one result.
#[derive(Clone, Debug)]
pub struct Extras {
    report: Option<PathBuf>,
    imatrix: Option<PathBuf>,
    modelfile: Option<PathBuf>,
    package: Option<PathBuf>,
    /// Paths that the package must not contain or replace: the model that it is made of, and all other inputs
    /// and outputs.
    output: PathBuf,
    others: Vec<PathBuf>,
    json: bool,
    force: bool,
}

impl Extras {
    /// Outputs that `args` ask for; for one of several results, with the share `nested` in their names.
    pub fn new(args: &Args, nested: Option<f64>) -> Extras {
        let named = |path: &PathBuf| nested.map_or(path.clone(), |share| nested_name(path, share));
        Extras {
            report: args.report.as_ref().map(named),
            imatrix: args.imatrix_out.as_ref().map(named),
            modelfile: args.modelfile.then(|| named(&args.output).with_extension("Modelfile")),
            package: args.package.as_ref().map(named),
            output: named(&args.output),
            others: [
                Some(&args.input),
                args.imatrix_out.as_ref(),
                args.report.as_ref(),
                args.state_dir.as_ref(),
            ]
            .into_iter()
            .flatten()
            .chain(&args.file)
            .cloned()
            .collect(),
            json: args.json,
            force: args.force,
        }
    }

    /// Outputs of a recovery.
    pub fn of_recovery(args: &RecoverArgs) -> Extras {
        Extras {
            report: args.report.clone(),
            imatrix: None,
            modelfile: None,
            package: None,
            output: args.output.clone(),
            others: Vec::new(),
            json: args.json,
            force: args.force,
        }
    }

    /// Rejects outputs that exist already or cannot be created, before any work.
    fn check(&self) -> Result<(), JobError> {
        if let Some(folder) = &self.package {
            let others: Vec<&Path> = self.others.iter().map(PathBuf::as_path).collect();
            package::check(folder, &self.output, &others, self.force)?;
        }
        self.files().try_for_each(|path| check_output(path, self.force))
    }

    /// Files beside the model.
    fn files(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.report, &self.modelfile].into_iter().flatten()
    }

    /// Notes on the parts of a model of Ollama that are not carried over.
    fn notes(&self, outcome: &Outcome, source: Option<&Stored>) -> Vec<String> {
        let mut notes = source.map(|s| s.notes.clone()).unwrap_or_default();
        if self.modelfile.is_some() || self.package.is_some() {
            let left_out = ollama::cannot_hold(&from(outcome), source);
            notes.extend(
                left_out
                    .iter()
                    .map(|what| format!("the Modelfile leaves out {what}: its syntax cannot hold it")),
            );
        }
        notes
    }

    /// Creates the outputs and reports the result of the job, as an event, or as a summary that ends with
    /// `more` and the output's path.
    /// `source` is the source's entry in Ollama's store, if it is in one. Returns the errors of outputs that
    /// failed; the others are complete.
    pub fn make(&self, job: &Job, outcome: &Outcome, source: Option<&Stored>, more: &str) -> Vec<String> {
        let mut outcome = outcome.clone();
        outcome.warnings.extend(self.notes(&outcome, source));
        let outcome = &outcome;
        let mut missing = Vec::new();
        let mut tried = |what: &str, done: Result<(), JobError>| {
            if let Err(e) = done {
                let model = outcome.output.display();
                missing.push(format!("{model} is written, but not {what}: {}", super::said(&e)));
            }
        };
        let modelfile = ollama::modelfile(&from(outcome), source);
        if let Some(path) = &self.modelfile {
            tried("its Modelfile", write_whole(path, modelfile.as_bytes(), self.force));
        }
        let mut found: Option<Report> = None;
        if self.report.is_some() || self.package.is_some() || self.json {
            tried("its report", document(job, outcome).map(|made| found = Some(made)));
        }
        if let Some(report) = &found {
            if let Some(path) = &self.report {
                let page = path.extension().is_some_and(|e| e == "html");
                let text = if page { page_of(report) } else { report.to_json() };
                tried("its report", write_whole(path, text.as_bytes(), self.force));
            }
            if let Some(folder) = &self.package {
                let licenses = source.map_or(&[][..], |s| &s.licenses);
                let package = Package { model: &outcome.output, modelfile: &modelfile, report, licenses };
                tried("its package", package.write(folder, self.force));
            }
        }
        let said = if self.json {
            format!("{}\n", serde_json::json!({ "event": "done", "report": found }))
        } else {
            format!("{}{more}{}\n", summary(outcome), outcome.output.display())
        };
        let io = |source| JobError::Io { path: "standard output".into(), source };
        tried("this summary", super::print(&said).map_err(io));
        missing
    }
}

/// Path of the model in a Modelfile beside it.
fn from(outcome: &Outcome) -> String {
    format!("./{}", outcome.output.file_name().unwrap_or_default().to_string_lossy())
}

/// Rejects outputs that cannot be made of the results of `job`, and paths that two of its outputs share,
/// before any work.
pub fn check_all(extras: &[Extras], job: &Job) -> Result<(), JobError> {
    let mut outputs: Vec<PathBuf> = Vec::new();
    for e in extras {
        outputs.push(e.output.clone());
        outputs.extend(e.imatrix.iter().chain(e.files()).chain(&e.package).cloned());
    }
    outputs.extend(job.state.as_ref().map(|keep| keep.folder.clone()));
    check_distinct(&outputs, std::slice::from_ref(&job.input), &job.recipe.files)?;
    extras.iter().try_for_each(Extras::check)
}

/// Collects the report; it hashes the output.
fn document(job: &Job, outcome: &Outcome) -> Result<Report, JobError> {
    let written = GgufFile::open(&outcome.output)?;
    Ok(Report::new(job, outcome, &written.sha256()))
}
