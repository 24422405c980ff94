//! Gating functions: how router weights follow from logits (`llama_expert_gating_func_type`).

/// Gating function with a constant factor, recognised by what a router computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gating {
    kind: Kind,
    /// Factor of all weights (`expert_weights_scale`).
    pub scale: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Softmax over the chosen experts; the same as one over all whose chosen weights are normalised.
    Softmax,
    /// Softmax over all experts.
    SoftmaxOfAll,
    /// Function of each logit alone, normalised over the chosen.
    Normalised(Function),
    /// Function of each logit alone.
    Plain(Function),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Function {
    Sigmoid,
    SqrtSoftplus,
}

impl Function {
    /// Value and derivative at `z`.
    fn at(self, z: f64) -> (f64, f64) {
        let sigmoid = 1.0 / (1.0 + (-z).exp());
        match self {
            Function::Sigmoid => (sigmoid, sigmoid * (1.0 - sigmoid)),
            Function::SqrtSoftplus => {
                let value = if z > 20.0 { z.sqrt() } else { z.exp().ln_1p().sqrt() };
                (value, sigmoid / (2.0 * value.max(1e-12)))
            }
        }
    }
}

const KINDS: [Kind; 6] = [
    Kind::Softmax,
    Kind::SoftmaxOfAll,
    Kind::Normalised(Function::Sigmoid),
    Kind::Plain(Function::Sigmoid),
    Kind::Normalised(Function::SqrtSoftplus),
    Kind::Plain(Function::SqrtSoftplus),
];

/// Largest relative deviation of weights from a gating function that computes them.
const CLOSE: f64 = 0.01;

/// A router's decision for one token: logits of all experts, the chosen ones, and their weights.
pub struct Decision<'a> {
    /// Logits `[n_expert]`; those of removed experts are -∞.
    pub logits: &'a [f32],
    /// Numbers of the chosen experts, `[n_used]`.
    pub chosen: &'a [i32],
    /// Their weights, `[n_used]`.
    pub weights: &'a [f32],
}

