//! What is made of a result besides its file: a summary or event, a report, a Modelfile, a package, a model in Ollama.

use super::args::Args;
use super::nested_name;
use putri_gguf::gguf::GgufFile;
use putri_gguf::ollama::{self, Stored};
use putri_gguf::package::{self, Package};
use putri_gguf::report::{Report, page as page_of, summary};
use putri_gguf::{Job, JobError, Outcome, check_distinct, check_output, write_whole};
use std::path::{Path, PathBuf};

/// What shall be made of one result.
#[derive(Clone, Debug)]
pub struct Extras {
    report: Option<PathBuf>,
    imatrix: Option<PathBuf>,
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

    /// Refuses what is there already, or cannot be, before any work.
    fn check(&self) -> Result<(), JobError> {
        if let Some(folder) = &self.package {
            let others: Vec<&Path> = self.others.iter().map(PathBuf::as_path).collect();
            package::check(folder, &self.output, &others, self.force)?;
        }
        self.files().try_for_each(|path| check_output(path, self.force))
    }

    /// Files that are made beside the model.
    fn files(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.report, &self.modelfile].into_iter().flatten()
    }

    /// What does not come along of a model of Ollama's.
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

    /// Makes it, of a model that came from `source` if that was in Ollama's store, and says what came of the job: as an
    /// event, or as a summary that ends with `more` and the output's path. Returns what could not be made; the rest is.
    pub fn make(&self, job: &Job, outcome: &Outcome, source: Option<&Stored>, more: &str) -> Vec<String> {
        let outcome = &Outcome {
            warnings: outcome.warnings.iter().cloned().chain(self.notes(outcome, source)).collect(),
            ..outcome.clone()
        };
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

/// The model's path in a Modelfile beside it.
fn from(outcome: &Outcome) -> String {
    format!("./{}", outcome.output.file_name().unwrap_or_default().to_string_lossy())
}

/// Refuses what cannot be made of the results of `job`, and paths that two of its outputs share, before any work.
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

/// The report's data, for which the output is hashed.
fn document(job: &Job, outcome: &Outcome) -> Result<Report, JobError> {
    let written = GgufFile::open(&outcome.output)?;
    Ok(Report::new(job, outcome, &written.sha256()))
}
