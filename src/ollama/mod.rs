//! Models of a local Ollama: search in its store, Modelfiles, and models made by `ollama create`.
//!
//! Only [`can_create`] and [`create`] run a program or need a server; all other functions read files.

mod modelfile;
mod store;

pub use modelfile::{cannot_hold, modelfile};
pub use store::{find, store};

use crate::spill::without_path;
use serde_json::Value as Json;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Error of a model in a store, or of making a model in Ollama.
#[derive(Debug, thiserror::Error)]
pub enum OllamaError {
    /// No store was found.
    #[error("no Ollama store found; set OLLAMA_MODELS to the folder that has manifests and blobs in it")]
    NoStore,
    /// The name is not one that Ollama accepts.
    #[error("{0:?} is not the name of an Ollama model, such as llama3.2:1b or user/model:tag")]
    Name(String),
    /// The store does not have the model.
    #[error("{name} is not in {}: `ollama pull {name}` fetches it, `ollama list` says what is there", store.display())]
    Missing {
        /// The name as given.
        name: String,
        /// The store that was searched.
        store: PathBuf,
    },
    /// Several models of the store match the name.
    #[error("{name} is in {} from several places; name one of them: {}", store.display(), places.join(", "))]
    Ambiguous {
        /// The name as given.
        name: String,
        /// The store that was searched.
        store: PathBuf,
        /// The hosts of the models, or their full names where one host has several.
        places: Vec<String>,
    },
    /// The model runs on a server; the store has no weights.
    #[error("{0} runs in the cloud: there are no weights here to prune")]
    Cloud(String),
    /// The weights are not a GGUF.
    #[error(
        "{0} is stored as safetensors, not GGUF; pull a GGUF of it (`ollama pull hf.co/USER/REPO`), or convert its \
         source with llama.cpp's convert_hf_to_gguf.py"
    )]
    Safetensors(String),
    /// The model has further weights that would not fit a pruned one.
    #[error("{name} is made of a model and {what}, which does not fit a pruned one; {advice}")]
    Layers {
        /// The name as given.
        name: String,
        /// Layer besides the model.
        what: &'static str,
        /// Advice to the user.
        advice: &'static str,
    },
    /// A Modelfile cannot hold something that the model in Ollama needs.
    #[error(
        "a Modelfile cannot hold {}: it has no escapes for unprintable characters, unusual names, or three quotes \
         before a line break; {advice}",
        what.join(", ")
    )]
    Unholdable {
        /// Parts that it cannot hold, as named by [`cannot_hold`].
        what: Vec<String>,
        /// Advice to the user.
        advice: &'static str,
    },
    /// `ollama` cannot be run.
    #[error("cannot run `ollama`, which has to be installed and on the PATH")]
    Program(#[source] std::io::Error),
    /// No server answers.
    #[error("no answer from Ollama's server; start it (`ollama serve`): `ollama list` said: {0}")]
    Server(String),
    /// `ollama create` failed.
    #[error("the model is written, but `ollama create {name}` failed: {said}")]
    Create {
        /// The name of the model to make.
        name: String,
        /// The last line that `ollama` printed.
        said: String,
    },
    /// A file cannot be read or written.
    #[error("cannot read or write {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Error of the system.
        source: std::io::Error,
    },
    /// A manifest or blob does not hold what it should.
    #[error("{}: {problem}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Description of the fault.
        problem: String,
    },
}

/// Model in a store.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stored {
    /// The GGUF's path.
    pub model: PathBuf,
    /// The template of prompts, if the model has its own.
    pub template: Option<String>,
    /// The system prompt.
    pub system: Option<String>,
    /// Names and JSON values of parameters; a name with several values comes once for each.
    pub parameters: Vec<(String, Json)>,
    /// Texts of licences.
    pub licenses: Vec<String>,
    /// Roles and contents of the messages that each chat starts with.
    pub messages: Vec<(String, String)>,
    /// The built-in renderer that Ollama uses in place of a template.
    pub renderer: Option<String>,
    /// The built-in parser of the model's answers, for example for tool calls.
    pub parser: Option<String>,
    /// The lowest version of Ollama that runs the model.
    pub requires: Option<String>,
    /// Notes for the user on parts of the model that are not carried over, one sentence each.
    pub notes: Vec<String>,
}

/// Checks, before any work, that [`create`] can succeed.
/// It rejects a name that Ollama does not accept, values that a Modelfile cannot hold, a lack of space for a
/// temporary file, and a machine without `ollama` or its server. `model` is the path that the GGUF will have.
///
/// # Errors
/// [`OllamaError::Name`], [`OllamaError::Unholdable`], [`OllamaError::Io`], [`OllamaError::Program`] or
/// [`OllamaError::Server`].
pub fn can_create(name: &str, model: &Path, source: Option<&Stored>) -> Result<(), OllamaError> {
    let (parts, tag) = store::parts_of(name)?;
    let usual = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if !parts.iter().chain([&tag]).all(|part| part.chars().all(usual) && !part.starts_with('-')) {
        return Err(OllamaError::Name(name.into()));
    }
    whole_modelfile(model, source)?;
    temporary()?;
    // `ollama list` needs the server.
    let out = Command::new("ollama").arg("list").output().map_err(OllamaError::Program)?;
    if out.status.success() { Ok(()) } else { Err(OllamaError::Server(last_words(&out))) }
}

/// Creates the model called `name` from the GGUF at `model`, by `ollama create` with a Modelfile that
/// includes the data of `source`.
///
/// # Errors
/// [`OllamaError`] with the message of `ollama`, for example that no server runs.
pub fn create(name: &str, model: &Path, source: Option<&Stored>) -> Result<(), OllamaError> {
    let text = whole_modelfile(model, source)?;
    let file = temporary()?;
    let written = std::io::Write::write_all(&mut file.as_file(), text.as_bytes());
    written.map_err(|source| OllamaError::Io { path: std::env::temp_dir(), source })?;
    let out = Command::new("ollama").args(["create", name, "-f"]).arg(file.path()).output();
    let out = out.map_err(OllamaError::Program)?;
    if out.status.success() {
        return Ok(());
    }
    Err(OllamaError::Create { name: name.into(), said: last_words(&out) })
}

/// Modelfile for the GGUF at `model`, named by its absolute path, with nothing left out.
fn whole_modelfile(model: &Path, source: Option<&Stored>) -> Result<String, OllamaError> {
    let absolute =
        std::path::absolute(model).map_err(|source| OllamaError::Io { path: model.into(), source })?;
    let from = absolute.to_str();
    let what = from.map_or_else(|| vec![modelfile::PATH.into()], |from| cannot_hold(from, source));
    if let (Some(from), []) = (from, &what[..]) {
        return Ok(modelfile(from, source));
    }
    let advice = if what.iter().any(|what| what == modelfile::PATH) {
        "choose another output path"
    } else {
        "write a Modelfile without it, and set it with Ollama's API (POST /api/create)"
    };
    Err(OllamaError::Unholdable { what, advice })
}

/// Creates a temporary file for a Modelfile that `ollama` reads.
fn temporary() -> Result<tempfile::NamedTempFile, OllamaError> {
    let made = tempfile::Builder::new().prefix("Modelfile.").tempfile();
    made.map_err(|e| OllamaError::Io { path: std::env::temp_dir(), source: without_path(e) })
}

/// Last line that a failed program printed.
fn last_words(out: &Output) -> String {
    let said = String::from_utf8_lossy(&out.stderr);
    let last = said.lines().rev().find(|line| !line.trim().is_empty());
    last.map_or_else(|| out.status.to_string(), |line| line.trim().into())
}
