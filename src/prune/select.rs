//! Selection of the neurons and experts to keep.

use super::refit::factor;
use super::{Inverse, NeuronCriterion, Obs, Refit, Singular, dense};
use crate::model::Matrix;
use crate::numeric::{Real, SymMatrix};

/// Largest number of neurons that are removed together, in layers of up to 4096. Smaller is more exact and
/// slower.
const MAX_STEP: usize = 16;

/// Removes neurons greedily until `n_keep` are left: a few at a time, those that `criterion` rates least.
///
/// The remaining weights move to the new minimum each time. `w` `[n_out, n_ff]` is at the minimum of its
/// loss with the curvature that `inverse` inverts. If `costs` is given, neurons are judged by their outputs
/// through it. Returns the kept neurons, ascending, and the map on them at its minimum.
///
/// # Errors
/// [`Singular`] if the remaining map is not finite.
///
/// # Panics
/// If the sizes disagree, or not at least one neuron is kept.
pub fn greedy(
    w: &Matrix,
    costs: Option<&Matrix>,
    inverse: Inverse,
    n_keep: usize,
    criterion: NeuronCriterion,
) -> Result<(Vec<usize>, Refit), Singular> {
    assert!(n_keep > 0 && n_keep <= w.n_in);
    match inverse {
        Inverse::Single(i) => taken_down(w.n_in, Obs::new(w, costs, i, criterion), n_keep),
        Inverse::Double(i) => taken_down(w.n_in, Obs::new(w, costs, i, criterion), n_keep),
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

/// Result of the greedy selection in one layer at falling widths.
pub struct Narrowing {
    /// Loss at each requested width.
    pub losses: Vec<f64>,
    /// Neurons left at the probe width, ascending.
    pub kept: Vec<usize>,
    /// Map `[n_out, kept.len()]` on them.
    pub weights: Matrix,
}

/// Loss of the greedy selection at each of the falling `widths`, and the layer at the width `probe`.
/// The first width is the full one; `probe` is one of the widths.
///
/// # Panics
/// If the sizes disagree, or `probe` is none of the widths.
pub fn narrow(w: &Matrix, inverse: Inverse, widths: &[usize], probe: usize) -> Narrowing {
    match inverse {
        Inverse::Single(i) => narrowed(w.n_in, Obs::new(w, None, i, NeuronCriterion::Obs), widths, probe),
        Inverse::Double(i) => narrowed(w.n_in, Obs::new(w, None, i, NeuronCriterion::Obs), widths, probe),
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

/// Number of neurons to remove together when `alive` of `n_ff` are left.
/// It is small enough that they hardly depend on each other. It is larger in a wide layer, since time goes
/// with the number of steps.
fn step(n_ff: usize, alive: usize) -> usize {
    (alive / 64).clamp(1, MAX_STEP.max(n_ff / 256))
}

/// Keeps the `n_keep` neurons with the highest score of the authors' code: Σ_i E\[y_i²\] · W_ij² / U_jj².
/// U is the upper Cholesky factor of H⁻¹. There is no damping unless the factorisation needs it.
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

/// Keeps the `n_keep` inputs with the largest norm over the tokens (2SSP's first stage), ascending.
pub fn top_by_activation_norm(h: &SymMatrix, n_keep: usize) -> Vec<usize> {
    largest(&h.diagonal(), n_keep)
}

/// Keeps the `n_keep` experts with the largest router-weighted output norm (REAP, arXiv 2510.13999),
/// ascending.
/// The score is the mean, over the tokens that choose the expert, of the output's norm times its router
/// weight; `energy` holds the sums. Experts that no token chose are removed first.
pub fn top_by_router_weighted_norm(energy: &[f64], n_tokens: &[usize], n_keep: usize) -> Vec<usize> {
    let means: Vec<f64> = energy.iter().zip(n_tokens).map(|(e, &n)| e / n.max(1) as f64).collect();
    largest(&means, n_keep)
}

/// Keeps the `n_keep` neurons of an FFN with the largest weights, ascending; needs no activations.
/// The score is the product of the norms of the rows of `gate` and `up` and of the column of `down`.
pub fn top_by_weight_norm(gate: &Matrix, up: &Matrix, down: &Matrix, n_keep: usize) -> Vec<usize> {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    let row = |m: &Matrix, j: usize| square(&mut m.data[j * m.n_in..][..m.n_in].iter().copied());
    let column = |j: usize| square(&mut (0..down.n_out).map(|i| down.data[i * down.n_in + j]));
    let scores: Vec<f64> = (0..down.n_in).map(|j| row(gate, j) * row(up, j) * column(j)).collect();
    largest(&scores, n_keep)
}

/// Indices of the `n` largest scores, ascending.
fn largest(scores: &[f64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(n);
    order.sort_unstable();
    order
}

/// Energy E\[y_i²\] of every output: the diagonal of W H Wᵀ / T.
fn output_energies(w: &Matrix, h: &SymMatrix, n_tokens: usize) -> Vec<f64> {
    let n = w.n_in;
    let wm = dense::<f64>(w);
    let hm = faer::Mat::from_fn(n, n, |i, j| h.get(i, j));
    let wh = &wm * &hm;
    (0..w.n_out)
        .map(|i| (0..n).map(|j| wh[(i, j)] * wm[(i, j)]).sum::<f64>() / n_tokens.max(1) as f64)
        .collect()
}
