//! Ollama's store of models.
//!
//! A store holds one manifest per model, `manifests/HOST/NAMESPACE/MODEL/TAG`. The manifest lists a config
//! and layers by their digests; they are stored as `blobs/sha256-HEX` (`manifest` and `types/model/name.go`
//! of Ollama).

use super::{OllamaError, Stored};
use crate::gguf::sha256;
use serde_json::Value as Json;
use std::path::{Path, PathBuf};

/// Namespace of models that are named without one.
const LIBRARY: &str = "library";

/// Host of models that are named without one.
const REGISTRY: &str = "registry.ollama.ai";

/// Prefix of the media types of Ollama's own layers.
const OLLAMAS: &str = "application/vnd.ollama.image.";

/// Finds the folder of Ollama's models: `OLLAMA_MODELS`, the user's own, or that of the service.
///
/// # Errors
/// [`OllamaError::NoStore`].
pub fn store() -> Result<PathBuf, OllamaError> {
    if let Some(folder) = std::env::var_os("OLLAMA_MODELS").filter(|f| !f.is_empty()) {
        return Ok(folder.into());
    }
    let home = std::env::home_dir().map(|home| home.join(".ollama/models"));
    let service = ["/usr/share/ollama/.ollama/models", "/var/lib/ollama/models"].map(PathBuf::from);
    store_among(home.into_iter().chain(service)).ok_or(OllamaError::NoStore)
}

/// First folder that holds a model, else the first that is a store. The user's own may be empty if a service
/// runs.
fn store_among(candidates: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    let is_store = |folder: &PathBuf| folder.join("manifests").is_dir();
    let stores: Vec<PathBuf> = candidates.into_iter().filter(is_store).collect();
    let with_model = stores.iter().find(|folder| holds_file(&folder.join("manifests"), 3));
    with_model.or(stores.first()).cloned()
}

/// Returns whether a folder holds a file at the depth `depth` below it.
fn holds_file(folder: &Path, depth: usize) -> bool {
    let mut inside = names_in(folder).map(|name| folder.join(name));
    inside.any(|path| if depth == 0 { path.is_file() } else { holds_file(&path, depth - 1) })
}

/// Names of a folder's entries; none for an unreadable folder. Ollama's own names never start with a dot.
fn names_in(folder: &Path) -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| !name.starts_with('.'))
}

/// Finds the model called `name` (`[HOST/][NAMESPACE/]MODEL[:TAG]`) in `store`, and checks its weights by
/// their digest.
///
/// # Errors
/// [`OllamaError`] if it is not there, not whole, or not just a GGUF with texts.
pub fn find(store: &Path, name: &str) -> Result<Stored, OllamaError> {
    let path = manifest_of(store, name)?;
    let manifest: Json =
        serde_json::from_slice(&read(&path)?).map_err(|e| damaged(&path, format!("is no manifest: {e}")))?;
    let layers = manifest["layers"].as_array().ok_or_else(|| damaged(&path, "has no layers"))?;
    let config = Config::read(store, &path, &manifest)?;
    let remote = config.as_ref().is_none_or(|c| c.remote);
    let safetensors = || OllamaError::Safetensors(name.into());
    let mut found = Stored::default();
    if let Some(Config { renderer, parser, requires, is_safetensors, .. }) = config {
        if is_safetensors && !remote {
            return Err(safetensors());
        }
        found = Stored { renderer, parser, requires, ..found };
    }
    let besides = |what, advice| Err(OllamaError::Layers { name: name.into(), what, advice });
    let mut weights = None;
    for layer in layers {
        let (Some(media_type), Some(digest)) = (layer["mediaType"].as_str(), layer["digest"].as_str()) else {
            return Err(damaged(&path, "has a layer without type or digest"));
        };
        let blob = Blob::new(store, &path, digest)?;
        match media_type.rsplit('.').next().unwrap_or_default() {
            "model" if weights.is_some() => {
                return besides("a second GGUF", "give the GGUF file to prune by its path");
            }
            "model" => weights = Some(blob),
            "tensor" => return Err(safetensors()),
            "adapter" => return besides("a LoRA adapter", "merge it into the model first"),
            "projector" => {
                let advice =
                    "make a model of its language part alone, and add the projector to the pruned one";
                return besides("a projector of images", advice);
            }
            // `prompt` is the old name.
            "template" | "prompt" => found.template = Some(blob.text()?),
            "system" => found.system = Some(blob.text()?),
            "license" => found.licenses.push(license(read(&blob.path)?)),
            "params" => {
                found.parameters = parameters(&blob.text()?)
                    .ok_or_else(|| damaged(&blob.path, "is no JSON object of parameters"))?;
            }
            "messages" => {
                let json = serde_json::from_slice(&read(&blob.path)?).unwrap_or_default();
                found.messages = messages(&json).ok_or_else(|| {
                    damaged(&blob.path, "is no JSON list of messages with a role and a content")
                })?;
                if have_more(&json) {
                    found.notes.push(
                        "of the model's messages only roles and contents are carried over, not images or tool calls"
                            .into(),
                    );
                }
            }
            _ => {
                let kind = media_type.strip_prefix(OLLAMAS).unwrap_or(media_type);
                let note = format!(
                    "the model's layer of the kind {kind:?} is not carried over: neither the pruned GGUF nor its \
                     Modelfile has it"
                );
                if !found.notes.contains(&note) {
                    found.notes.push(note);
                }
            }
        }
    }
    found.model = match weights {
        Some(blob) => blob.checked()?,
        None if remote => return Err(OllamaError::Cloud(name.into())),
        None => return Err(damaged(&path, "lists no GGUF; pull the model again")),
    };
    Ok(found)
}

