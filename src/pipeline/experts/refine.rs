//! Refinement of a choice of experts, step by step; a step that does not help on held-out text is undone.

use super::repair::refit_routers;
use super::{Choice, ExpertSettings, Source, Trial, check};
use crate::ggml::Token;
use crate::gguf::Value;
use crate::model::Mixture;
use crate::observe::{LayerOutputs, Mask, Outputs, Reference, can_observe_outputs, output_bytes};
use crate::pipeline::{Checkpoint, Observer, PruneError, Record};
use crate::prune;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// Name of the step that chooses by statistics alone.
pub const STATISTICS: &str = "statistics";
const OUTPUTS: &str = "outputs";
const SWAPS: &str = "swaps";
const ROUTERS: &str = "routers";

/// Name of the record of a refined choice.
pub const REFINED: &str = "refined";

/// Step of a choice.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Name of what was tried.
    pub name: &'static str,
    /// Mean KL divergence on the held-out windows with it, in nats.
    pub kl_divergence: f64,
    /// Whether its result was kept.
    pub kept: bool,
}

/// Choice after all steps.
#[derive(Clone, Debug)]
pub struct Refined {
    /// Mask of each observed layer.
    pub mask: Mask,
    /// Steps in order.
    pub steps: Vec<Step>,
    /// Notes for the user.
    pub notes: Vec<String>,
}

/// Largest memory of the outputs that are observed together, in bytes.
const OUTPUT_BYTES: usize = 1 << 30;

/// Share of the tokens of a window whose outputs are observed: neighbours say much the same.
const EVERY: usize = 8;

/// Tokens per expert, on average, below which its outputs say less than its statistics.
const FEWEST: usize = 8;

/// Number of windows that a swap is judged on.
const JUDGES: usize = 4;

/// Observation of outputs that fits into a number of decoded windows.
struct OutputPlan {
    /// Windows.
    n_windows: usize,
    /// Every so many tokens of a window.
    every: usize,
    /// Layers that are observed together.
    layers: usize,
    /// Windows that are decoded in all.
    n_decodes: usize,
}

impl OutputPlan {
    /// Largest observation within `budget` decoded windows; `None` if that is too little.
    fn new(source: &Source, budget: usize) -> Option<OutputPlan> {
        let m = source.mixture;
        let n_layers = m.observed().count();
        let windows: usize = source.texts.iter().map(|t| t.fit.len()).sum();
        let n_embd = n_embd(m);
        let each = Outputs::n_decodes(m.n_expert, m.n_used);
        [EVERY, EVERY / 2, EVERY / 4].into_iter().find_map(|every| {
            let rows = source.n_ctx() / every;
            let layers = (OUTPUT_BYTES / output_bytes(m.n_expert, n_embd, rows).max(1)).clamp(1, n_layers);
            let per_window = each * n_layers.div_ceil(layers);
            let n_windows = (budget / per_window).min(windows);
            let enough = n_windows * rows * m.n_used >= FEWEST * m.n_expert;
            let plan = OutputPlan { n_windows, every, layers, n_decodes: n_windows * per_window };
            (n_windows > 0 && enough).then_some(plan)
        })
    }
}

fn n_embd(m: &Mixture) -> usize {
    m.file.get_u32(&format!("{}.embedding_length", m.arch)).ok().flatten().unwrap_or(0)
}

