//! Which architecture stock llama.cpp can run the pruned model in.

use super::{BlockShape, Family};

/// The architecture of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// The source's own architecture: every block has the same sizes.
    Same(Family),
    /// `deci`, which reads head counts and widths per block.
    Deci,
}

impl Carrier {
    /// Block structure of the output.
    pub fn family(self) -> Family {
        match self {
            Carrier::Same(family) => family,
            Carrier::Deci => Family::Deci,
        }
    }

    /// Value of `general.architecture`.
    pub fn name(self) -> &'static str {
        self.family().name()
    }
}

/// The carrier for blocks of these shapes (`src/models/llama.cpp` of llama.cpp uses block 0's sizes
/// for all blocks, `src/models/deci.cpp` each block's own; some loaders take no fewer heads at all, or no biases).
///
/// # Panics
/// If blocks differ in size and no architecture takes blocks of that family so
/// ([`Traits::per_block`](super::Traits::per_block)).
pub fn carrier_for(family: Family, shapes: &[BlockShape]) -> Carrier {
    if family.traits().stays && shapes.iter().all(|s| *s == shapes[0]) {
        return Carrier::Same(family);
    }
    assert_eq!(family.traits().uneven, Some(Family::Deci), "blocks of {} must be equal", family.name());
    Carrier::Deci
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: BlockShape = BlockShape { n_head: 4, n_head_kv: 2, n_ff: 96 };
    const NARROW: BlockShape = BlockShape { n_ff: 64, ..WIDE };

    #[test]
    fn equal_blocks_stay_what_they_are_and_others_become_deci() {
        for &family in Family::ALL {
            let stays = family.traits().stays;
            let expected = if stays { Carrier::Same(family) } else { Carrier::Deci };
            assert_eq!(carrier_for(family, &[WIDE; 3]), expected);
        }
        assert_eq!(carrier_for(Family::Qwen2, &[WIDE; 3]), Carrier::Deci);
        assert_eq!(carrier_for(Family::Llama, &[WIDE, NARROW]), Carrier::Deci);
        assert_eq!(carrier_for(Family::Deci, &[WIDE, NARROW]), Carrier::Deci);
    }

    #[test]
    #[should_panic(expected = "blocks of gemma3 must be equal")]
    fn gemma3_has_no_carrier_for_uneven_blocks() {
        carrier_for(Family::Gemma3, &[WIDE, NARROW]);
    }
}
