//! Verification that a pruned file is unchanged and predicts what was measured.

use super::{JobError, mixture, open_file, open_in, open_model};
use crate::assemble::NEW_MATRICES;
use crate::evaluate::{llama_losses, own_losses};
use crate::ggml::{LlamaModel, Token};
use crate::gguf::{GgufFile, Value};
use crate::model::{BlockMatrix, Model, Segment};
use crate::pipeline::Observer;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Largest median, over tokens, of the difference in nats between the crate's own forward pass and the record
/// in the file. The pass may compute the same numbers in another order.
const OWN: f64 = 1e-3;

/// The same limit for llama.cpp, which rounds activations to eight bits for quantised weights, and for files
/// in which some matrices were quantised again afterwards.
pub(super) const LLAMA: f64 = 0.2;

/// Number of tokens whose losses a file records.
pub(super) const RECORDED: usize = 128;

/// Description of a verification.
#[derive(Clone, Debug)]
pub struct VerifyJob {
    /// File that was pruned by this program.
    pub model: PathBuf,
    /// Its source, if it is available.
    pub source: Option<PathBuf>,
    /// Number of threads.
    pub n_threads: usize,
}

/// One check.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Check {
    /// Name of the check.
    pub name: &'static str,
    /// Finding: `Ok` if it is as expected, else `Err`.
    pub found: Result<String, String>,
}

/// Record of a file: its predictions on a few tokens, by the crate's own forward pass when the file was made.
pub(super) struct Record {
    pub(super) tokens: Vec<Token>,
    losses: Vec<f64>,
    /// Whether the file holds exactly the values that were measured.
    exact: bool,
}

impl Record {
    pub(super) fn of(file: &GgufFile) -> Option<Record> {
        let tokens = file.get("putri.check.tokens").and_then(Value::as_unsigned_array)?;
        let losses = file.get("putri.check.nll").and_then(Value::as_f32_array)?;
        let exact = file.get("putri.check.exact") == Some(&Value::Bool(true));
        let sound = tokens.len() > 1 && losses.len() + 1 == tokens.len();
        sound.then(|| Record {
            tokens: tokens.into_iter().map(|t| t as Token).collect(),
            losses: losses.into_iter().map(f64::from).collect(),
            exact,
        })
    }

    /// Checks that the crate's own forward pass of `model` reproduces the record.
    fn agrees_with(&self, model: &Model, n_threads: usize) -> Result<Result<String, String>, JobError> {
        let losses = own_losses(model, &self.tokens, n_threads).map_err(|e| JobError::Prune(e.into()))?;
        Ok(self.agrees(&losses, if self.exact { OWN } else { LLAMA }))
    }

    /// Checks that `losses` match the record within `most`.
    pub(super) fn agrees(&self, losses: &[f64], most: f64) -> Result<String, String> {
        let mut apart: Vec<f64> = losses.iter().zip(&self.losses).map(|(a, b)| (a - b).abs()).collect();
        apart.sort_by(f64::total_cmp);
        let median = apart[apart.len() / 2];
        let ppl = |losses: &[f64]| (losses.iter().sum::<f64>() / losses.len() as f64).exp();
        let text = format!(
            "perplexity {:.3} on {} tokens, {:.3} when it was made; the median token differs by {median:.1e} nats",
            ppl(losses),
            losses.len(),
            ppl(&self.losses)
        );
        // NaN fails the check.
        if losses.len() == self.losses.len() && median <= most { Ok(text) } else { Err(text) }
    }
}

/// Checks that the crate's own forward pass of the file at `path`, which will be called `name`, reproduces
/// its record. Without a record, the check passes.
pub(super) fn matches_record(path: &Path, name: &Path, n_threads: usize) -> Result<(), JobError> {
    let model = open_model(path)?;
    let Some(record) = Record::of(&model.file) else { return Ok(()) };
    let found = record.agrees_with(&model, n_threads)?;
    found.map(drop).map_err(|said| JobError::Miswritten { path: name.into(), said })
}

/// Checks a pruned file.
/// Problems of the file are among the returned checks; an error means that nothing can be checked.
///
/// # Errors
/// [`JobError`] if a file cannot be read, or was not made by this program.
pub fn verify(job: &VerifyJob, observer: &mut dyn Observer) -> Result<Vec<Check>, JobError> {
    let file = open_file(&job.model)?;
    if file.get("putri.version").is_none() {
        return Err(JobError::NotOurs(job.model.clone()));
    }
    if mixture::says_experts(&file) {
        return mixture::verify(job, file, observer);
    }
    let model = open_in(&job.model, file)?;
    model.file.check_values()?;
    let mut checks = Vec::new();
    let mut add = |name, found| checks.push(Check { name, found });
    add("tensors", Ok(format!("{} as the metadata says, all of finite numbers", model.file.tensors().len())));
    if let Some(path) = &job.source {
        let source = open_model(path)?;
        observer.stage("hash the source", 1);
        add("source", is_source(&model.file, &source.file));
        observer.step(1, "");
        add("sizes", sizes_agree(&model, &source));
        add("rows", rows_agree(&model, &source));
    }
    match Record::of(&model.file) {
        None => add("predictions", Ok("not recorded in this file".into())),
        Some(record) => {
            observer.stage("our own forward", 1);
            add("predictions", record.agrees_with(&model, job.n_threads)?);
            observer.step(1, "");
            observer.stage("llama.cpp", 1);
            let loaded = LlamaModel::load(&job.model);
            let losses = loaded.and_then(|m| llama_losses(&m, &record.tokens, job.n_threads));
            let found = losses.map_err(|e| e.to_string());
            add("llama.cpp", found.and_then(|losses| record.agrees(&losses, LLAMA)));
            observer.step(1, "");
        }
    }
    Ok(checks)
}

