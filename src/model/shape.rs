//! Shape of a block, and the units that its feed-forward can lose.

/// Sizes of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockShape {
    /// Number of query heads.
    pub n_head: usize,
    /// Number of key/value heads; each with its n_head / n_head_kv query heads is a group.
    pub n_head_kv: usize,
    /// Number of FFN neurons, per expert if there are experts.
    pub n_ff: usize,
    /// Number of experts; 0 if there is one FFN for all tokens.
    pub n_expert: usize,
}

impl BlockShape {
    /// Query heads per group, 0 without attention.
    pub fn heads_per_group(&self) -> usize {
        self.n_head.checked_div(self.n_head_kv).unwrap_or(0)
    }

    /// Number of parallel FFNs: the experts, or 1.
    pub fn n_feed_forwards(&self) -> usize {
        self.n_expert.max(1)
    }

    /// Number of FFN units of the kind `ffn_unit`.
    pub fn n_units(&self, ffn_unit: FfnUnit) -> usize {
        match ffn_unit {
            FfnUnit::Neuron => self.n_ff,
            FfnUnit::Expert => self.n_expert,
        }
    }

    /// Shape after [`super::BlockWeights::keep_units`] with the same `experts` and `neurons`.
    pub fn with_kept(self, experts: &[usize], neurons: &[usize]) -> BlockShape {
        BlockShape { n_ff: neurons.len() / experts.len().max(1), n_expert: experts.len(), ..self }
    }

    /// Shape with `n` FFN units of the kind `ffn_unit`.
    pub fn with_units(self, ffn_unit: FfnUnit, n: usize) -> BlockShape {
        match ffn_unit {
            FfnUnit::Neuron => BlockShape { n_ff: n, ..self },
            FfnUnit::Expert => BlockShape { n_expert: n, ..self },
        }
    }
}

/// Unit in which an FFN is pruned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FfnUnit {
    /// Neuron; in a mixture of experts, one of each expert, chosen per expert.
    Neuron,
    /// Whole expert.
    Expert,
}

impl FfnUnit {
    /// Plural of the name.
    pub fn plural(self) -> &'static str {
        match self {
            FfnUnit::Neuron => "neurons",
            FfnUnit::Expert => "experts",
        }
    }
}
