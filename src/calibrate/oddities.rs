//! Detection of unsuitable calibration text by its held-out windows.

use super::{Windows, held_out};
use crate::ggml::Token;
use std::collections::HashSet;

/// Fewest distinct tokens of ordinary text.
/// English as single bytes, the smallest vocabulary there is, has 45 to 60; blank lines, rulers and digits
/// have fewer.
const LEAST_DISTINCT: usize = 32;

/// Smallest ratio of sample length to distinct tokens that the check needs: a short sample has few distinct
/// tokens.
const TOKENS_PER_DISTINCT: usize = 8;

/// Length, in tokens, of the sequences that the repetition check counts: longer than most turns of phrase.
const SEQUENCE: usize = 8;

/// Share of distinct sequences below which a text repeats itself.
/// Prose has over 0.95 and program text over 0.6. A line of 50 tokens, repeated through two windows of 512,
/// has 0.05.
const LEAST_SEQUENCES: f64 = 0.1;

/// Ratio of a text's perplexity to that of the model's own writing, from which the model does not know the
/// text.
/// Own writing has a perplexity of 10 to 30, ordinary text in a language that the model knows 10 to 100.
const MOST_TIMES: f64 = 20.0;

/// Perplexity that is unremarkable whatever the model's own writing has: conversations in a template have 3
/// to 5.
const UNREMARKABLE: f64 = 300.0;

/// Perplexity that is remarkable by itself, if there is no own writing to compare with.
/// Guessing over a vocabulary has 30,000 to 250,000. Text of a language that the model hardly knows stays
/// below a few hundred.
const MOST_ALONE: f64 = 2000.0;

/// Warnings about the text files that `windows` come from, one line each; none about self-written text.
/// `per_window_nll` is the dense model's mean negative log-likelihood, in nats, of each held-out window;
/// without it, perplexity is not judged. `windows` are the collected ones, without resampled copies.
pub fn oddities(windows: &Windows, per_window_nll: &[f64]) -> Vec<String> {
    let n_own = if windows.n_self > 0 { held_out(windows.n_self) } else { 0 };
    let n_files = windows.n_held_out.saturating_sub(n_own);
    let all = windows.held_out();
    let texts = &all[..n_files];
    if texts.is_empty() {
        return Vec::new();
    }
    let mut found = Vec::new();
    let n_tokens: usize = texts.iter().map(|w| w.len()).sum();
    let distinct = texts.iter().copied().flatten().collect::<HashSet<&Token>>().len();
    if distinct < LEAST_DISTINCT.min(n_tokens / TOKENS_PER_DISTINCT) {
        found.push(format!(
            "the calibration text has {distinct} different tokens in {n_tokens}; calibrate on text of the kind that the model \
             is for"
        ));
    } else {
        let sequences = || texts.iter().flat_map(|w| w.windows(SEQUENCE));
        let share = sequences().collect::<HashSet<_>>().len() as f64 / sequences().count().max(1) as f64;
        if n_tokens >= SEQUENCE && share < LEAST_SEQUENCES {
            found.push(format!(
                "the calibration text repeats itself: {:.0} % of its passages of {SEQUENCE} tokens are different ones; give more \
                 text, and more varied",
                share * 100.0
            ));
        }
    }
    if per_window_nll.len() == windows.n_held_out {
        let (files, own) = per_window_nll.split_at(n_files);
        found.extend(unknown(perplexity(files), (!own.is_empty()).then(|| perplexity(own))));
    }
    found
}

/// Warning about a text's perplexity, compared with that of the model's own writing if there is any.
fn unknown(text: f64, own: Option<f64>) -> Option<String> {
    let (odd, beside) = match own {
        Some(own) => (
            text > UNREMARKABLE && text > MOST_TIMES * own,
            format!("{own:.0} on what the model writes itself"),
        ),
        None => (text > MOST_ALONE, "a few hundred at most is usual".into()),
    };
    odd.then(|| {
        format!(
            "the model makes nothing of the calibration text: its perplexity there is {text:.0}, {beside}; see whether the \
             text is readable, in a language of the model and in the right encoding"
        )
    })
}

fn perplexity(nll: &[f64]) -> f64 {
    (nll.iter().sum::<f64>() / nll.len() as f64).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two windows to fit on and `n_held_out` held-out ones of `n_ctx` tokens by `token`; `n_self` of the
    /// fitted ones are self-written.
    fn windows(n_ctx: usize, n_held_out: usize, n_self: usize, token: impl Fn(usize) -> usize) -> Windows {
        let n_fit = 2;
        let fit = vec![0; n_fit * n_ctx];
        let tokens = fit.into_iter().chain((0..n_held_out * n_ctx).map(|i| token(i) as Token)).collect();
        Windows { n_ctx, tokens, n_fit, n_held_out, n_self }
    }

    /// Pseudo-random number for `i`.
    fn hash(i: usize) -> usize {
        let x = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33) as usize
    }

    fn odd(w: &Windows, nll: &[f64], part: &str) {
        let found = oddities(w, nll);
        assert!(found.len() == 1 && found[0].contains(part), "no {part} in {found:?}");
    }

    #[test]
    fn ordinary_text_is_not_odd() {
        for (n_ctx, n) in [(16, 1), (64, 1), (512, 2), (512, 8)] {
            for vocab in [60, 1000] {
                let w = windows(n_ctx, n, 0, |i| hash(i) % vocab);
                assert_eq!(oddities(&w, &vec![4.0; n]), [""; 0], "{n_ctx} {n} {vocab}");
            }
        }
    }

    #[test]
    fn few_tokens_and_few_sequences_are() {
        odd(&windows(512, 2, 0, |i| i % 3), &[], "3 different tokens in 1024");
        odd(&windows(16, 1, 0, |_| 7), &[], "1 different tokens in 16");
        odd(&windows(512, 2, 0, |i| hash(i % 50)), &[], "repeats itself");
        // Self-written text is never judged.
        assert_eq!(oddities(&windows(512, 1, 8, |_| 7), &[]), [""; 0]);
    }

    #[test]
    fn perplexity_counts_beside_the_models_own_or_alone() {
        let ppl = |values: &[f64]| values.iter().map(|v: &f64| v.ln()).collect::<Vec<_>>();
        let both = windows(512, 2, 8, hash);
        odd(&both, &ppl(&[1000.0, 20.0]), "perplexity there is 1000, 20 on what");
        for fine in [[350.0, 20.0], [150.0, 4.0], [1000.0, f64::NAN]] {
            assert_eq!(oddities(&both, &ppl(&fine)), [""; 0], "{fine:?}");
        }
        let alone = windows(512, 2, 0, hash);
        odd(&alone, &ppl(&[3000.0, 3000.0]), "perplexity there is 3000");
        assert_eq!(oddities(&alone, &ppl(&[900.0, 1500.0])), [""; 0]);
        // The wrong number of likelihoods says nothing.
        assert_eq!(oddities(&alone, &ppl(&[1e6])), [""; 0]);
    }
}
