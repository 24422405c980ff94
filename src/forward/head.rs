//! Output head: logits, and values that are computed from them without keeping them.

use super::MAX_NODES;
use super::{Forward, ForwardError, Net};
use crate::ggml::{Graph, Resident, TensorId, TensorSpec, Token, Values};
use crate::model::{Matrix, Model};
use crate::numeric::{draw, nll};
use crate::parallel::each;
use rayon::prelude::*;
use std::cmp::Ordering;

/// Number of positions whose logits are in memory at a time.
pub(crate) const LOGIT_ROWS: usize = 128;

/// Largest vocabulary whose logits several threads compute at a time, each for its own positions.
const SMALL_VOCAB: usize = 1 << 14;

/// Last norm and output matrix on the backend.
pub struct Head {
    /// Weight of the norm, output matrix, and bias of the norm.
    pub(super) set: Resident,
    has_bias: bool,
    n_vocab: usize,
}

impl Head {
    /// Number of logits per position: the size of the vocabulary, or the number of requested tokens.
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

    /// Puts the output head of `model` for `tokens` only on the backend: its logits are those of `tokens`,
    /// in that order.
    ///
    /// # Errors
    /// [`ForwardError`] if it cannot be read or there is no room.
    ///
    /// # Panics
    /// If a token is not in the vocabulary.
    pub fn head_of(&self, model: &Model, tokens: &[u32]) -> Result<Head, ForwardError> {
        let rows: Vec<usize> = tokens.iter().map(|&t| t as usize).collect();
        self.upload_head(model, model.rows(&model.output, &rows)?)
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
    /// `[n_tokens, n_embd]` and the index of the first of them, until all are done.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn logits(
        &self,
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
            g.compute(&self.engine)?.read(y, &mut buffer);
            f(i * LOGIT_ROWS, &buffer);
        }
        Ok(())
    }

    /// Results of `f` for the logits `[n_vocab]` of each position of `x` `[n_tokens, n_embd]`; `f` also gets
    /// the position.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn of_logits<T: Send>(
        &self,
        head: &Head,
        x: &[f32],
        f: impl Fn(usize, &[f32]) -> T + Sync,
    ) -> Result<Vec<T>, ForwardError> {
        // Of a large head, the threads share the product for one part.
        let at_once = if head.n_vocab > SMALL_VOCAB { 1 } else { self.at_once() };
        let parts = x.chunks(LOGIT_ROWS * self.n_embd()).enumerate().collect();
        let found = each(parts, at_once, |(i, rows)| {
            let mut out = Vec::with_capacity(LOGIT_ROWS);
            self.logits(head, rows, |_, logits| {
                let rows = logits.par_chunks(head.n_vocab).enumerate();
                out.par_extend(rows.map(|(row, logits)| f(i * LOGIT_ROWS + row, logits)));
            })?;
            Ok::<_, ForwardError>(out)
        })?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Negative log-likelihood, in nats, of `targets[i]` at position i of `x` `[n_tokens, n_embd]`.
    /// The result leaves out positions whose target is `None`.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn nll(&self, head: &Head, x: &[f32], targets: &[Option<Token>]) -> Result<Vec<f64>, ForwardError> {
        let found = self.of_logits(head, x, |i, row| targets[i].map(|t| nll(row, t as usize)))?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Top `n` tokens by logit at each position of `x` `[n_tokens, n_embd]`, in no order; all tokens if
    /// there are fewer.
    /// Ties go to the lower token id.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn likeliest(&self, head: &Head, x: &[f32], n: usize) -> Result<Vec<Vec<u32>>, ForwardError> {
        self.of_logits(head, x, |_, row| likeliest(row, n))
    }

    /// Samples a token for each position of `x` `[n_tokens, n_embd]` from its prediction, at the quantile
    /// `at[i]`, 0 ≤ `at[i]` < 1.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn draw(&self, head: &Head, x: &[f32], at: &[f64]) -> Result<Vec<Token>, ForwardError> {
        self.of_logits(head, x, |i, row| draw(row, 1.0, f32::INFINITY, at[i]).0 as Token)
    }
}

/// Tokens of the `n` largest logits of a row.
fn likeliest(row: &[f32], n: usize) -> Vec<u32> {
    let tokens = 0..row.len() as u32;
    if n >= row.len() {
        return tokens.collect();
    }
    let mut sorted = row.to_vec();
    let (above, least, _) = sorted.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a));
    let least = *least;
    let n_above = above.iter().filter(|v| v.total_cmp(&least).is_gt()).count();
    let at = |order: Ordering| tokens.clone().filter(move |&t| row[t as usize].total_cmp(&least) == order);
    at(Ordering::Greater).chain(at(Ordering::Equal).take(n - n_above)).collect()
}

impl Net {
    /// Logits of the normed residual stream `h`.
    pub(super) fn logits<'a>(&self, g: &mut Graph<'a>, head: &'a Head, h: TensorId) -> TensorId {
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

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn likeliest_tokens_are_the_first_when_sorted() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for (n_vocab, levels) in [(1, 9), (7, 2), (64, 1000), (500, 20), (3000, 100_000)] {
            // Few levels give many ties.
            let row: Vec<f32> = (0..n_vocab).map(|_| rng.random_range(0..levels) as f32 - 5.0).collect();
            let mut sorted: Vec<u32> = (0..n_vocab as u32).collect();
            sorted.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
            for n in [1, 2, 64, n_vocab] {
                let mut found = likeliest(&row, n);
                let mut expected = sorted[..n.min(n_vocab)].to_vec();
                found.sort_unstable();
                expected.sort_unstable();
                assert_eq!(found, expected, "{n} of {n_vocab}");
            }
        }
    }
}
