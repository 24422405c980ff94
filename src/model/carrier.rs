//! Which architecture stock llama.cpp can run the pruned model in.

use super::{BlockShape, Family};

/// The architecture of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// The source's own: every block has the same sizes.
    Same(Family),
    /// One that reads head counts and widths per block.
    Uneven(Family),
}

impl Carrier {
    /// Block structure of the output.
    pub fn family(self) -> Family {
        match self {
            Carrier::Same(family) | Carrier::Uneven(family) => family,
        }
    }

    /// Value of `general.architecture`.
    pub fn name(self) -> &'static str {
        self.family().name()
    }
}

/// The carrier for blocks of these shapes, of a model of `family` that `uneven` can carry if they differ
/// (`src/models/llama.cpp` of llama.cpp uses block 0's sizes for all blocks, `src/models/deci.cpp` each block's own; some
/// loaders take no fewer heads at all, or no biases, which is no matter where there is no other).
///
/// # Panics
/// If blocks differ in size and there is no carrier for that.
pub fn carrier_for(family: Family, uneven: Option<Family>, shapes: &[BlockShape]) -> Carrier {
    let equal = shapes.iter().all(|s| *s == shapes[0]);
    if equal && (family.traits().stays || uneven.is_none()) {
        return Carrier::Same(family);
    }
    Carrier::Uneven(uneven.unwrap_or_else(|| panic!("blocks of {} must be equal", family.name())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: BlockShape = BlockShape { n_head: 4, n_head_kv: 2, n_ff: 96 };
    const NARROW: BlockShape = BlockShape { n_ff: 64, ..WIDE };

    #[test]
    fn equal_blocks_stay_what_they_are_where_they_can() {
        let carrier = |f: Family, shapes: &[BlockShape]| carrier_for(f, f.traits().uneven, shapes);
        for &family in Family::ALL.iter().filter(|f| f.traits().stays) {
            assert_eq!(carrier(family, &[WIDE; 3]), Carrier::Same(family));
        }
        for (family, uneven) in [
            (Family::Llama, Family::Deci),
            (Family::Deci, Family::Deci),
            (Family::Qwen2, Family::Deci),
            (Family::Qwen3, Family::OpenElm),
        ] {
            assert_eq!(carrier(family, &[WIDE, NARROW]), Carrier::Uneven(uneven));
        }
        assert_eq!(carrier(Family::Qwen2, &[WIDE; 3]), Carrier::Uneven(Family::Deci));
    }

    #[test]
    #[should_panic(expected = "blocks of gemma3 must be equal")]
    fn gemma3_has_no_carrier_for_uneven_blocks() {
        carrier_for(Family::Gemma3, None, &[WIDE, NARROW]);
    }
}
