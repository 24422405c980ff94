//! Models that a local Ollama has: where its files lie, and what a Modelfile says of them. No server is asked.
//!
//! A store holds a manifest per model, `manifests/HOST/NAMESPACE/MODEL/TAG`, which lists layers by digest, and the layers as
//! `blobs/sha256-HEX` (`server/manifest.go` and `server/modelpath.go` of Ollama).

use crate::gguf::sha256;
use serde_json::Value;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The namespace of models that are named without one.
const LIBRARY: &str = "library";

/// Why a model of a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OllamaError {
    /// There is no store.
    #[error("no Ollama store found; set OLLAMA_MODELS to the folder that has manifests and blobs in it")]
    NoStore,
    /// The name is none.
    #[error("{0:?} is not the name of an Ollama model, such as llama3.2:1b or user/model:tag")]
    Name(String),
    /// The store does not have it.
    #[error("{name} is not in {}: `ollama pull {name}` fetches it, `ollama list` says what is there", store.display())]
    Missing {
        /// As it was named.
        name: String,
        /// Where it was looked for.
        store: PathBuf,
    },
    /// Several registries have one of that name.
    #[error("{name} is in {} from several places; name one of them: {}", store.display(), hosts.join(", "))]
    Ambiguous {
        /// As it was named.
        name: String,
        /// Where it was looked for.
        store: PathBuf,
        /// The places.
        hosts: Vec<String>,
    },
    /// It runs elsewhere.
    #[error("{0} runs in the cloud: there are no weights here to prune")]
    Cloud(String),
    /// It is more than a model.
    #[error("{name} is made of a model and {what}, which does not fit a pruned one; {advice}")]
    Layers {
        /// As it was named.
        name: String,
        /// What else.
        what: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// `ollama` cannot be run.
    #[error(
        "cannot run `ollama` ({0}): is it installed, and on the PATH? --modelfile writes what it needs, to be used elsewhere"
    )]
    Program(std::io::Error),
    /// No server answers.
    #[error("--ollama-create wants Ollama's server: `ollama list` said: {0}")]
    Server(String),
    /// `ollama` did not do it.
    #[error("the model is written, but `ollama create {name}` failed: {said}")]
    Create {
        /// The model's name.
        name: String,
        /// What it said last.
        said: String,
    },
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A manifest or layer is not what it should be.
    #[error("{}: {problem}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// A model in a store.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stored {
    /// The GGUF.
    pub model: PathBuf,
    /// What is put around messages, if the model has its own.
    pub template: Option<String>,
    /// What the model is told first.
    pub system: Option<String>,
    /// Parameters, each with its value.
    pub parameters: Vec<(String, String)>,
    /// Licences.
    pub licenses: Vec<String>,
}

/// The folder with Ollama's models: `OLLAMA_MODELS`, the user's own, or that of the service.
///
/// # Errors
/// [`OllamaError::NoStore`].
pub fn store() -> Result<PathBuf, OllamaError> {
    if let Some(folder) = std::env::var_os("OLLAMA_MODELS").filter(|f| !f.is_empty()) {
        return Ok(folder.into());
    }
    let home = std::env::home_dir().map(|home| home.join(".ollama/models"));
    let service = ["/usr/share/ollama/.ollama/models", "/var/lib/ollama/models"].map(PathBuf::from);
    let found = home.into_iter().chain(service).find(|folder| folder.join("manifests").is_dir());
    found.ok_or(OllamaError::NoStore)
}