/// Config of a model, as far as layers do not hold it.
struct Config {
    renderer: Option<String>,
    parser: Option<String>,
    requires: Option<String>,
    /// Whether the model runs on another host.
    remote: bool,
    is_safetensors: bool,
}

impl Config {
    /// Reads the config that the manifest at `path` names; none if it names none.
    fn read(store: &Path, path: &Path, manifest: &Json) -> Result<Option<Config>, OllamaError> {
        let Some(digest) = manifest["config"]["digest"].as_str().filter(|d| !d.is_empty()) else {
            return Ok(None);
        };
        let blob = Blob::new(store, path, digest)?.path;
        let bytes = std::fs::read(&blob).map_err(|e| {
            damaged(&blob, format!("cannot be read ({e}), but is the model's config; pull it again"))
        })?;
        let bad =
            |why: String| damaged(&blob, format!("is the model's config, but {why}; pull the model again"));
        let json: Json = serde_json::from_slice(&bytes).map_err(|e| bad(format!("no JSON: {e}")))?;
        if !json.is_object() {
            return Err(bad("no JSON object".into()));
        }
        let text = |key: &str| match &json[key] {
            Json::Null => Ok(None),
            Json::String(text) => Ok(Some(text.clone()).filter(|t| !t.is_empty())),
            _ => Err(bad(format!("its {key} is no text"))),
        };
        Ok(Some(Config {
            renderer: text("renderer")?,
            parser: text("parser")?,
            requires: text("requires")?,
            remote: text("remote_host")?.or(text("remote_model")?).is_some(),
            is_safetensors: text("model_format")?.is_some_and(|format| format == "safetensors"),
        }))
    }
}

/// File of the store, named by the digest of its bytes.
struct Blob {
    path: PathBuf,
    /// SHA-256 in hex.
    hex: String,
}

impl Blob {
    /// Blob with the digest `digest`, which the manifest at `manifest` names.
    fn new(store: &Path, manifest: &Path, digest: &str) -> Result<Blob, OllamaError> {
        let hex = digest
            .strip_prefix("sha256:")
            .filter(|h| h.len() == 64 && h.bytes().all(|b| b.is_ascii_hexdigit()))
            .ok_or_else(|| damaged(manifest, "has a digest that is no SHA-256"))?;
        Ok(Blob { path: store.join("blobs").join(format!("sha256-{hex}")), hex: hex.into() })
    }

    fn text(&self) -> Result<String, OllamaError> {
        String::from_utf8(read(&self.path)?).map_err(|_| damaged(&self.path, "is no text in UTF-8"))
    }

    /// Verifies the digest of the bytes and returns the path.
    fn checked(self) -> Result<PathBuf, OllamaError> {
        let io = |source| OllamaError::Io { path: self.path.clone(), source };
        let file = std::fs::File::open(&self.path).map_err(io)?;
        let map = crate::ggml::FileMap::new(&file, &self.path).map_err(io)?;
        if !sha256([&map[..]]).eq_ignore_ascii_case(&self.hex) {
            let problem = "does not have the digest in its name; pull the model again";
            return Err(damaged(&self.path, problem));
        }
        Ok(self.path)
    }
}

fn damaged(path: &Path, problem: impl Into<String>) -> OllamaError {
    OllamaError::Damaged { path: path.into(), problem: problem.into() }
}

fn read(path: &Path) -> Result<Vec<u8>, OllamaError> {
    std::fs::read(path).map_err(|source| OllamaError::Io { path: path.into(), source })
}

/// Decodes the text of a licence; many are older than UTF-8.
fn license(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|e| {
        encoding_rs::WINDOWS_1252.decode_without_bom_handling(e.as_bytes()).0.into_owned()
    })
}

/// Parameters from a layer's JSON. A list stands for several parameters of one name.
fn parameters(text: &str) -> Option<Vec<(String, Json)>> {
    let json: Json = serde_json::from_str(text).ok()?;
    let mut all = Vec::new();
    for (name, value) in json.as_object()? {
        let values = value.as_array().map_or_else(|| std::slice::from_ref(value), Vec::as_slice);
        all.extend(values.iter().map(|value| (name.clone(), value.clone())));
    }
    Some(all)
}

