//! Twins of the windows that are fitted on: the same text, with some tokens drawn anew from what the dense model predicts for
//! their places.
//!
//! A fit to a few thousand tokens knows them by heart, and is off on other text, most of all on text of another kind. Twins show
//! it what else could have stood there, and every token that stays sees another past; that costs time, but no
//! text.

use super::stream::embedded;
use super::{PruneError, Run, forward};
use crate::calibrate::Windows;
use crate::forward::{Forward, ForwardError, Head};
use crate::ggml::Token;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

impl Run<'_> {
    /// The windows, with as many twins of each that is fitted on as the settings want, if they want any.
    pub(super) fn twinned(&mut self) -> Result<Option<Windows>, PruneError> {
        let (w, s, n_ctx) = (self.windows, self.settings, self.windows.n_ctx);
        if s.copies() == 1 {
            return Ok(None);
        }
        let n_layer = self.reference.hparams.n_layer();
        // The last step draws.
        self.observer.stage("twins", n_layer + 1);
        let mut forward = forward(self.reference, n_ctx, s)?;
        let text = w.tokens_of(0..w.n_fit);
        let mut stream = embedded(&forward, self.reference, text, &s.shelf)?;
        for il in 0..n_layer {
            self.checkpoint()?;
            let block = forward.upload(&self.reference.block(il)?)?;
            forward.advance(&block, &mut stream)?;
            self.observer.step(il + 1, "");
        }
        let head = forward.head(self.reference)?;
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut twins = text.repeat(s.twins);
        for (i, twin) in twins.chunks_exact_mut(n_ctx).enumerate() {
            self.checkpoint()?;
            let places = places(&[0], 0, n_ctx, s.twins_drawn, &mut rng);
            let window = i % w.n_fit;
            let span = forward.span(&(window..window + 1));
            redraw(&mut forward, &head, twin, &places, &stream[span], &mut rng)?;
        }
        self.observer.step(n_layer + 1, "");
        Ok(Some(w.with_twins(&twins)))
    }
}

/// Where tokens are drawn anew in windows of `n_ctx` that begin at `starts` of a text, but in none of the first `n_given`: places
/// in the windows put together, and in the text the token that each is predicted from.
pub(super) fn places(
    starts: &[usize],
    n_given: usize,
    n_ctx: usize,
    drawn: f64,
    rng: &mut ChaCha8Rng,
) -> Vec<(usize, usize)> {
    let mut places = Vec::new();
    for (i, start) in starts.iter().enumerate().skip(n_given) {
        // Nothing is before the first.
        let chosen = (1..n_ctx).filter(|_| rng.random_bool(drawn));
        places.extend(chosen.map(|p| (i * n_ctx + p, start + p - 1)));
    }
    places
}

/// Draws the tokens of `text` at `places` anew, each from what `head` predicts from the row of `stream` `[n_tokens, n_embd]` that
/// is named beside it.
pub(super) fn redraw(
    forward: &mut Forward,
    head: &Head,
    text: &mut [Token],
    places: &[(usize, usize)],
    stream: &[f32],
    rng: &mut ChaCha8Rng,
) -> Result<(), ForwardError> {
    let n_embd = forward.n_embd();
    let rows = places.iter().flat_map(|(_, row)| &stream[row * n_embd..][..n_embd]);
    let rows: Vec<f32> = rows.copied().collect();
    let at: Vec<f64> = places.iter().map(|_| rng.random()).collect();
    let new = forward.draw(head, &rows, &at)?;
    places.iter().zip(new).for_each(|((place, _), token)| text[*place] = token);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_drawn_from_the_one_before_in_windows_that_are_not_given() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for (n_ctx, n_given) in [(2usize, 0usize), (7, 250), (64, 1)] {
            let starts: Vec<usize> = (0..500).map(|i| i * 3 % 400).collect();
            let places = places(&starts, n_given, n_ctx, 0.3, &mut rng);
            for &(place, before) in &places {
                assert!(place / n_ctx >= n_given && place % n_ctx > 0);
                assert_eq!(before + 1, starts[place / n_ctx] + place % n_ctx);
            }
            assert!(places.is_sorted_by(|a, b| a.0 < b.0));
            let share = places.len() as f64 / ((starts.len() - n_given) * (n_ctx - 1)) as f64;
            assert!((0.25..0.35).contains(&share), "{n_ctx}: {share}");
        }
    }
}