/// Checks that the file names `source` as its source.
pub(super) fn is_source(file: &GgufFile, source: &GgufFile) -> Result<String, String> {
    let (is, said) = (source.sha256(), file.get("putri.source.sha256"));
    match said {
        Some(Value::Str(said)) if said == is.as_bytes() => {
            Ok(format!("has the recorded SHA-256, {}…", &is[..12]))
        }
        Some(Value::Str(said)) => {
            let said = String::from_utf8_lossy(said).escape_debug().to_string();
            Err(format!("has the SHA-256 {is}; the file was made from {said}"))
        }
        _ => Err("the file does not say what it was made from".into()),
    }
}

/// Checks that as much of the source is removed as the file says.
fn sizes_agree(model: &Model, source: &Model) -> Result<String, String> {
    let params = |m: &Model| m.hparams.blocks_params(&m.hparams.blocks) as f64;
    let gone = 1.0 - params(model) / params(source);
    match model.file.get("putri.sparsity_reached") {
        _ if model.hparams.n_layer() != source.hparams.n_layer() => {
            Err(format!("{} blocks; the source has {}", model.hparams.n_layer(), source.hparams.n_layer()))
        }
        Some(Value::F32(said)) if (f64::from(*said) - gone).abs() < 1e-5 => {
            Ok(format!("{:.2} % of the source's blocks is gone, as recorded", gone * 100.0))
        }
        Some(Value::F32(said)) => Err(format!(
            "{:.2} % of the source's blocks is gone; recorded are {:.2} %",
            gone * 100.0,
            said * 100.0
        )),
        _ => Err("the file does not say how much is gone".into()),
    }
}

/// Checks that rows that are copied byte for byte are those of the same heads and neurons.
fn rows_agree(model: &Model, source: &Model) -> Result<String, String> {
    let mut n_compared = 0;
    for (il, (new, old)) in model.blocks.iter().zip(&source.blocks).enumerate() {
        let shape = &source.hparams.blocks[il];
        let head_dim = source.hparams.head_dim;
        let part = |m: BlockMatrix, rows: usize| {
            let copied = !is_new(model, m);
            let (new, old) = (new.matrix(m).filter(|_| copied)?, old.matrix(m)?);
            Some(Part { name: m.name(), new, old, rows })
        };
        let heads: Vec<Part> = [
            part(BlockMatrix::AttnQ, shape.heads_per_group() * head_dim),
            part(BlockMatrix::AttnK, head_dim),
            part(BlockMatrix::AttnV, head_dim),
        ]
        .into_iter()
        .flatten()
        .collect();
        let neurons: Vec<Part> =
            [BlockMatrix::FfnGate, BlockMatrix::FfnUp].into_iter().filter_map(|m| part(m, 1)).collect();
        for parts in [heads, neurons] {
            n_compared += one_origin(model, source, &parts).map_err(|e| format!("block {il}: {e}"))?;
        }
    }
    Ok(format!("{n_compared} of Q, K, V, gate and up are the source's, of the same heads and neurons"))
}

/// Matrix whose rows, in runs of equal length, each belong to one group or neuron.
struct Part {
    name: &'static str,
    new: Segment,
    old: Segment,
    rows: usize,
}

/// Returns whether the file says that the matrix `m` has new values.
fn is_new(model: &Model, m: BlockMatrix) -> bool {
    match model.file.get(NEW_MATRICES) {
        Some(Value::StrArray(names)) => names.iter().any(|name| name == m.name().as_bytes()),
        // Files of version 0.1 that do not say it have new values in these.
        _ => matches!(m, BlockMatrix::AttnOutput | BlockMatrix::FfnDown),
    }
}

/// Checks that the rows of all `parts` come from the same groups or neurons of the source, and counts them.
/// It skips matrices whose type differs from the source's.
fn one_origin(model: &Model, source: &Model, parts: &[Part]) -> Result<usize, String> {
    let mut origins: Option<Vec<Vec<usize>>> = None;
    let mut n_compared = 0;
    for p in parts.iter().filter(|p| model.tensor(&p.new).ty == source.tensor(&p.old).ty) {
        let mut places: HashMap<&[u8], Vec<usize>> = HashMap::new();
        for (i, row) in rows(source, &p.old).enumerate() {
            places.entry(row).or_default().push(i / p.rows);
        }
        let none = Vec::new();
        let rows: Vec<&[u8]> = rows(model, &p.new).collect();
        n_compared += rows.len();
        let found = rows.chunks(p.rows).map(|rows| {
            // A source may contain a row twice.
            let of_row = rows.iter().map(|row| places.get(row).unwrap_or(&none));
            of_row.cloned().reduce(|a, b| common(&a, &b)).unwrap_or_default()
        });
        let found: Vec<Vec<usize>> = found.collect();
        if found.iter().any(Vec::is_empty) {
            return Err(format!("rows of {} are none of the source's, or of several of its heads", p.name));
        }
        let both = match origins {
            None => found,
            Some(origins) => origins.iter().zip(&found).map(|(a, b)| common(a, b)).collect(),
        };
        if both.iter().any(Vec::is_empty) {
            return Err(format!(
                "rows of {} are not those of the same heads or neurons as the others",
                p.name
            ));
        }
        origins = Some(both);
    }
    Ok(n_compared)
}

fn common(a: &[usize], b: &[usize]) -> Vec<usize> {
    a.iter().copied().filter(|n| b.contains(n)).collect()
}

fn rows<'m>(m: &'m Model, s: &Segment) -> impl Iterator<Item = &'m [u8]> {
    let t = m.tensor(s);
    let n = t.ty.row_bytes(t.ne[0]);
    m.file.data(t)[s.start * n..(s.start + s.n) * n].chunks_exact(n)
}