/// Roles and contents from a layer's JSON.
fn messages(json: &Json) -> Option<Vec<(String, String)>> {
    let message = |m: &Json| {
        let content = if m["content"].is_null() { "" } else { m["content"].as_str()? };
        Some((m["role"].as_str()?.into(), content.into()))
    };
    json.as_array()?.iter().map(message).collect()
}

/// Returns whether a message has more than a role and a content.
fn have_more(messages: &Json) -> bool {
    let all = messages.as_array().into_iter().flatten().filter_map(Json::as_object);
    all.flat_map(|m| m.keys()).any(|key| key != "role" && key != "content")
}

/// Parts of a model's name between slashes, and its tag.
pub(super) fn parts_of(name: &str) -> Result<(Vec<&str>, &str), OllamaError> {
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

/// Finds the manifest of the model called `name`, case-insensitively as in Ollama.
/// A name without a host means Ollama's registry if that has the model, else any host that has it. An exact
/// match is preferred.
fn manifest_of(store: &Path, name: &str) -> Result<PathBuf, OllamaError> {
    let (parts, tag) = parts_of(name)?;
    let wanted = match parts[..] {
        [model] => [None, Some(LIBRARY), Some(model), Some(tag)],
        [namespace, model] => [None, Some(namespace), Some(model), Some(tag)],
        [host, namespace, model] => [Some(host), Some(namespace), Some(model), Some(tag)],
        _ => return Err(OllamaError::Name(name.into())),
    };
    let manifests = store.join("manifests");
    let path_of = |place: &Vec<String>| manifests.join(place.iter().collect::<PathBuf>());
    // Host, namespace, model and tag of each model.
    let mut found: Vec<Vec<String>> = vec![vec![]];
    for part in wanted {
        let mut deeper = Vec::new();
        for place in &found {
            let mut names: Vec<String> = names_in(&path_of(place)).collect();
            names.retain(|name| part.is_none_or(|part| part.eq_ignore_ascii_case(name)));
            deeper.extend(names.into_iter().map(|name| [&place[..], &[name]].concat()));
        }
        found = deeper;
    }
    found.retain(|place| path_of(place).is_file());
    let usual = |place: &Vec<String>| place[0].eq_ignore_ascii_case(REGISTRY);
    if wanted[0].is_none() && found.iter().any(usual) {
        found.retain(usual);
    }
    let exact = |place: &Vec<String>| {
        place.iter().zip(wanted).all(|(part, wanted)| wanted.is_none_or(|wanted| wanted == part))
    };
    if found.iter().any(exact) {
        found.retain(exact);
    }
    found.sort();
    match &found[..] {
        [] => Err(OllamaError::Missing { name: name.into(), store: store.into() }),
        [place] => Ok(path_of(place)),
        several => {
            let same_host = several.windows(2).any(|two| two[0][0] == two[1][0]);
            let named = |place: &Vec<String>| match &place[..] {
                [path @ .., tag] if same_host => format!("{}:{tag}", path.join("/")),
                _ => place[0].clone(),
            };
            let places = several.iter().map(named).collect();
            Err(OllamaError::Ambiguous { name: name.into(), store: store.into(), places })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;

    #[test]
    fn an_empty_store_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let folder = |name: &str| dir.path().join(name);
        let candidates = || ["none", "mine", "service", "other"].map(folder);
        assert_eq!(store_among(candidates()), None);
        std::fs::create_dir_all(folder("mine/manifests/registry.ollama.ai/library/gone")).unwrap();
        std::fs::create_dir_all(folder("service/manifests")).unwrap();
        assert_eq!(store_among(candidates()), Some(folder("mine")));
        // These are no manifests: they are elsewhere or hidden.
        std::fs::write(folder("mine/manifests/note"), "").unwrap();
        std::fs::write(folder("mine/manifests/registry.ollama.ai/library/gone/.DS_Store"), "").unwrap();
        for name in ["service", "other"] {
            let model = folder(name).join("manifests/hf.co/user/model");
            std::fs::create_dir_all(&model).unwrap();
            std::fs::write(model.join("latest"), "{}").unwrap();
        }
        assert_eq!(store_among(candidates()), Some(folder("service")));
        std::fs::write(folder("mine/manifests/registry.ollama.ai/library/gone/latest"), "{}").unwrap();
        assert_eq!(store_among(candidates()), Some(folder("mine")));
    }

    #[test]
    fn a_cause_is_said_once() {
        let e = read(Path::new("/nowhere/blob")).unwrap_err();
        let cause = e.source().unwrap().to_string();
        assert!(e.to_string().contains("/nowhere/blob") && !e.to_string().contains(&cause), "{e}");
        assert_eq!(crate::with_causes(&e), format!("{e}: {cause}"));
    }
}
