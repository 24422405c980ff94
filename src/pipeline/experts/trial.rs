//! Trial of a choice of experts, before anything is written, and its refinement.

use super::repair::refit_routers;
use super::{Choice, ExpertSettings, STATISTICS, Source, check};
use crate::ggml::Token;
use crate::numeric::{Metrics, RowComparison};
use crate::observe::{LayerOutputs, Mask, Masked, ObserveError, Outputs, Reference, can_observe_outputs};
use crate::pipeline::{Checkpoint, Observer, PruneError};
use crate::prune;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// Quality of the pruned model on the held-out windows of one text.
#[derive(Clone, Debug)]
pub struct TextQuality {
    /// Name of the text.
    pub name: String,
    /// Comparison with the source.
    pub metrics: Metrics,
}

/// A source on which choices of experts are tried.
pub struct Trial<'a> {
    source: Source<'a>,
    model: Masked<'a>,
    held_out: Reference,
    /// Text of each held-out window.
    text_of: Vec<usize>,
}

impl<'a> Trial<'a> {
    /// Records the source's predictions on the held-out windows.
    ///
    /// # Errors
    /// [`PruneError`] if libllama fails.
    pub fn new(source: Source<'a>) -> Result<Trial<'a>, PruneError> {
        let mut model = Masked::new(source.llama, source.n_ctx(), source.n_threads)?;
        let held_out =
            source.texts.iter().enumerate().flat_map(|(i, t)| t.held_out.iter().map(move |w| (i, w)));
        let (text_of, windows): (Vec<usize>, Vec<&[Token]>) =
            held_out.map(|(i, w)| (i, w.as_slice())).unzip();
        let held_out = Reference::new(&mut model, &windows)?;
        Ok(Trial { source, model, held_out, text_of })
    }

    /// Mean KL divergence of the model under `mask` from the source on the held-out windows, in nats.
    ///
    /// # Errors
    /// [`PruneError`] if libllama fails or the observer interrupts.
    pub fn divergence(&mut self, mask: &Mask, observer: &dyn Observer) -> Result<f64, PruneError> {
        Ok(self.held_out.divergence(&mut self.model, mask, &mut || !observer.interrupted())?)
    }

    /// Improves `choice` as far as `settings` allow. A step whose result is worse on the held-out windows is
    /// undone.
    ///
    /// # Errors
    /// [`PruneError`] if libllama fails or the observer interrupts.
    pub fn improve(
        &mut self,
        choice: &Choice,
        settings: &ExpertSettings,
        _checkpoint: &mut dyn Checkpoint,
        observer: &mut dyn Observer,
    ) -> Result<Improved, PruneError> {
        let mut best = self.divergence(&choice.mask, observer)?;
        let mut steps = vec![Step { name: STATISTICS, kl_divergence: best, kept: true }];
        let mut mask = choice.mask.clone();
        if settings.refine > 0 && can_observe_outputs(self.source.mixture) {
            let next = self.by_outputs(choice, settings.refine, observer)?;
            let found = self.divergence(&next, observer)?;
            steps.push(Step { name: "outputs", kl_divergence: found, kept: found < best });
            if found < best {
                (mask, best) = (next, found);
            }
        }
        if settings.repair > 0 {
            let next = refit_routers(self.source, &mask, settings.repair, observer)?;
            let found = self.divergence(&next, observer)?;
            steps.push(Step { name: "routers", kl_divergence: found, kept: found < best });
            if found < best {
                mask = next;
            }
        }
        Ok(Improved { mask, steps, notes: Vec::new() })
    }

    /// Chooses experts by what layers with fewer of them would compute.
    /// The outputs are observed on windows of about `passes` passes over the calibration in all.
    fn by_outputs(
        &mut self,
        choice: &Choice,
        passes: usize,
        observer: &mut dyn Observer,
    ) -> Result<Mask, PruneError> {
        let source = self.source;
        let mixture = source.mixture;
        let windows: Vec<&[Token]> =
            source.texts.iter().flat_map(|t| t.fit.iter().map(Vec::as_slice)).collect();
        let layers: Vec<usize> = mixture.observed().map(|l| l.block).collect();
        let each = Outputs::n_decodes(mixture.n_expert, mixture.n_used);
        let n = (passes * windows.len() / each).clamp(1, windows.len());
        let windows: Vec<&[Token]> = (0..n).map(|i| windows[i * windows.len() / n]).collect();
        let mut outputs = Outputs::new(source.llama, mixture, source.n_ctx(), source.n_threads)?;
        observer.stage("observe outputs", n);
        let mut all: BTreeMap<usize, LayerOutputs> = BTreeMap::new();
        for (i, window) in windows.iter().enumerate() {
            check(observer)?;
            for (layer, found) in outputs.window(window, &layers, 8)? {
                match all.entry(layer) {
                    Entry::Vacant(e) => drop(e.insert(found)),
                    Entry::Occupied(mut e) => e.get_mut().append(found),
                }
            }
            observer.step(i + 1, "");
        }
        let mut mask = choice.mask.clone();
        for (layer, outputs) in &all {
            let protected = choice.protected.get(layer).map_or(&[][..], Vec::as_slice);
            let kept = prune::eliminate(outputs, choice.units.n_keep, protected);
            let of_layer = mask.get_mut(layer).expect("observed layers are masked");
            of_layer.kept = (0..mixture.n_expert).map(|e| kept.contains(&e)).collect();
        }
        Ok(mask)
    }

    /// Negative log-likelihoods under the model with `mask` of the first `n` tokens of the first held-out
    /// window but the very first, in nats.
    ///
    /// # Errors
    /// [`PruneError`] if libllama fails.
    pub fn losses(&mut self, mask: &Mask, n: usize) -> Result<Vec<f64>, PruneError> {
        self.model.set(mask.clone());
        let window = &self.source.texts.iter().find_map(|t| t.held_out.first()).expect("a held-out window");
        Ok(self.model.losses(&window[..n.min(window.len())])?)
    }

    /// Quality of the model under `mask` on each text, the worst first, and on all together.
    ///
    /// # Errors
    /// [`PruneError`] if libllama fails or the observer interrupts.
    pub fn quality(
        &mut self,
        mask: &Mask,
        observer: &mut dyn Observer,
    ) -> Result<(Vec<TextQuality>, Metrics), PruneError> {
        self.model.set(mask.clone());
        observer.stage("judge", self.held_out.n_windows());
        let mut rows: Vec<Vec<RowComparison>> = vec![Vec::new(); self.source.texts.len()];
        for i in 0..self.held_out.n_windows() {
            check(observer)?;
            rows[self.text_of[i]].extend(self.held_out.compare_window(&mut self.model, i)?);
            observer.step(i + 1, "");
        }
        let all = Metrics::of(&rows.concat());
        let texts = self.source.texts.iter().zip(&rows).filter(|(_, rows)| !rows.is_empty());
        let mut texts: Vec<TextQuality> =
            texts.map(|(t, rows)| TextQuality { name: t.name.clone(), metrics: Metrics::of(rows) }).collect();
        texts.sort_by(|a, b| b.metrics.kl.mean.total_cmp(&a.metrics.kl.mean));
        Ok((texts, all))
    }
}

/// Step of a choice.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What was tried.
    pub name: &'static str,
    /// Mean KL divergence on the held-out windows with it, in nats.
    pub kl_divergence: f64,
    /// Whether its result was kept.
    pub kept: bool,
}

/// Choice after all steps.
#[derive(Clone, Debug)]
pub struct Improved {
    /// What is left of each observed layer.
    pub mask: Mask,
    /// Steps in order.
    pub steps: Vec<Step>,
    /// Notes for the user.
    pub notes: Vec<String>,
}

impl From<ObserveError> for PruneError {
    fn from(e: ObserveError) -> PruneError {
        match e {
            ObserveError::Interrupted => PruneError::Interrupted,
            other => PruneError::Observe(other),
        }
    }
}