impl Trial<'_> {
    /// Refines `choice` as far as `settings` allow.
    ///
    /// # Errors
    /// [`PruneError`] if libllama fails or the observer interrupts.
    pub fn refine(
        &mut self,
        choice: &Choice,
        settings: &ExpertSettings,
        checkpoint: &mut dyn Checkpoint,
        observer: &mut dyn Observer,
    ) -> Result<Refined, PruneError> {
        let first = self.divergence(&choice.mask, observer)?;
        let steps = vec![Step { name: STATISTICS, kl_divergence: first, kept: true }];
        let mut so_far = Refined { mask: choice.mask.clone(), steps, notes: Vec::new() };
        let n_windows: usize = self.source.texts.iter().map(|t| t.fit.len()).sum();
        let budget = settings.refine * n_windows;
        match checkpoint.load(REFINED)? {
            Some(record) => {
                read(&record, &mut so_far).ok_or_else(|| checkpoint.damaged(REFINED, "choice"))?;
            }
            None if budget > 0 => {
                self.choose_again(choice, budget, &mut so_far, observer)?;
                checkpoint.save(REFINED, record(&so_far))?;
            }
            None => {}
        }
        if settings.repair > 0 {
            let next = refit_routers(self.source, &so_far.mask, settings.repair, observer)?;
            self.tell(ROUTERS, next, &mut so_far, observer)?;
        }
        Ok(so_far)
    }

    /// Judges the result `next` of the step `name`, and keeps it if it is better.
    fn tell(
        &mut self,
        name: &'static str,
        next: Mask,
        so_far: &mut Refined,
        observer: &dyn Observer,
    ) -> Result<(), PruneError> {
        let best =
            so_far.steps.iter().filter(|s| s.kept).map(|s| s.kl_divergence).fold(f64::INFINITY, f64::min);
        let found = self.divergence(&next, observer)?;
        so_far.steps.push(Step { name, kl_divergence: found, kept: found < best });
        if found < best {
            so_far.mask = next;
        }
        Ok(())
    }

    /// Chooses other experts, within `budget` decoded windows: first by the outputs of all experts, then one
    /// by one.
    fn choose_again(
        &mut self,
        choice: &Choice,
        budget: usize,
        so_far: &mut Refined,
        observer: &mut dyn Observer,
    ) -> Result<(), PruneError> {
        let plan = match can_observe_outputs(self.source.mixture) {
            true => OutputPlan::new(&self.source, budget),
            false => None,
        };
        let left = budget - plan.as_ref().map_or(0, |p| p.n_decodes);
        match plan {
            Some(plan) => {
                let next = self.by_outputs(choice, &plan, observer)?;
                self.tell(OUTPUTS, next, so_far, observer)?;
            }
            None if can_observe_outputs(self.source.mixture) => so_far.notes.push(
                "the calibration is too short for a choice by the experts' outputs; more refinement or longer texts make one"
                    .into(),
            ),
            None => {}
        }
        let next = self.by_swaps(choice, &so_far.mask, left, observer)?;
        if let Some(next) = next {
            self.tell(SWAPS, next, so_far, observer)?;
        }
        Ok(())
    }

    /// Chooses experts by what layers with fewer of them would compute.
    fn by_outputs(
        &mut self,
        choice: &Choice,
        plan: &OutputPlan,
        observer: &mut dyn Observer,
    ) -> Result<Mask, PruneError> {
        let source = self.source;
        let mixture = source.mixture;
        let windows: Vec<&[Token]> =
            source.texts.iter().flat_map(|t| t.fit.iter().map(Vec::as_slice)).collect();
        let layers: Vec<usize> = mixture.observed().map(|l| l.block).collect();
        let mut outputs = Outputs::new(source.llama, mixture, source.n_ctx(), source.n_threads)?;
        let n_parts = layers.len().div_ceil(plan.layers);
        observer.stage("observe outputs", plan.n_windows * n_parts);
        let mut mask = choice.mask.clone();
        for (p, part) in layers.chunks(plan.layers).enumerate() {
            let mut all: BTreeMap<usize, LayerOutputs> = BTreeMap::new();
            for i in 0..plan.n_windows {
                check(observer)?;
                let window = windows[i * windows.len() / plan.n_windows];
                for (layer, found) in outputs.window(window, part, plan.every)? {
                    match all.entry(layer) {
                        Entry::Vacant(e) => drop(e.insert(found)),
                        Entry::Occupied(mut e) => e.get_mut().append(found),
                    }
                }
                observer.step(p * plan.n_windows + i + 1, "");
            }
            for (layer, outputs) in &all {
                let protected = choice.protected.get(layer).map_or(&[][..], Vec::as_slice);
                let kept = prune::eliminate(outputs, choice.units.n_keep, protected);
                let of_layer = mask.get_mut(layer).expect("observed layers are masked");
                of_layer.kept = (0..mixture.n_expert).map(|e| kept.contains(&e)).collect();
            }
        }
        Ok(mask)
    }

    /// Exchanges experts that barely stay for ones that barely go, layer by layer, as long as predictions come
    /// closer to the source's on some calibration windows, within `budget` decoded windows.
    /// Returns `None` if the budget allows no exchange, or none helps.
    fn by_swaps(
        &mut self,
        choice: &Choice,
        mask: &Mask,
        budget: usize,
        observer: &mut dyn Observer,
    ) -> Result<Option<Mask>, PruneError> {
        let windows: Vec<&[Token]> =
            self.source.texts.iter().flat_map(|t| t.fit.iter().map(Vec::as_slice)).collect();
        let n = JUDGES.min(windows.len());
        let judges: Vec<&[Token]> = (0..n).map(|i| windows[i * windows.len() / n]).collect();
        // The source and the choice so far are decoded first.
        let n_tries = (budget / n).saturating_sub(2);
        if n_tries == 0 {
            return Ok(None);
        }
        let reference = Reference::new(&mut self.model, &judges)?;
        observer.stage("swap experts", n_tries);
        let mut stop = || !observer.interrupted();
        let mut best = reference.divergence(&mut self.model, mask, &mut stop)?;
        let (mut mask, mut improved) = (mask.clone(), false);
        let swaps = swaps(choice, &mask);
        for (i, (layer, out, into)) in swaps.into_iter().take(n_tries).enumerate() {
            let mut next = mask.clone();
            let kept = &mut next.get_mut(&layer).expect("a layer of the mask").kept;
            // An earlier exchange may have moved the same experts.
            if out.iter().all(|&e| kept[e]) && into.iter().all(|&e| !kept[e]) {
                out.iter().for_each(|&e| kept[e] = false);
                into.iter().for_each(|&e| kept[e] = true);
                let mut stop = || !observer.interrupted();
                let found = reference.divergence(&mut self.model, &next, &mut stop)?;
                if found < best {
                    (mask, best, improved) = (next, found, true);
                }
            }
            observer.step(i + 1, &format!("divergence {best:.4}"));
        }
        Ok(improved.then_some(mask))
    }
}

