//! Which architecture stock llama.cpp can run the pruned model in.

use super::{BlockShape, Family};

/// The architecture of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// Every block has the same sizes: the source's own architecture.
    Same(Family),
    /// Blocks differ: `deci`, which reads head counts and widths per block.
    Deci,
}

impl Carrier {
    /// Value of `general.architecture`.
    pub fn name(self) -> &'static str {
        match self {
            Carrier::Same(family) => family.name(),
            Carrier::Deci => Family::Deci.name(),
        }
    }
}

/// The carrier for blocks of these shapes (`src/models/llama.cpp` of llama.cpp uses block 0's sizes
/// for all blocks, `src/models/deci.cpp` each block's own).
pub fn carrier_for(family: Family, shapes: &[BlockShape]) -> Carrier {
    let uniform = shapes.iter().all(|s| *s == shapes[0]);
    if uniform { Carrier::Same(family) } else { Carrier::Deci }
}
