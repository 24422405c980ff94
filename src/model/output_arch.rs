//! Output architecture: the one in which stock llama.cpp runs the pruned model.

use super::{BlockShape, Family, Model};

/// Distribution of the removed attention heads over the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Heads {
    /// A different number per layer, where the output architecture supports it; else the same number in
    /// every layer.
    #[default]
    Auto,
    /// A different number per layer, or an error.
    /// If no other architecture supports it, a less common one that takes head counts per layer is used.
    PerLayer,
    /// The same number of heads and of neurons in every layer, for readers that know one number only.
    Uniform,
    /// No heads.
    None,
}

/// Policy for the choice of the output architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Arch {
    /// Architecture that allows the most to be removed.
    #[default]
    Auto,
    /// Architecture of the source.
    Keep,
}

/// Possible output architectures of a pruned model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputArchs {
    /// Architecture for blocks of different sizes, if there is one.
    pub per_block: Option<Family>,
    /// Architecture for blocks that differ only in their heads, if `per_block` is `None` and the caller
    /// asks for it.
    pub heads: Option<Family>,
    /// Architecture for equal blocks.
    pub equal: Family,
    /// Whether `equal` supports fewer heads than the source has.
    pub fewer_heads: bool,
}

impl OutputArchs {
    /// Output architecture for blocks of these shapes.
    /// `src/models/llama.cpp` of llama.cpp uses block 0's sizes for all blocks, `src/models/deci.cpp` each
    /// block's own.
    ///
    /// # Panics
    /// If blocks differ in size and no architecture supports that.
    pub fn of(&self, shapes: &[BlockShape]) -> Family {
        if shapes.iter().all(|s| *s == shapes[0]) {
            return self.equal;
        }
        let one_width = shapes.iter().all(|s| (s.n_ff, s.n_expert) == (shapes[0].n_ff, shapes[0].n_expert));
        self.heads
            .filter(|_| one_width)
            .or(self.per_block)
            .unwrap_or_else(|| panic!("blocks of {} must be equal", self.equal.name()))
    }

    /// Architecture in which blocks may keep different numbers of heads, if there is one.
    pub fn of_heads(&self) -> Option<Family> {
        self.per_block.or(self.heads)
    }

    /// Whether all of them support the biases that pruning adds.
    pub fn have_biases(&self) -> bool {
        let all = [Some(self.equal), self.per_block, self.heads];
        all.into_iter().flatten().all(|f| f.traits().output_biases)
    }
}

impl Model {
    /// Possible output architectures of this model.
    /// Some loaders support no fewer heads at all, or no biases; that is accepted if there is no
    /// alternative.
    pub fn output_archs(&self, heads: Heads, arch: Arch) -> OutputArchs {
        let (own, traits) = (self.hparams.family, self.hparams.family.traits());
        let fits = |f: &Family| self.no_room_in(f.traits()).is_none();
        let fewer_heads = self.hparams.takes_fewer_heads();
        let keeps = OutputArchs { per_block: None, heads: None, equal: own, fewer_heads };
        let per_layer_arch = traits.per_layer_arch.filter(fits);
        match (arch, heads) {
            (Arch::Keep, Heads::Uniform) => keeps,
            (Arch::Keep, _) => OutputArchs { per_block: per_layer_arch.filter(|f| *f == own), ..keeps },
            (Arch::Auto, Heads::Uniform) => match traits.uniform_arch.filter(fits) {
                Some(even) => OutputArchs { equal: even, fewer_heads: true, ..keeps },
                None => keeps,
            },
            (Arch::Auto, _) => match per_layer_arch {
                Some(per_layer_arch) => {
                    let equal = if traits.loads_fewer_heads { own } else { per_layer_arch };
                    OutputArchs { per_block: Some(per_layer_arch), equal, fewer_heads: true, ..keeps }
                }
                None if heads == Heads::PerLayer => {
                    OutputArchs { heads: traits.per_layer_heads_arch.filter(fits), ..keeps }
                }
                None => keeps,
            },
        }
    }
}
