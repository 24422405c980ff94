//! The output head: logits, and what is computed from them without keeping them.

use super::block::MAX_NODES;
use super::{Forward, ForwardError, Net};
use crate::ggml::{Graph, Resident, T, TensorSpec, Token, Values};
use crate::model::{Matrix, Model};
use crate::numeric::{draw, nll};
use rayon::prelude::*;

/// Positions whose logits are in memory at a time.
pub(crate) const LOGIT_ROWS: usize = 128;

/// The last norm and the output matrix on the backend.
pub struct Head {
    /// Weight of the norm, output matrix, and the norm's bias.
    pub(super) set: Resident,
    has_bias: bool,
    n_vocab: usize,
}

impl Head {
    /// Logits per position: tokens in the vocabulary, or as many as were asked for.
    pub fn n_vocab(&self) -> usize {
        self.n_vocab
    }
}

impl Forward {
    /// Puts the output head of `model` on the backend.
    ///
    /// # Errors
    /// [`ForwardError`] if it cannot be read or there is no room.
    pub fn head(&self, model: &Model) -> Result<Head, ForwardError> {
        self.upload_head(model, model.matrix(&model.output)?)
    }

    /// The output head of `model` as far as it is about `tokens`: its logits are of these, in that order.
    ///
    /// # Errors
    /// [`ForwardError`] if it cannot be read or there is no room.
    ///
    /// # Panics
    /// If one is not in the vocabulary.
    pub fn head_of(&self, model: &Model, tokens: &[u32]) -> Result<Head, ForwardError> {
        let rows: Vec<usize> = tokens.iter().map(|&t| t as usize).collect();
        // The whole matrix goes before the backend takes its part.
        let part = model.matrix(&model.output)?.select_rows(&rows);
        self.upload_head(model, part)
    }

    fn upload_head(&self, model: &Model, output: Matrix) -> Result<Head, ForwardError> {
        let norm = model.vector(&model.output_norm)?;
        let bias = model.output_norm_bias.as_ref().map(|b| model.vector(b)).transpose()?;
        let mut specs = vec![
            TensorSpec { ne: [norm.len(), 1], data: Values::Copied(&norm) },
            TensorSpec { ne: [output.n_in, output.n_out], data: Values::Shared(output.data) },
        ];
        specs.extend(bias.as_ref().map(|b| TensorSpec { ne: [b.len(), 1], data: Values::Copied(b) }));
        let set = Resident::upload(&self.engine, &specs)?;
        Ok(Head { set, has_bias: bias.is_some(), n_vocab: output.n_out })
    }

    /// Calls `f` with the logits `[n, n_vocab]` of up to 128 consecutive positions of `x`
    /// `[n_tokens, n_embd]` and the number of the first of them, until all are done.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn logits(
        &mut self,
        head: &Head,
        x: &[f32],
        mut f: impl FnMut(usize, &[f32]),
    ) -> Result<(), ForwardError> {
        let n_embd = self.n_embd();
        let mut buffer = Vec::new();
        for (i, rows) in x.chunks(LOGIT_ROWS * n_embd).enumerate() {
            let mut g = Graph::new(&self.engine, MAX_NODES);
            let h = g.input_f32([n_embd, rows.len() / n_embd], rows);
            let h = self.net.normed(&mut g, h);
            let y = self.net.logits(&mut g, head, h);
            g.output(y);
            buffer.resize(rows.len() / n_embd * head.n_vocab, 0.0);
            g.compute(&mut self.engine)?.read(y, &mut buffer);
            f(i * LOGIT_ROWS, &buffer);
        }
        Ok(())
    }

    /// Negative log-likelihood of `targets[i]` at position i of `x`; positions whose target is
    /// `None` are left out of the result.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn nll(
        &mut self,
        head: &Head,
        x: &[f32],
        targets: &[Option<Token>],
    ) -> Result<Vec<f64>, ForwardError> {
        let mut out = Vec::with_capacity(targets.len());
        let n_vocab = head.n_vocab;
        self.logits(head, x, |start, logits| {
            let chunk: Vec<_> = logits
                .par_chunks(n_vocab)
                .zip(&targets[start..])
                .filter_map(|(row, t)| t.map(|t| nll(row, t as usize)))
                .collect();
            out.extend(chunk);
        })?;
        Ok(out)
    }

    /// A token for each position of `x`, drawn from its prediction: that at `at[i]`, 0 ≤ `at[i]` < 1, of all tokens in line.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn draw(&mut self, head: &Head, x: &[f32], at: &[f64]) -> Result<Vec<Token>, ForwardError> {
        let mut out = Vec::with_capacity(at.len());
        self.logits(head, x, |start, logits| {
            let rows = logits.par_chunks(head.n_vocab).zip(&at[start..]);
            out.par_extend(rows.map(|(row, &at)| draw(row, 1.0, f32::INFINITY, at).0 as Token));
        })?;
        Ok(out)
    }
}

impl Net {
    /// Logits of the normed stream `h`.
    pub(super) fn logits<'a>(&self, g: &mut Graph<'a>, head: &'a Head, h: T) -> T {
        let w = g.resident(&head.set, 0);
        let mut h = g.mul(h, w);
        if head.has_bias {
            let bias = g.resident(&head.set, 2);
            h = g.add(h, bias);
        }
        let w = g.resident(&head.set, 1);
        let y = g.mul_mat(w, h);
        let mut y = self.scaled(g, y, self.hparams.logit_scale);
        if let Some(cap) = self.hparams.softcap {
            y = g.scale(y, 1.0 / cap, 0.0);
            y = g.tanh(y);
            y = g.scale(y, cap, 0.0);
        }
        y
    }
}
