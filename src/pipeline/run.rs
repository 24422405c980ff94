//! State that the stages of a run share.

use super::sensitivity::Sensitivity;
use super::stream::{Streams, planned_stream};
use super::{Checkpoint, HeldOut, Observer, Plan, PruneError, Pruned, Settings, allocation, forward};
use crate::calibrate::Windows;
use crate::forward::{Forward, ForwardError, Head, LOGIT_ROWS};
use crate::gguf::Value;
use crate::model::Model;
use crate::numeric::{RowComparison, compare_rows};
use crate::prune::{Budget, NeuronCriterion};
use rayon::prelude::*;
use std::sync::Arc;

/// State of one run.
pub(super) struct Run<'a> {
    pub(super) model: &'a Model,
    /// Model that the result is fitted to.
    pub(super) reference: &'a Model,
    /// Calibration windows.
    pub(super) windows: &'a Windows,
    /// Windows that blocks are fitted to, including resampled copies, and the same held-out windows as in
    /// `windows`.
    pub(super) fitted: Arc<Windows>,
    pub(super) settings: &'a Settings,
    pub(super) checkpoint: &'a mut dyn Checkpoint,
    pub(super) observer: &'a mut dyn Observer,
    pub(super) forward: Forward,
    pub(super) budgets: Vec<Budget>,
    /// Number of attention groups to remove.
    pub(super) n_groups: usize,
    /// Kept parts of the model so far.
    pub(super) plan: Plan,
    /// Curvature samples, as long as neurons are chosen.
    pub(super) sensitivity: Option<Sensitivity>,
    /// Number of FFN units that are kept, per block.
    pub(super) widths: Vec<usize>,
    pub(super) criterion: NeuronCriterion,
    /// Whether an earlier run settled everything that blocks depend on, so that its blocks can be reused.
    pub(super) blocks_resume: bool,
    /// Residual streams after the last block.
    pub(super) streams: Option<Streams>,
    pub(super) held_out: Option<HeldOut>,
    pub(super) block_losses: Option<Vec<f64>>,
    /// Negative log-likelihoods of the tokens of the first held-out window, in nats.
    pub(super) losses: Vec<f64>,
    pub(super) dense_window_nll: Vec<f64>,
    /// Keys and values that the stages add to the `putri.*` metadata of the output.
    pub(super) provenance: Vec<(&'static str, Value)>,
    pub(super) warnings: Vec<String>,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        model: &'a Model,
        reference: &'a Model,
        windows: &'a Windows,
        settings: &'a Settings,
        budgets: Vec<Budget>,
        checkpoint: &'a mut dyn Checkpoint,
        observer: &'a mut dyn Observer,
    ) -> Result<Run<'a>, PruneError> {
        Ok(Run {
            forward: forward(model, windows.n_ctx, settings)?,
            model,
            reference,
            windows,
            fitted: Arc::new(windows.clone()),
            settings,
            checkpoint,
            observer,
            n_groups: allocation::groups_to_remove(model, &budgets, settings),
            budgets,
            plan: Plan { output_archs: settings.output_archs(model), ..Plan::whole(model) },
            sensitivity: None,
            widths: Vec::new(),
            criterion: NeuronCriterion::Obs,
            blocks_resume: true,
            streams: None,
            held_out: None,
            block_losses: None,
            losses: Vec::new(),
            dense_window_nll: Vec::new(),
            provenance: Vec::new(),
            warnings: Vec::new(),
        })
    }

    /// Result of the stages.
    ///
    /// # Panics
    /// If no stage compared the result with the dense model.
    pub(super) fn finish(self) -> Pruned {
        Pruned {
            plan: self.plan,
            held_out: self.held_out.expect("the last stage of a method judges"),
            losses: self.losses,
            dense_window_nll: self.dense_window_nll,
            block_losses: self.block_losses,
            provenance: self.provenance,
            warnings: self.warnings,
        }
    }

    /// Whether graphs of the reference are those of the model, with other weights.
    pub(super) fn computes_alike(&self) -> bool {
        let [own, source] = [self.model, self.reference].map(|m| &m.hparams);
        own.family == source.family && own.blocks[0].n_head == source.blocks[0].n_head
    }

    pub(super) fn check_interrupted(&self) -> Result<(), PruneError> {
        if self.observer.interrupted() { Err(PruneError::Interrupted) } else { Ok(()) }
    }

    /// Applies `head` to the model and, if the result is fitted to another model, to that one.
    pub(super) fn output_heads(
        &self,
        head: impl Fn(&Model) -> Result<Head, ForwardError>,
    ) -> Result<(Head, Option<Head>), ForwardError> {
        let same = std::ptr::eq(self.model, self.reference);
        let reference = if same { None } else { Some(head(self.reference)?) };
        Ok((head(self.model)?, reference))
    }

    /// Compares the final residual streams of the held-out windows, dense and pruned, each `[n_tokens,
    /// n_embd]`.
    pub(super) fn judge(&mut self, [dense, pruned]: [&[f32]; 2]) -> Result<(), PruneError> {
        let w = self.windows;
        let (own, base) = self.output_heads(|model| self.forward.head(model))?;
        let targets = w.targets(w.n_fit..w.n_windows());
        let mut rows: Vec<RowComparison> = Vec::with_capacity(targets.len());
        let n = LOGIT_ROWS * self.forward.n_embd();
        let (mut p, n_vocab) = (Vec::new(), own.n_vocab());
        for ((pruned, dense), targets) in
            pruned.chunks(n).zip(dense.chunks(n)).zip(targets.chunks(LOGIT_ROWS))
        {
            self.forward.logits(base.as_ref().unwrap_or(&own), dense, |_, logits| {
                p.clear();
                p.extend_from_slice(logits);
            })?;
            self.forward.logits(&own, pruned, |_, q| {
                let compared = q.par_chunks(n_vocab).zip(p.par_chunks(n_vocab)).zip(targets);
                rows.par_extend(compared.filter_map(|((q, p), t)| t.map(|t| compare_rows(q, p, t as usize))));
            })?;
        }
        let mean_nll =
            |window: &[RowComparison]| window.iter().map(|r| r.base_nll).sum::<f64>() / window.len() as f64;
        self.dense_window_nll = rows.chunks(w.n_ctx - 1).map(mean_nll).collect();
        self.losses = if self.settings.devices.is_empty() {
            rows[..w.n_ctx - 1].iter().map(|r| r.nll).collect()
        } else {
            self.losses_on_cpu()?
        };
        self.held_out = Some(HeldOut::of(&rows));
        Ok(())
    }

    /// Losses of the first held-out window's tokens on the CPU, which every machine reproduces.
    /// Devices may round to 16 bits.
    fn losses_on_cpu(&self) -> Result<Vec<f64>, PruneError> {
        let (w, model) = (self.windows, self.model);
        let first = w.n_fit..w.n_fit + 1;
        let tokens = w.tokens_of(first.clone());
        let forward = Forward::new(model, w.n_ctx, self.settings.n_threads)?;
        let last = planned_stream(&forward, model, &self.plan, tokens, &*self.observer, |_| Ok(()))?;
        let head = forward.head(model)?;
        Ok(forward.nll(&head, &last, &w.targets(first))?)
    }
}