/// Finds the model called `name` (`[HOST/][NAMESPACE/]MODEL[:TAG]`) in `store`, and checks its weights by their digest.
///
/// # Errors
/// [`OllamaError`] if it is not there, not whole, or not just a model.
pub fn find(store: &Path, name: &str) -> Result<Stored, OllamaError> {
    let manifest = manifest_of(store, name)?;
    let damaged =
        |path: &Path, problem: &str| OllamaError::Damaged { path: path.into(), problem: problem.into() };
    let text = read(&manifest)?;
    let json: Value =
        serde_json::from_slice(&text).map_err(|e| damaged(&manifest, &format!("is no manifest: {e}")))?;
    let layers = json["layers"].as_array().ok_or_else(|| damaged(&manifest, "has no layers"))?;
    let mut found = Stored::default();
    for layer in layers {
        let (Some(kind), Some(digest)) = (layer["mediaType"].as_str(), layer["digest"].as_str()) else {
            return Err(damaged(&manifest, "has a layer without type or digest"));
        };
        let hex = digest
            .strip_prefix("sha256:")
            .filter(|h| h.len() == 64 && h.bytes().all(|b| b.is_ascii_hexdigit()));
        let hex = hex.ok_or_else(|| damaged(&manifest, "has a digest that is no SHA-256"))?;
        let blob = store.join("blobs").join(format!("sha256-{hex}"));
        let words = || {
            let bytes = read(&blob)?;
            String::from_utf8(bytes).map_err(|_| damaged(&blob, "is no text"))
        };
        let layers = |what, advice| OllamaError::Layers { name: name.into(), what, advice };
        match kind.rsplit('.').next().unwrap_or_default() {
            "model" => {
                let file = std::fs::File::open(&blob)
                    .map_err(|source| OllamaError::Io { path: blob.clone(), source })?;
                let map = crate::ggml::FileMap::new(&file, &blob)
                    .map_err(|source| OllamaError::Io { path: blob.clone(), source })?;
                if !sha256([&map[..]]).eq_ignore_ascii_case(hex) {
                    return Err(damaged(&blob, "does not have the digest in its name; pull the model again"));
                }
                found.model = blob;
            }
            "adapter" => return Err(layers("a LoRA adapter", "merge it into the model first")),
            "projector" => {
                let advice =
                    "make a model of its language part alone, and add the projector to the pruned one";
                return Err(layers("a projector of images", advice));
            }
            "template" => found.template = Some(words()?),
            "system" => found.system = Some(words()?),
            "license" => found.licenses.push(words()?),
            "params" => {
                found.parameters = parameters(&words()?).ok_or_else(|| damaged(&blob, "are no parameters"))?
            }
            _ => {}
        }
    }
    if found.model.as_os_str().is_empty() {
        return Err(OllamaError::Cloud(name.into()));
    }
    Ok(found)
}

/// Refuses a name that Ollama would not give a model, and a machine on which [`create`] has nothing to run.
///
/// # Errors
/// [`OllamaError::Name`] or [`OllamaError::Program`].
pub fn can_create(name: &str) -> Result<(), OllamaError> {
    let (parts, tag) = parts_of(name)?;
    let usual = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if !parts.iter().chain([&tag]).all(|part| part.chars().all(usual) && !part.starts_with('-')) {
        return Err(OllamaError::Name(name.into()));
    }
    // Asks the server.
    let out = Command::new("ollama").arg("list").output().map_err(OllamaError::Program)?;
    if out.status.success() { Ok(()) } else { Err(OllamaError::Server(last_words(&out))) }
}

/// Makes the model called `name` of the GGUF at `model`, by `ollama create` from a Modelfile with what `source` says.
///
/// # Errors
/// [`OllamaError`] with what `ollama` said, for example that no server runs.
pub fn create(name: &str, model: &Path, source: Option<&Stored>) -> Result<(), OllamaError> {
    let io = |path: &Path, source| OllamaError::Io { path: path.into(), source };
    let model = std::path::absolute(model).map_err(|e| io(model, e))?;
    let mut file =
        tempfile::Builder::new().prefix("Modelfile.").tempfile().map_err(|e| io(&std::env::temp_dir(), e))?;
    let text = modelfile(&model.to_string_lossy(), source);
    std::io::Write::write_all(&mut file, text.as_bytes()).map_err(|e| io(file.path(), e))?;
    let out = Command::new("ollama").args(["create", name, "-f"]).arg(file.path()).output();
    let out = out.map_err(OllamaError::Program)?;
    if out.status.success() {
        return Ok(());
    }
    Err(OllamaError::Create { name: name.into(), said: last_words(&out) })
}

