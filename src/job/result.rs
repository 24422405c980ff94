//! Output of the passes: writing, verification and advice to the user.

use super::output::{finish, finish_parts, outputs, temporary};
use super::prepared::{Prepared, llama};
use super::verify::{RECORDED, matches_record};
use super::{
    Job, JobError, Outcome, Quality, Running, Samples, Size, forecast, recover, run_ctx, with_causes,
};
use crate::assemble::{Provenance, Written, assemble, write_imatrix, writes_exactly};
use crate::calibrate::{Windows, oddities};
use crate::evaluate::{self, Protocol};
use crate::ggml::{GgmlError, LlamaModel, Token, run_memory};
use crate::gguf::{OutTensor, write_gguf};
use crate::model::{BlockShape, Family, KvCache, Model};
use crate::pipeline::{self, Calibration, Observer, Plan, Target};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

/// Largest ratio of libllama's perplexity of the written file to that of the crate's own forward pass of the
/// pruned model, over many tokens.
/// libllama rounds activations to eight bits for quantised weights; the crate does not. Over n tokens, chance
/// adds about 1/√n.
const PARITY: f64 = 1.05;

/// Number of tokens in the prompt of samples, and in their continuations.
const PROMPT_TOKENS: usize = 24;
const SAMPLE_TOKENS: usize = 64;

impl Prepared {
    /// Writes and verifies the result of the passes.
    pub(super) fn write(
        &self,
        job: &Job,
        pruned: pipeline::Pruned,
        start: Instant,
        observer: &mut dyn Observer,
    ) -> Result<Outcome, JobError> {
        let (model, source, windows) = (self.model(), &self.source, &self.windows);
        let forecast = forecast(model, &Calibration::from(windows), &job.settings)?;
        let provenance = self.provenance(job, &pruned)?;
        // Beside their names until the model is verified.
        let imatrix = self.imatrix(job, &pruned.plan, &provenance, observer)?;
        observer.stage("write", 1);
        let temp = temporary(&job.output)?;
        let mut out = BufWriter::with_capacity(1 << 20, temp.as_file());
        let mix = job.quantise.map(|q| q.to);
        let Written { output_arch, fallbacks } =
            assemble(model, &pruned.plan, &provenance, mix, &mut out, &job.output)?;
        out.flush().map_err(|source| JobError::Io { path: job.output.clone(), source })?;
        drop(out);
        observer.step(1, "");
        let verified =
            job.verify.then(|| self.verified(job, temp.path(), output_arch, pruned.held_out.ppl, observer));
        let quality = Quality {
            held_out: pruned.held_out,
            file_ppl: verified.transpose()?,
            fit_tokens: (windows.n_fit * windows.n_ctx, windows.n_self * windows.n_ctx),
            held_out_tokens: windows.n_held_out * windows.n_ctx,
        };
        let window = windows.tokens_of(windows.n_fit..windows.n_fit + 1);
        let samples = job.samples.then(|| samples(job, temp.path(), window).map_err(JobError::does_not_load));
        let samples = samples.transpose()?;
        let running = match self.running(job, &pruned.plan, temp.path()) {
            Err(e) if job.verify => return Err(e),
            // A file that is not to be loaded need not load.
            found => found.ok(),
        };
        if observer.interrupted() {
            return Err(JobError::Interrupted);
        }
        if let Some((path, temp)) = imatrix {
            finish(job, temp, path)?;
        }
        let outputs = outputs(job, &source.file);
        let bytes = match &outputs[..] {
            [output] => finish(job, temp, output)?,
            parts => finish_parts(job, temp, parts)?,
        };
        let output = outputs[0].clone();
        let mut warnings = pruned.warnings;
        warnings.extend(fallbacks);
        warnings.extend(self.notes.iter().cloned());
        warnings.extend(oddities(windows, &pruned.dense_window_nll));
        // The result is there, whatever the comparison does.
        let compared = job.compare_quant.then(|| self.quant_baselines(job, &output, bytes, observer));
        let quant_baselines = compared.transpose().unwrap_or_else(|e| {
            warnings.push(format!("not compared with quantisation baselines: {}", with_causes(&e)));
            None
        });
        let (shapes, before) = (pruned.plan.shapes(model), size_of(source));
        let after = Size {
            bytes,
            params: before.params - removed_params(model, &shapes),
            block_params: model.hparams.blocks_params(&shapes),
            blocks: shapes,
        };
        warnings.extend(self.missed_targets(job, bytes, running.as_ref()));
        let sparsity = provenance.sparsity_reached;
        let deci_biases = output_arch == Family::Deci && source.blocks.iter().any(|b| b.qkv_bias.is_some());
        warnings.extend(advice(sparsity, &quality, output_arch, deci_biases));
        Ok(Outcome {
            before,
            after,
            output_arch: output_arch.name().into(),
            sparsity,
            ffn_unit: job.settings.ffn_unit(model),
            running,
            quality: Some(quality),
            output,
            kept_groups: pruned.plan.blocks.into_iter().map(|b| b.groups).collect(),
            block_losses: pruned.block_losses,
            provenance: Some(provenance),
            samples,
            quant_baselines: quant_baselines.unwrap_or_default(),
            forecast: Some(forecast),
            experts: None,
            warnings,
            time: start.elapsed(),
        })
    }

