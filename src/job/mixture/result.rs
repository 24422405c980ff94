//! Result of a job on a mixture: writing, verification, advice.

use super::super::output::{finish, finish_parts, outputs, temporary};
use super::super::quant_baselines::quant_baselines;
use super::super::result::samples;
use super::super::{Job, JobError, Outcome, Quality, Running, with_causes};
use super::plan::{run_ctx, size, size_with};
use super::{ExpertsOutcome, Prepared, Pruned};
use crate::assemble::{ExpertPlan, Provenance, assemble_experts, slice_imatrix};
use crate::evaluate::{self, Protocol};
use crate::ggml::{Token, run_memory};
use crate::gguf::Value;
use crate::job::prepared::llama_mapped_if_large;

use crate::model::FfnUnit;
use crate::observe::Usage;
use crate::pipeline::Observer;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

/// Largest ratio of the written file's perplexity to that of the masked source. Both are computed by the same
/// kernels, but a router may decide otherwise on equal scores.
const PARITY: f64 = 1.02;

/// Provenance of a result in which each layer keeps `n_keep` experts.
pub(super) fn provenance(
    job: &Job,
    source_sha256: String,
    sparsity_reached: f64,
    criterion: &str,
    n_keep: usize,
    check_tokens: Vec<Token>,
    check_nll: Vec<f32>,
) -> Provenance {
    Provenance {
        source_sha256,
        sparsity: job.settings.sparsity,
        sparsity_reached,
        method: "experts".into(),
        calibration: calibration(job),
        seed: job.recipe.seed,
        stages: vec![
            ("experts.criterion", Value::Str(criterion.into())),
            ("experts.count", Value::U32(n_keep as u32)),
        ],
        check_tokens,
        check_nll,
        check_exact: false,
    }
}

/// Description of the calibration text.
fn calibration(job: &Job) -> String {
    if let Some(path) = &job.stats_in {
        return format!("statistics of {}", path.file_name().unwrap_or_default().to_string_lossy());
    }
    let r = &job.recipe;
    let files: Vec<_> =
        r.files.iter().map(|f| f.file_name().unwrap_or_default().to_string_lossy().into_owned()).collect();
    let own = format!("{} windows of {} tokens", r.n_windows, r.n_ctx);
    let from = if files.is_empty() { "self-generated".into() } else { files.join(", ") };
    format!("{own}: {from}")
}