impl Gating {
    /// Gating function that computes all of `decisions`, if one does.
    pub fn recognise<'a>(decisions: impl Iterator<Item = Decision<'a>> + Clone) -> Option<Gating> {
        KINDS.into_iter().find_map(|kind| {
            let plain = Gating { kind, scale: 1.0 };
            let ratios = decisions.clone().flat_map(|d| {
                let weights = plain.weights(d.logits, d.chosen);
                let ratios = d.weights.iter().zip(&weights).map(|(real, w)| f64::from(*real) / w);
                ratios.collect::<Vec<_>>()
            });
            let mut ratios: Vec<f64> = ratios.collect();
            ratios.sort_by(f64::total_cmp);
            let scale = *ratios.get(ratios.len() / 2)?;
            let close = |r: &&f64| (*r / scale - 1.0).abs() < CLOSE;
            // A few weights may be rounded to nothing.
            let most = ratios.iter().filter(close).count() * 100 >= ratios.len() * 99;
            (scale.is_finite() && scale > 0.0 && most).then_some(Gating { kind, scale })
        })
    }

    /// Weights of the `chosen` experts.
    pub fn weights(&self, logits: &[f32], chosen: &[i32]) -> Vec<f64> {
        let of = |f: fn(&Gating, f64) -> f64| -> Vec<f64> {
            chosen.iter().map(|&e| f(self, f64::from(logits[e as usize]))).collect()
        };
        let scaled = |values: Vec<f64>, sum: f64| values.iter().map(|v| self.scale * v / sum).collect();
        match self.kind {
            Kind::Softmax | Kind::SoftmaxOfAll => {
                let most = chosen.iter().map(|&e| logits[e as usize]).fold(f32::NEG_INFINITY, f32::max);
                let exp = |z: f32| f64::from(z - most).exp();
                let values: Vec<f64> = chosen.iter().map(|&e| exp(logits[e as usize])).collect();
                let sum = match self.kind {
                    Kind::Softmax => values.iter().sum(),
                    _ => logits.iter().map(|&z| exp(z)).sum(),
                };
                scaled(values, sum)
            }
            Kind::Normalised(_) => {
                let values = of(|g, z| g.function().at(z).0);
                let sum = values.iter().sum();
                scaled(values, sum)
            }
            Kind::Plain(_) => scaled(of(|g, z| g.function().at(z).0), 1.0),
        }
    }

    /// Gradient with respect to the logits of all experts, given the one with respect to the weights of the
    /// chosen; 0 where a logit has no influence.
    pub fn gradient(&self, logits: &[f32], chosen: &[i32], of_weights: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; logits.len()];
        let weights = self.weights(logits, chosen);
        // Σ_i g_i w_i / scale, the part that all share where weights are normalised.
        let shared: f64 = of_weights.iter().zip(&weights).map(|(g, w)| g * w).sum::<f64>() / self.scale;
        for ((&e, &w), &g) in chosen.iter().zip(&weights).zip(of_weights) {
            let e = e as usize;
            let (value, slope) = match self.kind {
                Kind::Softmax | Kind::SoftmaxOfAll => (1.0, 1.0),
                Kind::Normalised(f) | Kind::Plain(f) => f.at(f64::from(logits[e])),
            };
            let relative = slope / value.max(1e-12);
            out[e] += match self.kind {
                Kind::Plain(_) | Kind::SoftmaxOfAll => g * w * relative,
                Kind::Softmax | Kind::Normalised(_) => (g - shared) * w * relative,
            };
        }
        if self.kind == Kind::SoftmaxOfAll {
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let chances: Vec<f64> = logits.iter().map(|&z| f64::from(z - most).exp()).collect();
            let sum: f64 = chances.iter().sum();
            for (o, p) in out.iter_mut().zip(chances) {
                *o -= shared * self.scale * p / sum;
            }
        }
        out
    }

    fn function(&self) -> Function {
        match self.kind {
            Kind::Normalised(f) | Kind::Plain(f) => f,
            Kind::Softmax | Kind::SoftmaxOfAll => unreachable!("softmax is not a function of one logit"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [0.3, -1.2, 2.0, 0.7, f32::NEG_INFINITY, 1.1];
    const CHOSEN: [i32; 3] = [2, 5, 3];

    #[test]
    fn a_gating_function_is_recognised_by_its_weights() {
        for kind in KINDS {
            let gating = Gating { kind, scale: 2.5 };
            let rows: Vec<Vec<f32>> = (0..4)
                .map(|i| LOGITS.iter().enumerate().map(|(j, z)| z + 0.3 * ((i * j) % 5) as f32).collect())
                .collect();
            let weights: Vec<Vec<f32>> = rows
                .iter()
                .map(|row| gating.weights(row, &CHOSEN).iter().map(|w| *w as f32).collect())
                .collect();
            let decisions = rows.iter().zip(&weights).map(|(logits, weights)| Decision {
                logits,
                chosen: &CHOSEN,
                weights,
            });
            let found = Gating::recognise(decisions).unwrap();
            assert!(found.kind == kind && (found.scale - 2.5).abs() < 1e-3, "{kind:?} {found:?}");
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let of_weights = [0.4, -1.0, 0.8];
        for kind in KINDS {
            let gating = Gating { kind, scale: 2.5 };
            let value = |logits: &[f32]| -> f64 {
                gating.weights(logits, &CHOSEN).iter().zip(of_weights).map(|(w, g)| w * g).sum()
            };
            let gradient = gating.gradient(&LOGITS, &CHOSEN, &of_weights);
            for e in (0..LOGITS.len()).filter(|&e| LOGITS[e].is_finite()) {
                let moved = |by: f32| {
                    let mut logits = LOGITS;
                    logits[e] += by;
                    value(&logits)
                };
                let difference = (moved(0.01) - moved(-0.01)) / 0.02;
                assert!(
                    (gradient[e] - difference).abs() < 1e-3,
                    "{kind:?} {e}: {} {difference}",
                    gradient[e]
                );
            }
        }
    }
}
