//! Weights of a block on their way to the backend.

use super::*;

/// Collection of tensors for an upload.
#[derive(Default)]
pub(super) struct Uploads<'w> {
    pub(super) list: Vec<TensorSpec<'w>>,
}

impl<'w> Uploads<'w> {
    pub(super) fn matrix(&mut self, m: &'w Matrix) -> Option<usize> {
        if m.data.is_empty() {
            return None;
        }
        self.list.push(TensorSpec { ne: [m.n_in, m.n_out], data: Values::Shared(Arc::clone(&m.data)) });
        Some(self.list.len() - 1)
    }

    pub(super) fn vector(&mut self, v: &'w [f32]) -> Option<usize> {
        if v.is_empty() {
            return None;
        }
        self.list.push(TensorSpec { ne: [v.len(), 1], data: Values::Copied(v) });
        Some(self.list.len() - 1)
    }

    pub(super) fn pre_norm(
        &mut self,
        weight: &'w Option<Vec<f32>>,
        bias: &'w Option<Vec<f32>>,
    ) -> Option<PreNorm> {
        Some(PreNorm { weight: self.optional(weight)?, bias: self.optional(bias) })
    }

    pub(super) fn experts(&mut self, e: &'w ExpertWeights) -> ExpertRoles {
        let mut role = |m: &'w Matrix| self.matrix(m).expect("an expert has no empty matrix");
        let mut all = |gate, up, down| [role(gate), role(up), role(down)];
        let each =
            e.gate.iter().zip(&e.up).zip(&e.down).map(|((gate, up), down)| all(gate, up, down)).collect();
        let shared = e.shared.as_ref().map(|s| (all(&s.gate, &s.up, &s.down), &s.scale));
        let router = role(&e.router);
        let shared = shared.map(|(weights, scale)| (weights, self.optional(scale)));
        ExpertRoles { router, each, shared }
    }

    pub(super) fn post_norm(&mut self, v: &'w Option<Vec<f32>>) -> Option<PostNorm> {
        let g = v.as_ref()?;
        let ridge = POST_NORM_RIDGE * g.iter().map(|g| g * g).sum::<f32>() / g.len() as f32;
        let inverse = g.iter().map(|g| g / (g * g + ridge.max(f32::MIN_POSITIVE)));
        let inverse = Values::Shared(Arc::new(inverse.collect()));
        let weight = self.vector(g)?;
        self.list.push(TensorSpec { ne: [g.len(), 1], data: inverse });
        Some(PostNorm { weight, inverse: self.list.len() - 1 })
    }

    pub(super) fn optional(&mut self, v: &'w Option<Vec<f32>>) -> Option<usize> {
        v.as_ref().and_then(|v| self.vector(v))
    }
}
