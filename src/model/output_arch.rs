//! Which architecture stock llama.cpp can run the pruned model in.

use super::{BlockShape, Family, Model};

/// How heads may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Heads {
    /// From each block as many as suit it where an architecture holds that, else as many from every block.
    #[default]
    Auto,
    /// From each block as many as suit it, or the model is refused; in an architecture of less renown where there is no
    /// other.
    PerBlock,
    /// As many from every block, and as many neurons, for readers that know one number only.
    Equal,
    /// None.
    Keep,
}

/// Which architecture the result may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Arch {
    /// The one that holds most of what may go.
    #[default]
    Auto,
    /// The source's.
    Keep,
}

/// Where a pruned model may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carriers {
    /// With blocks of different sizes, if anywhere.
    pub per_block: Option<Family>,
    /// With blocks that differ in their heads only, where there is none for the former and it is asked for.
    pub heads: Option<Family>,
    /// With equal blocks.
    pub equal: Family,
    /// Whether the latter holds fewer heads than the source has.
    pub fewer_heads: bool,
}

impl Carriers {
    /// The architecture for blocks of these shapes (`src/models/llama.cpp` of llama.cpp uses block 0's sizes for all
    /// blocks, `src/models/deci.cpp` each block's own).
    ///
    /// # Panics
    /// If blocks differ in size and there is none for that.
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

    /// Where blocks may keep different numbers of heads, if anywhere.
    pub fn of_heads(&self) -> Option<Family> {
        self.per_block.or(self.heads)
    }

    /// Whether there is room for biases that pruning adds.
    pub fn have_biases(&self) -> bool {
        let all = [Some(self.equal), self.per_block, self.heads];
        all.into_iter().flatten().all(|f| f.traits().output_biases)
    }
}

impl Model {
    /// Where this model may go. Some loaders take no fewer heads at all, or no biases, which is no matter where there is
    /// no other.
    pub fn carriers(&self, heads: Heads, arch: Arch) -> Carriers {
        let (own, traits) = (self.hparams.family, self.hparams.family.traits());
        let fits = |f: &Family| self.no_room_in(f.traits()).is_none();
        let fewer_heads = self.hparams.takes_fewer_heads();
        let keeps = Carriers { per_block: None, heads: None, equal: own, fewer_heads };
        let uneven = traits.uneven.filter(fits);
        match (arch, heads) {
            (Arch::Keep, Heads::Equal) => keeps,
            (Arch::Keep, _) => Carriers { per_block: uneven.filter(|f| *f == own), ..keeps },
            (Arch::Auto, Heads::Equal) => match traits.even.filter(fits) {
                Some(even) => Carriers { equal: even, fewer_heads: true, ..keeps },
                None => keeps,
            },
            (Arch::Auto, _) => match uneven {
                Some(uneven) => {
                    let equal = if traits.stays { own } else { uneven };
                    Carriers { per_block: Some(uneven), equal, fewer_heads: true, ..keeps }
                }
                None if heads == Heads::PerBlock => {
                    Carriers { heads: traits.uneven_heads.filter(fits), ..keeps }
                }
                None => keeps,
            },
        }
    }
}