    /// Origin of the pruned model, with what it predicts for the first tokens of a held-out window.
    fn provenance(&self, job: &Job, pruned: &pipeline::Pruned) -> Result<Provenance, JobError> {
        let (model, windows) = (self.model(), &self.windows);
        // Shorter windows might take other factors of the rotation.
        let as_before = model.rope_factors(windows.n_ctx)? == model.rope_factors(RECORDED)?;
        let checked = &windows.held_out()[0][..if as_before { RECORDED.min(windows.n_ctx) } else { 0 }];
        let losses = pruned.losses.iter().take(checked.len().saturating_sub(1));
        Ok(Provenance {
            source_sha256: self.source_sha256.clone(),
            sparsity: recover::asked(job, model, self.reference()),
            sparsity_reached: match &job.recover_from {
                Some(_) => recover::removed(model, self.reference()),
                None => pruned.plan.sparsity(model),
            },
            method: recover::method(job, model),
            calibration: calibration_text(job, windows),
            seed: job.recipe.seed,
            stages: pruned.provenance.clone(),
            check_tokens: checked.to_vec(),
            check_nll: losses.map(|l| *l as f32).collect(),
            check_exact: writes_exactly(model, &pruned.plan),
        })
    }

    /// Writes the importance matrix to a temporary file, if the job asks for one. Returns it with its name.
    fn imatrix<'j>(
        &self,
        job: &'j Job,
        plan: &Plan,
        provenance: &Provenance,
        observer: &mut dyn Observer,
    ) -> Result<Option<(&'j Path, tempfile::NamedTempFile)>, JobError> {
        let Some(path) = &job.imatrix_out else { return Ok(None) };
        let (model, windows) = (self.model(), &self.windows);
        let squares = pipeline::input_squares(model, plan, windows, &job.settings, observer)?;
        let temp = temporary(path)?;
        let mut out = BufWriter::new(temp.as_file());
        let arch = plan.output_arch(model);
        write_imatrix(&mut out, path, model, arch, &squares, windows, &provenance.calibration)?;
        drop(out);
        Ok(Some((path, temp)))
    }

    /// Checks the written file, which does not have its own name yet.
    /// The crate's own forward pass must predict what the pruned model did. libllama must load the file and
    /// agree with `own`, the crate's perplexity on the held-out windows. Returns libllama's perplexity.
    fn verified(
        &self,
        job: &Job,
        file: &Path,
        output_arch: Family,
        own: f64,
        observer: &mut dyn Observer,
    ) -> Result<f64, JobError> {
        let n_threads = job.settings.n_threads;
        // An architecture that is only written to cannot be read again.
        if !output_arch.traits().output_only {
            matches_record(file, &job.output, n_threads)?;
        }
        let held_out = self.windows.held_out();
        observer.stage("verify", held_out.len());
        let written = llama(job, file).map_err(JobError::does_not_load)?;
        let told = |done, ppl| {
            observer.step(done, &format!("perplexity {ppl:.4}"));
            !observer.interrupted()
        };
        let ppl = evaluate::evaluate(&written, None, &held_out, Protocol::Hf, n_threads, told)
            .map_err(|source| JobError::evaluating(&job.output, source))?
            .ppl;
        if observer.interrupted() {
            return Err(JobError::Interrupted);
        }
        // A NaN on either side is no agreement.
        let n_tokens = self.windows.n_held_out * self.windows.n_ctx;
        let bound = PARITY.ln() + 1.0 / (n_tokens as f64).sqrt();
        let agrees = (ppl / own).ln().abs() <= bound;
        if agrees { Ok(ppl) } else { Err(JobError::Disagrees { file: ppl, own }) }
    }

    /// Notes of targets that the result of `bytes` does not keep to.
    fn missed_targets(&self, job: &Job, bytes: u64, running: Option<&Running>) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some(Target::Bytes(target)) = job.settings.target
            && bytes > target
        {
            notes.push(format!("the file has {} bytes more than was asked for", bytes - target));
        }
        if let (Some(ram), Some(r)) = (job.target_ram, running)
            && r.after.total() > ram
        {
            let more = r.after.total() - ram;
            notes.push(format!("llama.cpp takes {more} bytes more to run it than was asked for"));
        }
        let (trained, asked) = (self.source.hparams.n_ctx_train, run_ctx(job, &self.source));
        if asked > trained {
            notes.push(format!(
                "it was trained for {trained} tokens of context; {asked} are more than it knows"
            ));
        }
        notes
    }

    /// Memory that llama.cpp takes to run the source and the file `output`.
    fn running(&self, job: &Job, plan: &Plan, output: &Path) -> Result<Running, JobError> {
        let (n_ctx, h) = (run_ctx(job, &self.source), &self.source.hparams);
        Ok(Running {
            n_ctx,
            n_ctx_train: h.n_ctx_train,
            before: self.to_run,
            after: run_memory(output, n_ctx).map_err(JobError::does_not_load)?,
            kv_caches: Some([&h.blocks, &plan.shapes(&self.source)].map(|shapes| KvCache::new(h, shapes))),
        })
    }
}

