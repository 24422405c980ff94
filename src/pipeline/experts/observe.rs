//! Observation of the source's routers on the calibration texts.

use super::Source;
use crate::gguf::Value;
use crate::observe::{LayerUse, Routing, TextUse, Usage};
use crate::pipeline::{Checkpoint, Observer, PruneError, Record};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Name of the record of an observation.
pub const OBSERVED: &str = "observed";

/// Least time between two records of one observation: a machine that goes away takes the process with it.
const BETWEEN_RECORDS: Duration = Duration::from_secs(1);

/// Observes the routers of `source` on the windows of its texts.
/// An interrupted observation continues after the last window in the checkpoint, with the same result.
///
/// # Errors
/// [`PruneError`] if libllama fails, a layer is not seen as a whole, or the observer interrupts.
pub fn observe(
    source: Source,
    checkpoint: &mut dyn Checkpoint,
    observer: &mut dyn Observer,
) -> Result<Usage, PruneError> {
    let layers: Vec<usize> = source.mixture.observed().map(|l| l.block).collect();
    let n_expert = source.mixture.n_expert;
    let empty = || layers.iter().map(|&l| (l, LayerUse::new(n_expert))).collect::<BTreeMap<_, _>>();
    let mut texts: Vec<TextUse> = source
        .texts
        .iter()
        .map(|t| TextUse { name: t.name.clone(), weight: t.weight, tokens: 0, layers: empty() })
        .collect();
    let mut n_done = 0;
    if let Some(record) = checkpoint.load(OBSERVED)? {
        n_done = read(&record, &mut texts).ok_or_else(|| checkpoint.damaged(OBSERVED, "statistics"))?;
    }
    let windows: Vec<(usize, &[i32])> = source
        .texts
        .iter()
        .enumerate()
        .flat_map(|(i, t)| t.fit.iter().map(move |w| (i, w.as_slice())))
        .collect();
    observer.stage("observe experts", windows.len());
    let mut routing = Routing::new(source.llama, source.mixture, source.n_ctx(), source.n_threads)?;
    let mut last = Instant::now();
    for (done, &(text, window)) in windows.iter().enumerate().skip(n_done) {
        if observer.interrupted() {
            checkpoint.save(OBSERVED, record(done, &texts))?;
            return Err(PruneError::Interrupted);
        }
        // A window counts in every layer or, after an error, in none.
        let seen = routing.window(window)?;
        let text = &mut texts[text];
        text.tokens += window.len() as u64;
        for (layer, used) in &seen {
            text.layers.get_mut(layer).expect("layers are known").add(used);
        }
        if done == n_done || last.elapsed() >= BETWEEN_RECORDS || done + 1 == windows.len() {
            checkpoint.save(OBSERVED, record(done + 1, &texts))?;
            last = Instant::now();
        }
        observer.step(done + 1, "");
    }
    Ok(Usage { texts, ..Usage::new(n_expert) })
}

/// Statistics after `n_done` windows, to the bit.
fn record(n_done: usize, texts: &[TextUse]) -> Record {
    let bits = |v: &[f64]| Value::u64_array(&v.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
    let mut record = Record::default()
        .with_numbers("windows", [n_done])
        .with_numbers("tokens", texts.iter().map(|t| t.tokens as usize));
    for (i, text) in texts.iter().enumerate() {
        for (layer, u) in &text.layers {
            let sums: Vec<f64> = sums(u).into_iter().flatten().copied().collect();
            let counts = [u.tokens.as_slice(), &u.near_misses].concat();
            record = record
                .with(&format!("{i}.{layer}.sums"), bits(&sums))
                .with(&format!("{i}.{layer}.counts"), Value::u64_array(&counts));
        }
    }
    record
}

fn sums(u: &LayerUse) -> [&Vec<f64>; 4] {
    [&u.weight, &u.weight_normalised, &u.energy, &u.energy_normalised]
}

/// Reads a record into the statistics, and returns how many windows it covers.
fn read(record: &Record, texts: &mut [TextUse]) -> Option<usize> {
    let n_done = *record.numbers("windows")?.first()?;
    let tokens = record.numbers("tokens").filter(|t| t.len() == texts.len())?;
    for (i, (text, tokens)) in texts.iter_mut().zip(tokens).enumerate() {
        text.tokens = tokens as u64;
        for (layer, u) in &mut text.layers {
            let n = u.tokens.len();
            let numbers = |kind: &str, n: usize| {
                let all = record.get(&format!("{i}.{layer}.{kind}"))?.as_unsigned_array()?;
                (all.len() == n).then_some(all)
            };
            let (sums, counts) = (numbers("sums", 4 * n)?, numbers("counts", 2 * n)?);
            let sums: Vec<Vec<f64>> =
                sums.chunks(n).map(|s| s.iter().map(|v| f64::from_bits(*v)).collect()).collect();
            let [weight, weight_normalised, energy, energy_normalised] = sums.try_into().ok()?;
            let (tokens, near_misses) = (counts[..n].to_vec(), counts[n..].to_vec());
            *u = LayerUse { tokens, near_misses, weight, weight_normalised, energy, energy_normalised };
        }
    }
    Some(n_done)
}