/// The last line that a program that failed said.
fn last_words(out: &Output) -> String {
    let said = String::from_utf8_lossy(&out.stderr);
    let last = said.lines().rev().find(|line| !line.trim().is_empty());
    last.map_or_else(|| out.status.to_string(), |line| line.trim().into())
}

/// The parts of a model's name that are between slashes, and its tag.
fn parts_of(name: &str) -> Result<(Vec<&str>, &str), OllamaError> {
    let (path, tag) = match name.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, tag),
        _ => (name, "latest"),
    };
    let parts: Vec<&str> = path.split('/').collect();
    let plain = |part: &&str| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', '\0']);
    if !parts.iter().chain([&tag]).all(plain) || parts.len() > 3 || tag.contains('/') {
        return Err(OllamaError::Name(name.into()));
    }
    Ok((parts, tag))
}

/// The manifest of the model called `name`.
fn manifest_of(store: &Path, name: &str) -> Result<PathBuf, OllamaError> {
    let (parts, tag) = parts_of(name)?;
    let manifests = store.join("manifests");
    let missing = || OllamaError::Missing { name: name.into(), store: store.into() };
    let below = match parts[..] {
        [model] => PathBuf::from(LIBRARY).join(model),
        [namespace, model] => PathBuf::from(namespace).join(model),
        _ => {
            return Some(manifests.join(parts.join("/")).join(tag))
                .filter(|m| m.is_file())
                .ok_or_else(missing);
        }
    };
    // Whatever the registry is called that they come from.
    let hosts = std::fs::read_dir(&manifests).map_err(|_| missing())?;
    let mut found: Vec<PathBuf> = hosts.flatten().map(|host| host.path()).collect();
    found.retain(|host| host.join(&below).join(tag).is_file());
    found.sort();
    match &found[..] {
        [] => Err(missing()),
        [host] => Ok(host.join(below).join(tag)),
        several => Err(OllamaError::Ambiguous {
            name: name.into(),
            store: store.into(),
            hosts: several
                .iter()
                .filter_map(|h| h.file_name())
                .map(|h| h.to_string_lossy().into_owned())
                .collect(),
        }),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, OllamaError> {
    std::fs::read(path).map_err(|source| OllamaError::Io { path: path.into(), source })
}

/// Parameters from a layer's JSON: lists stand for several of one name.
fn parameters(text: &str) -> Option<Vec<(String, String)>> {
    let json: Value = serde_json::from_str(text).ok()?;
    let mut all = Vec::new();
    for (name, value) in json.as_object()? {
        let values = value.as_array().map_or_else(|| std::slice::from_ref(value), Vec::as_slice);
        for value in values {
            // Strings in quotes, as a Modelfile takes them.
            all.push((name.clone(), value.to_string()));
        }
    }
    Some(all)
}

/// A Modelfile for the GGUF at the path `from`, with what `source` says, if the model came from a store. Without a template
/// Ollama takes that of the GGUF.
pub fn modelfile(from: &str, source: Option<&Stored>) -> String {
    let mut out = format!("FROM {from}\n");
    let Some(s) = source else { return out };
    let mut block = |word: &str, text: &str| {
        let _ = match (text.contains('\n') || text.contains('"'), text.contains("\"\"\"")) {
            (_, true) => {
                writeln!(out, "# {word} holds three quotes, which a Modelfile cannot: add it by hand")
            }
            (true, _) => writeln!(out, "{word} \"\"\"{text}\"\"\""),
            (false, _) => writeln!(out, "{word} \"{text}\""),
        };
    };
    s.template.iter().for_each(|t| block("TEMPLATE", t));
    s.system.iter().for_each(|t| block("SYSTEM", t));
    s.licenses.iter().for_each(|t| block("LICENSE", t));
    for (name, value) in &s.parameters {
        let _ = writeln!(out, "PARAMETER {name} {value}");
    }
    out
}
