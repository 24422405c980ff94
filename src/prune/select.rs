//! Which neurons stay.

use super::refit::factor;
use super::{Choice, Inverse, Obs, Refit, Singular, dense};
use crate::model::Matrix;
use crate::numeric::{Real, SymMatrix};

/// Neurons that are taken out together at most, up to 4096 of them. Smaller is more exact and slower.
const MAX_STEP: usize = 16;

/// Keeps `n_keep` neurons, taking out those that `choice` finds least a few at a time and repairing the
/// others each time. `w` `[n_ff, n_out]` is at the minimum of its loss with the curvature that `inverse` is of; neurons
/// are judged by their outputs through `costs`, if it is given. Returns the neurons that stay, ascending, and the map on
/// them at its minimum.
///
/// # Errors
/// [`Singular`] if the map that is left is not finite.
///
/// # Panics
/// If the sizes disagree, or not at least one neuron stays.
pub fn greedy(
    w: &Matrix,
    costs: Option<&Matrix>,
    inverse: Inverse,
    n_keep: usize,
    choice: Choice,
) -> Result<(Vec<usize>, Refit), Singular> {
    assert!(n_keep > 0 && n_keep <= w.n_in);
    match inverse {
        Inverse::Single(i) => taken_down(w.n_in, Obs::new(w, costs, i, choice), n_keep),
        Inverse::Double(i) => taken_down(w.n_in, Obs::new(w, costs, i, choice), n_keep),
    }
}

fn taken_down<T: Real>(n_ff: usize, mut obs: Obs<T>, n_keep: usize) -> Result<(Vec<usize>, Refit), Singular> {
    while obs.alive() > n_keep {
        obs.remove_least(step(n_ff, obs.alive()).min(obs.alive() - n_keep));
    }
    let weights = obs.weights();
    if !weights.data.iter().all(|v| v.is_finite()) {
        return Err(Singular);
    }
    Ok((obs.kept(), Refit { weights, ridge: obs.ridge }))
}

/// What the greedy selection makes of a layer as it narrows.
pub struct Narrowing {
    /// Loss at each width that was asked for.
    pub losses: Vec<f64>,
    /// The neurons that are left at the probe width, ascending.
    pub kept: Vec<usize>,
    /// The map on them.
    pub weights: Matrix,
}

/// Loss of the greedy selection at each of the falling `widths`, the first of which is all of them, and
/// the layer as it is at the width `probe`, which is one of them.
///
/// # Panics
/// If the sizes disagree, or `probe` is none of the widths.
pub fn narrow(w: &Matrix, inverse: Inverse, widths: &[usize], probe: usize) -> Narrowing {
    match inverse {
        Inverse::Single(i) => narrowed(w.n_in, Obs::new(w, None, i, Choice::Loss), widths, probe),
        Inverse::Double(i) => narrowed(w.n_in, Obs::new(w, None, i, Choice::Loss), widths, probe),
    }
}

fn narrowed<T: Real>(n_ff: usize, mut obs: Obs<T>, widths: &[usize], probe: usize) -> Narrowing {
    let mut loss = 0.0;
    let (mut losses, mut at_probe) = (Vec::with_capacity(widths.len()), None);
    for &width in widths {
        while obs.alive() > width {
            loss += obs.remove_least(step(n_ff, obs.alive()).min(obs.alive() - width));
        }
        losses.push(loss);
        if width == probe {
            let weights = obs.weights();
            at_probe = Some((obs.kept(), weights));
        }
    }
    let (kept, weights) = at_probe.expect("the probe is one of the widths");
    Narrowing { losses, kept, weights }
}

/// Neurons that go together when `alive` of `n_ff` are left: few enough that they hardly depend on
/// each other, and in a wide layer more, since the number of steps is what costs time.
fn step(n_ff: usize, alive: usize) -> usize {
    (alive / 64).clamp(1, MAX_STEP.max(n_ff / 256))
}

/// The `n_keep` neurons with the highest score of the authors' code: Σ_i E\[y_i²\] · W_ij² / U_jj²,
/// with U the upper Cholesky factor of H⁻¹. Without damping unless the factorisation needs it.
///
/// # Errors
/// [`Singular`] if `h` cannot be factored.
pub fn paper_keep(w: &Matrix, h: &SymMatrix, n_tokens: usize, n_keep: usize) -> Result<Vec<usize>, Singular> {
    let n = w.n_in;
    let u: Vec<f64> = {
        let (factored, _) = factor::<f64>(h, None, 0.0, h.mean_diagonal())?;
        let inverse = factored.into_inverse();
        let h_inv = SymMatrix::from_fn(n, |i, j| inverse[i * n + j]);
        drop(inverse);
        let (u, _) = factor::<f64>(&h_inv, None, 0.0, h_inv.mean_diagonal())?;
        (0..n).map(|j| u.lower()[(j, j)]).collect()
    };
    let energies = output_energies(w, h, n_tokens);
    let mut scored: Vec<(f64, usize)> = (0..n)
        .map(|j| {
            let s: f64 =
                energies.iter().enumerate().map(|(i, e)| e * f64::from(w.data[i * n + j]).powi(2)).sum();
            (s / u[j].powi(2), j)
        })
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut keep: Vec<usize> = scored[..n_keep].iter().map(|s| s.1).collect();
    keep.sort_unstable();
    Ok(keep)
}

/// The `n_keep` inputs with the largest norm over the tokens (2SSP's first stage), ascending.
pub fn loudest(h: &SymMatrix, n_keep: usize) -> Vec<usize> {
    largest(&h.diagonal(), n_keep)
}

/// The `n_keep` experts that do most for the tokens that choose them, ascending: by the mean over these of the length of
/// the output times what it counts, of which `energy` is the sum (REAP, arXiv 2510.13999). One that no token chose goes
/// first.
pub fn busiest(energy: &[f64], n_tokens: &[usize], n_keep: usize) -> Vec<usize> {
    let means: Vec<f64> = energy.iter().zip(n_tokens).map(|(e, &n)| e / n.max(1) as f64).collect();
    largest(&means, n_keep)
}

/// The `n_keep` neurons of a feed-forward whose weights are largest, ascending: by the product of the norms of their
/// rows of `gate` and `up` and their column of `down`, for one that nothing is known of.
pub fn heaviest(gate: &Matrix, up: &Matrix, down: &Matrix, n_keep: usize) -> Vec<usize> {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    let row = |m: &Matrix, j: usize| square(&mut m.data[j * m.n_in..][..m.n_in].iter().copied());
    let column = |j: usize| square(&mut (0..down.n_out).map(|i| down.data[i * down.n_in + j]));
    let scores: Vec<f64> = (0..down.n_in).map(|j| row(gate, j) * row(up, j) * column(j)).collect();
    largest(&scores, n_keep)
}

/// The numbers of the `n` largest, ascending.
fn largest(scores: &[f64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(n);
    order.sort_unstable();
    order
}

/// E\[y_i²\] of every output: the diagonal of W H Wᵀ / T.
fn output_energies(w: &Matrix, h: &SymMatrix, n_tokens: usize) -> Vec<f64> {
    let n = w.n_in;
    let wm = dense::<f64>(w);
    let hm = faer::Mat::from_fn(n, n, |i, j| h.get(i, j));
    let wh = &wm * &hm;
    (0..w.n_out)
        .map(|i| (0..n).map(|j| wh[(i, j)] * wm[(i, j)]).sum::<f64>() / n_tokens.max(1) as f64)
        .collect()
}
