//! Tokens of a text that are resampled from the reference's predictions for their positions.

use crate::forward::{Forward, ForwardError, Head};
use crate::ggml::Token;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// Positions at which tokens are resampled in windows of `n_ctx` that begin at `starts` of a text, but in
/// none of the first `n_given`.
/// Each is the position in the concatenated windows, and the index in the text of the token that it is
/// predicted from.
pub(super) fn places(
    starts: &[usize],
    n_given: usize,
    n_ctx: usize,
    drawn: f64,
    rng: &mut ChaCha8Rng,
) -> Vec<(usize, usize)> {
    let mut places = Vec::new();
    for (i, start) in starts.iter().enumerate().skip(n_given) {
        // Nothing predicts the first token.
        let chosen = (1..n_ctx).filter(|_| rng.random_bool(drawn));
        places.extend(chosen.map(|p| (i * n_ctx + p, start + p - 1)));
    }
    places
}

/// Resamples the tokens of `text` at `places`.
/// `head` predicts each from the row of `stream` `[n_tokens, n_embd]` that is named beside it.
pub(super) fn resample(
    forward: &Forward,
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
    use rand::SeedableRng;

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
