//! Refit of the routers to the experts that are left.

use super::{Source, check};
use crate::observe::{Mask, RouterGradients};
use crate::pipeline::{Observer, PruneError};
use crate::train::Adam;
use std::collections::BTreeMap;

/// Largest step of a router's rows, relative to the size of its values.
const RATE: f32 = 0.01;

/// Refits the routers of the layers in `mask` in `passes` passes over the calibration windows, so that each
/// layer's output stays close to that of the whole layer.
///
/// # Errors
/// [`PruneError`] if libllama fails, a router cannot be decoded, or the observer interrupts.
pub(super) fn refit_routers(
    source: Source,
    mask: &Mask,
    passes: usize,
    observer: &mut dyn Observer,
) -> Result<Mask, PruneError> {
    let file = &source.mixture.file;
    let mut mask = mask.clone();
    let mut routers: BTreeMap<usize, Adam> = BTreeMap::new();
    for (&layer, of_layer) in &mut mask {
        let name = format!("blk.{layer}.ffn_gate_inp.weight");
        let t = file.find(&name).expect("a mixture has routers");
        let rows = file.floats(t, 0..t.n_rows())?;
        let size = (rows.iter().map(|v| v * v).sum::<f32>() / rows.len() as f32).sqrt();
        routers.insert(layer, Adam::of_vector(rows.clone(), size));
        of_layer.router = Some(rows);
    }
    let windows: Vec<&Vec<i32>> = source.texts.iter().flat_map(|t| &t.fit).collect();
    let n_steps = passes * windows.len();
    observer.stage("refit routers", n_steps);
    let mut gradients = RouterGradients::new(source.llama, source.mixture, source.n_ctx(), source.n_threads)?;
    for step in 0..n_steps {
        check(observer)?;
        // Neighbouring windows are of one text; a stride that is no divisor mixes them.
        let window = windows[step * STRIDE % windows.len()];
        let found = gradients.window(window, &mask)?;
        let rate = RATE * (1.0 - step as f32 / n_steps as f32);
        let error = found.values().map(|f| f.error).sum::<f64>() / found.len().max(1) as f64;
        for (layer, f) in found {
            let adam = routers.get_mut(&layer).expect("a router of the mask");
            adam.step(&f.gradient, rate, step as i32 + 1);
            mask.get_mut(&layer).expect("as above").router = Some(adam.values.to_vec());
        }
        observer.step(step + 1, &format!("error {error:.4}"));
    }
    Ok(mask)
}

/// Distance of the windows of two steps; a prime, so that it seldom divides their number.
const STRIDE: usize = 7919;