/// Experts of a layer that change places.
type Swap = (usize, Vec<usize>, Vec<usize>);

/// Exchanges to try, the closest decisions first: in each layer and group, the kept unit with the lowest score
/// for the removed one with the highest, then the next two, and so on in turns.
fn swaps(choice: &Choice, mask: &Mask) -> Vec<Swap> {
    let mut all: Vec<(usize, f64, Swap)> = Vec::new();
    for (&layer, of_layer) in mask {
        let scores = &choice.scores[&layer];
        let n = scores.len();
        let protected = choice.protected.get(&layer).map_or(&[][..], Vec::as_slice);
        let total: f64 = scores.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        for group in 0..choice.units.n_groups {
            let of_group = |kept: bool| {
                let mut units: Vec<(f64, Vec<usize>)> = (0..n)
                    .step_by(choice.units.chunk)
                    .filter(|&e| choice.units.unit_and_group(e, n).1 == group && of_layer.kept[e] == kept)
                    .map(|e| (e..e + choice.units.chunk).collect::<Vec<_>>())
                    .filter(|unit| !kept || !unit.iter().any(|e| protected.contains(e)))
                    .map(|unit| (unit.iter().map(|&e| scores[e]).sum(), unit))
                    .collect();
                units.sort_by(|a, b| a.0.total_cmp(&b.0));
                units
            };
            let (kept, removed) = (of_group(true), of_group(false));
            for (rank, (out, into)) in kept.into_iter().zip(removed.into_iter().rev()).enumerate() {
                all.push((rank, (out.0 - into.0) / total, (layer, out.1, into.1)));
            }
        }
    }
    all.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.0.cmp(&b.2.0)));
    all.into_iter().map(|(.., swap)| swap).collect()
}

/// Record of a choice.
fn record(found: &Refined) -> Record {
    let names = found.steps.iter().map(|s| s.name.as_bytes().to_vec()).collect();
    let bits: Vec<u64> = found.steps.iter().map(|s| s.kl_divergence.to_bits()).collect();
    let mut record = Record::default()
        .with("steps", Value::StrArray(names))
        .with("divergence", Value::u64_array(&bits))
        .with_numbers("helped", found.steps.iter().map(|s| usize::from(s.kept)));
    for (layer, mask) in &found.mask {
        record = record.with_numbers(&format!("kept.{layer}"), mask.kept_experts());
    }
    record
}

/// Reads a record into a choice.
fn read(record: &Record, into: &mut Refined) -> Option<()> {
    let Some(Value::StrArray(names)) = record.get("steps") else { return None };
    let bits = record.get("divergence")?.as_unsigned_array()?;
    let helped = record.numbers("helped")?;
    let known = [STATISTICS, OUTPUTS, SWAPS, ROUTERS];
    let step = |((name, bits), kept): ((&Vec<u8>, &u64), &usize)| {
        let name = known.into_iter().find(|known| known.as_bytes() == name.as_slice())?;
        Some(Step { name, kl_divergence: f64::from_bits(*bits), kept: *kept == 1 })
    };
    into.steps = names.iter().zip(&bits).zip(&helped).map(step).collect::<Option<_>>()?;
    for (layer, mask) in &mut into.mask {
        let kept = record.numbers(&format!("kept.{layer}"))?;
        mask.kept = (0..mask.kept.len()).map(|e| kept.contains(&e)).collect();
    }
    Some(())
}
