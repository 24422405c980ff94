//! Result of a job on a mixture: writing, verification, advice.

use super::super::output::{finish, finish_parts, outputs, temporary};
use super::super::quant_baselines::quant_baselines;
use super::super::result::samples;
use super::super::{Job, JobError, Outcome, Quality, Running, with_causes};
use super::plan::{run_ctx, size, size_with};
use super::{ExpertsOutcome, Prepared, Pruned};
use crate::assemble::{ExpertPlan, Provenance, assemble_experts, slice_imatrix};
use crate::evaluate::{self, Protocol};
use crate::ggml::{LlamaModel, Token, run_memory};
use crate::gguf::Value;
use crate::job::prepared::llama_mapped_if_large;
use crate::numeric::Metrics;
use crate::observe::Usage;
use crate::pipeline::Observer;
use crate::pipeline::experts::TextQuality;
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

/// Quality of a result on the held-out windows.
struct Judged {
    metrics: Metrics,
    texts: Vec<TextQuality>,
    /// Perplexity of the written file; absent if it was not verified.
    file_ppl: Option<f64>,
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
        let before = size(mixture);
        let mut after = size_with(job, mixture, pruned.amount);
        let sparsity = 1.0 - after.block_params as f64 / before.block_params as f64;
        let first: &[Token] = self.held_out().next().unwrap_or_default();
        let provenance = provenance(
            job,
            self.source_sha256.clone(),
            sparsity,
            &pruned.criterion,
            pruned.amount.n_expert(mixture),
            first[..(pruned.losses.len() + 1).min(first.len())].to_vec(),
            pruned.losses.iter().map(|l| *l as f32).collect(),
        );
        let plan = ExpertPlan {
            layers: pruned.mask,
            n_keep: pruned.amount.n_expert(mixture),
            drop_drafts: job.settings.experts.drop_drafts,
            narrowed: pruned.narrowed,
        };
        // Beside their names until the model is verified.
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
        let judged = self.judged(job, temp.path(), pruned.metrics, pruned.texts, observer)?;
        let samples = job.samples.then(|| samples(job, temp.path(), first));
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
        after.bytes = match &outputs[..] {
            [output] => finish(job, temp, output)?,
            parts => finish_parts(job, temp, parts)?,
        };
        let output = outputs[0].clone();
        let mut warnings = pruned.notes;
        warnings.extend(self.notes.iter().cloned());
        let windows: Vec<&[Token]> = self.held_out().collect();
        let compared = job.compare_quant.then(|| {
            let source = (job.input.as_path(), mixture.file.n_bytes());
            quant_baselines(job, source, &[], &windows, (&output, after.bytes), observer)
        });
        let quant_baselines = compared.transpose().unwrap_or_else(|e| {
            warnings.push(format!("not compared with quantisation baselines: {}", with_causes(&e)));
            None
        });
        let metrics = judged.metrics;
        warnings.extend(advice(judged.file_ppl.unwrap_or(metrics.ppl) / metrics.base_ppl));
        let n_tokens = |windows: &mut dyn Iterator<Item = &Vec<Token>>| windows.map(Vec::len).sum::<usize>();
        let fitted = match job.stats_in {
            Some(_) => 0,
            None => n_tokens(&mut self.texts.iter().flat_map(|t| &t.fit)),
        };
        let experts = ExpertsOutcome {
            n_expert: mixture.n_expert,
            n_keep: plan.n_keep,
            n_used: mixture.n_used,
            criterion: pruned.criterion,
            steps: pruned.steps,
            texts: judged.texts,
            usage,
            kept: plan.layers.iter().map(|(l, mask)| (*l, mask.kept_experts())).collect(),
        };
        Ok(Outcome {
            kept_groups: before.blocks.iter().map(|b| (0..b.n_head_kv).collect()).collect(),
            before,
            after,
            output_arch: mixture.arch.clone(),
            sparsity,
            ffn_unit: job.settings.moe_unit,
            running,
            quality: Some(Quality {
                held_out: metrics,
                file_ppl: judged.file_ppl,
                fit_tokens: (fitted, if job.recipe.files.is_empty() { fitted } else { 0 }),
                held_out_tokens: n_tokens(&mut self.texts.iter().flat_map(|t| &t.held_out)),
            }),
            output,
            block_losses: None,
            provenance: Some(provenance),
            samples,
            quant_baselines: quant_baselines.unwrap_or_default(),
            forecast: None,
            experts: Some(experts),
            warnings,
            time: start.elapsed(),
        })
    }

    /// Held-out windows of all texts.
    fn held_out(&self) -> impl Iterator<Item = &[Token]> {
        self.texts.iter().flat_map(|t| t.held_out.iter().map(Vec::as_slice))
    }

    /// Judges the written file by libllama.
    /// `masked` and `texts` are what the masked source predicts, with which the file has to agree. Without
    /// them, the file itself is compared with the source.
    fn judged(
        &self,
        job: &Job,
        file: &Path,
        masked: Option<Metrics>,
        texts: Vec<TextQuality>,
        observer: &mut dyn Observer,
    ) -> Result<Judged, JobError> {
        if let Some(metrics) = masked
            && !job.verify
        {
            return Ok(Judged { metrics, texts, file_ppl: None });
        }
        let windows: Vec<&[Token]> = self.held_out().collect();
        observer.stage("verify", windows.len());
        let bytes = file.metadata().map_or(0, |m| m.len());
        let written = llama_mapped_if_large(job, file, bytes).map_err(JobError::does_not_load)?;
        let mut n_done = 0;
        let mut judge = |base: Option<&LlamaModel>, windows: &[&[Token]]| {
            let before = n_done;
            n_done += windows.len();
            let told = |done, ppl| {
                observer.step(before + done, &format!("perplexity {ppl:.4}"));
                !observer.interrupted()
            };
            let found =
                evaluate::evaluate(&written, base, windows, Protocol::Hf, job.settings.n_threads, told)
                    .map_err(|source| JobError::evaluating(&job.output, source))?;
            if observer.interrupted() { Err(JobError::Interrupted) } else { Ok(found) }
        };
        let Some(metrics) = masked else {
            let base = Some(&self.llama);
            let metrics = judge(base, &windows)?.compared.expect("it was compared with the source");
            let mut texts = Vec::new();
            for t in &self.texts {
                let windows: Vec<&[Token]> = t.held_out.iter().map(Vec::as_slice).collect();
                // One text is all of them.
                let metrics = match self.texts.len() {
                    1 => metrics,
                    _ => judge(base, &windows)?.compared.expect("as above"),
                };
                texts.push(TextQuality { name: t.name.clone(), metrics });
            }
            texts.sort_by(|a, b| b.metrics.kl.mean.total_cmp(&a.metrics.kl.mean));
            return Ok(Judged { metrics, texts, file_ppl: Some(metrics.ppl) });
        };
        let ppl = judge(None, &windows)?.ppl;
        let n_tokens: usize = windows.iter().map(|w| w.len()).sum();
        let bound = PARITY.ln() + 1.0 / (n_tokens as f64).sqrt();
        // The routing of grovemoe's chunks depends on the numbers of experts, which change.
        let agrees = (ppl / metrics.ppl).ln().abs() <= bound || (self.mixture.chunk > 1 && ppl.is_finite());
        if !agrees {
            return Err(JobError::Disagrees { file: ppl, own: metrics.ppl });
        }
        Ok(Judged { metrics, texts, file_ppl: Some(ppl) })
    }
}

/// Warnings about a result whose perplexity is `times` that of the source.
fn advice(times: f64) -> Option<String> {
    (times > 2.0).then(|| {
        "perplexity more than doubled: compare with a smaller quant or a smaller model before you ship this".into()
    })
}
