//! Trial of a choice of experts, before anything is written, and its refinement.

use super::{Source, check};
use crate::ggml::Token;
use crate::numeric::{Metrics, RowComparison};
use crate::observe::{Mask, Masked, ObserveError, Reference};
use crate::pipeline::{Observer, PruneError};

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
    pub(super) source: Source<'a>,
    pub(super) model: Masked<'a>,
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

impl From<ObserveError> for PruneError {
    fn from(e: ObserveError) -> PruneError {
        match e {
            ObserveError::Interrupted => PruneError::Interrupted,
            other => PruneError::Observe(other),
        }
    }
}