/// Continuations of the beginning of `window` by the source of `job` and the file `output`.
pub(super) fn samples(job: &Job, output: &Path, window: &[Token]) -> Result<Samples, GgmlError> {
    let prompt = &window[..PROMPT_TOKENS.min(window.len())];
    let written =
        |model: &LlamaModel| evaluate::continuation(model, prompt, SAMPLE_TOKENS, job.settings.n_threads);
    let source = llama(job, &job.input)?;
    let before = written(&source)?;
    let prompt = source.vocab().detokenize(prompt);
    drop(source);
    Ok(Samples { prompt, before, after: written(&llama(job, output)?)? })
}

/// Copies the source for sparsity 0: the same bytes, or those of all parts as one file.
pub(super) fn copy_as_is(
    job: &Job,
    model: &Model,
    start: Instant,
    interrupted: bool,
) -> Result<Outcome, JobError> {
    let io = |source| JobError::Io { path: job.output.clone(), source };
    let temp = temporary(&job.output)?;
    let parts: Vec<&[u8]> = model.file.bytes().collect();
    match parts[..] {
        [bytes] => temp.as_file().write_all(bytes).map_err(io)?,
        _ => {
            let tensors = model.file.tensors().iter().map(|t| OutTensor::copy(&model.file, t));
            write_gguf(
                &mut temp.as_file(),
                &job.output,
                model.file.metadata(),
                &tensors.collect::<Vec<_>>(),
            )?;
        }
    }
    if job.verify {
        LlamaModel::load(temp.path()).map_err(JobError::does_not_load)?;
    }
    if interrupted {
        return Err(JobError::Interrupted);
    }
    let bytes = finish(job, temp, &job.output)?;
    let before = size_of(model);
    Ok(Outcome {
        after: Size { bytes, ..before.clone() },
        before,
        output_arch: model.hparams.family.name().into(),
        ffn_unit: job.settings.ffn_unit(model),
        sparsity: 0.0,
        running: None,
        quality: None,
        output: job.output.clone(),
        kept_groups: Plan::whole(model).blocks.into_iter().map(|b| b.groups).collect(),
        block_losses: None,
        provenance: None,
        samples: None,
        quant_baselines: Vec::new(),
        forecast: None,
        experts: None,
        warnings: Vec::new(),
        time: start.elapsed(),
    })
}

pub(super) fn size_of(model: &Model) -> Size {
    let h = &model.hparams;
    Size {
        bytes: model.file.n_bytes(),
        params: model.file.tensors().iter().map(|t| t.n_elements()).sum(),
        block_params: h.blocks_params(&h.blocks),
        blocks: h.blocks.clone(),
    }
}

fn removed_params(model: &Model, shapes: &[BlockShape]) -> usize {
    let h = &model.hparams;
    h.blocks_params(&h.blocks) - h.blocks_params(shapes)
}

fn calibration_text(job: &Job, w: &Windows) -> String {
    let files: Vec<_> = job
        .recipe
        .files
        .iter()
        .map(|f| f.file_name().unwrap_or_default().to_string_lossy().into_owned())
        .collect();
    let mut own = format!("{} of {} windows of {} tokens self-generated", w.n_self, w.n_fit, w.n_ctx);
    if w.n_self > 0 && job.recipe.chat_share > 0.0 {
        own += &format!(", {:.0} % of them in the chat template", job.recipe.chat_share * 100.0);
    }
    if files.is_empty() { own } else { format!("{own}, the rest from {}", files.join(", ")) }
}

/// Warnings for the user about a result of this kind.
fn advice(sparsity: f64, q: &Quality, output_arch: Family, deci_biases: bool) -> Vec<String> {
    let mut out = Vec::new();
    if sparsity >= 0.4 {
        out.push(format!(
            "{:.0} % pruned without training afterwards is a start for fine-tuning or a simple task, not a chat model; \
             10 to 25 % is what keeps answers usable",
            sparsity * 100.0
        ));
    }
    if q.held_out.ppl > 2.0 * q.held_out.base_ppl {
        out.push("perplexity more than doubled: compare with a smaller quant or a smaller model before you ship this".into());
    }
    let since = match output_arch {
        // Biases of Q, K and V need llama.cpp's pull request 21245.
        Family::Deci if deci_biases => Some("llama.cpp since April 2026 and Ollama since 0.30"),
        Family::Deci | Family::OpenElm => Some("llama.cpp since March 2025 and Ollama since 0.9.3"),
        Family::Step35 => Some("llama.cpp since February 2026 and Ollama since 0.30"),
        _ => None,
    };
    if let Some(since) = since {
        let name = output_arch.name();
        out.push(format!(
            "the file is of architecture {name}, in which blocks may differ in size, for {since}"
        ));
    }
    out
}