impl Prepared {
    /// Writes, verifies and describes the result.
    pub(super) fn write(
        &self,
        job: &Job,
        pruned: Pruned,
        usage: Usage,
        start: Instant,
        observer: &mut dyn Observer,
    ) -> Result<Outcome, JobError> {
        let mixture = &self.mixture;
        let (before, mut after) = (size(mixture), size_with(job, mixture, pruned.n_keep));
        let sparsity = 1.0 - after.block_params as f64 / before.block_params as f64;
        let held_out: Vec<&[Token]> =
            self.texts.iter().flat_map(|t| t.held_out.iter().map(Vec::as_slice)).collect();
        let n_checked = pruned.losses.len();
        let provenance = provenance(
            job,
            self.source_sha256.clone(),
            sparsity,
            &pruned.criterion,
            pruned.n_keep,
            held_out[0][..(n_checked + 1).min(held_out[0].len())].to_vec(),
            pruned.losses.iter().map(|l| *l as f32).collect(),
        );
        let drop_drafts = job.settings.experts.drop_drafts;
        let plan = ExpertPlan { layers: pruned.mask, n_keep: pruned.n_keep, drop_drafts };
        let imatrix = match (&job.imatrix_in, &job.imatrix_out) {
            (Some(from), Some(to)) => {
                let temp = temporary(to)?;
                slice_imatrix(from, mixture, &plan, &mut BufWriter::new(temp.as_file()), to)?;
                Some((to, temp))
            }
            _ => None,
        };
        observer.stage("write", 1);
        let temp = temporary(&job.output)?;
        let mut out = BufWriter::with_capacity(1 << 20, temp.as_file());
        assemble_experts(mixture, &plan, &provenance, &mut out, &job.output)?;
        out.flush().map_err(|source| JobError::Io { path: job.output.clone(), source })?;
        drop(out);
        observer.step(1, "");
        let file_ppl = job
            .verify
            .then(|| self.verified(job, temp.path(), &held_out, pruned.metrics.ppl, observer))
            .transpose()?;
        let samples = job.samples.then(|| samples(job, temp.path(), held_out[0]));
        let samples = samples.transpose().map_err(JobError::does_not_load)?;
        let n_ctx = run_ctx(job, mixture);
        let running = self.to_run.zip(run_memory(temp.path(), n_ctx).ok()).map(|(before, after)| Running {
            n_ctx,
            n_ctx_train: n_ctx,
            before,
            after,
            kv_caches: None,
        });
        if observer.interrupted() {
            return Err(JobError::Interrupted);
        }
        if let Some((path, temp)) = imatrix {
            finish(job, temp, path)?;
        }
        let outputs = outputs(job, &mixture.file);
        let bytes = match &outputs[..] {
            [output] => finish(job, temp, output)?,
            parts => finish_parts(job, temp, parts)?,
        };
        after.bytes = bytes;
        let output = outputs[0].clone();
        let mut warnings = pruned.notes;
        warnings.extend(self.notes.iter().cloned());
        let compared = job.compare_quant.then(|| {
            let source = (job.input.as_path(), mixture.file.n_bytes());
            quant_baselines(job, source, &[], &held_out, (&output, bytes), observer)
        });
        let quant_baselines = compared.transpose().unwrap_or_else(|e| {
            warnings.push(format!("not compared with quantisation baselines: {}", with_causes(&e)));
            None
        });
        warnings.extend(advice(pruned.metrics.ppl / pruned.metrics.base_ppl));
        let n_tokens = |windows: fn(&crate::calibrate::Text) -> &Vec<Vec<Token>>| -> usize {
            self.texts.iter().flat_map(windows).map(Vec::len).sum()
        };
        let kept_groups = before.blocks.iter().map(|b| (0..b.n_head_kv).collect()).collect();
        let kept = plan.layers.iter().map(|(l, mask)| (*l, mask.kept_experts())).collect();
        let fitted = if job.stats_in.is_some() { 0 } else { n_tokens(|t| &t.fit) };
        Ok(Outcome {
            before,
            after,
            output_arch: mixture.arch.clone(),
            sparsity,
            ffn_unit: FfnUnit::Expert,
            running,
            quality: Some(Quality {
                held_out: pruned.metrics,
                file_ppl,
                fit_tokens: (fitted, if job.recipe.files.is_empty() { fitted } else { 0 }),
                held_out_tokens: n_tokens(|t| &t.held_out),
            }),
            output,
            kept_groups,
            block_losses: None,
            provenance: Some(provenance),
            samples,
            quant_baselines: quant_baselines.unwrap_or_default(),
            forecast: None,
            experts: Some(ExpertsOutcome {
                n_expert: mixture.n_expert,
                n_keep: pruned.n_keep,
                n_used: mixture.n_used,
                criterion: pruned.criterion,
                steps: pruned.steps,
                texts: pruned.texts,
                usage,
                kept,
            }),
            warnings,
            time: start.elapsed(),
        })
    }

    /// Checks that libllama loads the written file and agrees with `own`, the perplexity of the masked source.
    /// Returns its perplexity.
    fn verified(
        &self,
        job: &Job,
        file: &Path,
        held_out: &[&[Token]],
        own: f64,
        observer: &mut dyn Observer,
    ) -> Result<f64, JobError> {
        observer.stage("verify", held_out.len());
        let bytes = file.metadata().map_or(0, |m| m.len());
        let written = llama_mapped_if_large(job, file, bytes).map_err(JobError::does_not_load)?;
        let told = |done, ppl| {
            observer.step(done, &format!("perplexity {ppl:.4}"));
            !observer.interrupted()
        };
        let ppl = evaluate::evaluate(&written, None, held_out, Protocol::Hf, job.settings.n_threads, told)
            .map_err(|source| JobError::evaluating(&job.output, source))?
            .ppl;
        if observer.interrupted() {
            return Err(JobError::Interrupted);
        }
        let n_tokens: usize = held_out.iter().map(|w| w.len()).sum();
        let bound = PARITY.ln() + 1.0 / (n_tokens as f64).sqrt();
        // The routing of grovemoe's chunks depends on the numbers of experts, which change.
        let agrees = (ppl / own).ln().abs() <= bound || (self.mixture.chunk > 1 && ppl.is_finite());
        if agrees { Ok(ppl) } else { Err(JobError::Disagrees { file: ppl, own }) }
    }
}

/// Warnings about a result whose perplexity is `times` that of the source.
fn advice(times: f64) -> Option<String> {
    (times > 2.0).then(|| {
        "perplexity more than doubled: compare with a smaller quant or a smaller model before you ship this".into()
    })
}
