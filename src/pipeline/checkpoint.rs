//! What a run settles, step by step, so that one that was interrupted can go on where it was.

use super::BlockPlan;
use crate::gguf::GgufError;
use crate::prune::{Choice, LazyGreedy};

/// What an earlier run of the same job settled.
#[derive(Clone, Debug, Default)]
pub struct Settled {
    /// The search for heads as it was after a step.
    pub heads: Option<LazyGreedy>,
    /// Width per block.
    pub widths: Option<Vec<usize>>,
    /// What neurons go by.
    pub choice: Option<Choice>,
    /// The first blocks, pruned and requantised, and what the user should know of each.
    pub blocks: Vec<(BlockPlan, Vec<String>)>,
}

/// Who remembers what is settled. By default nothing is.
pub trait Journal {
    /// What was settled before.
    ///
    /// # Errors
    /// [`GgufError`] if it cannot be read.
    fn settled(&mut self) -> Result<Settled, GgufError> {
        Ok(Settled::default())
    }

    /// One more group has gone.
    ///
    /// # Errors
    /// [`GgufError`] if it cannot be written.
    fn heads(&mut self, _search: &LazyGreedy) -> Result<(), GgufError> {
        Ok(())
    }

    /// Widths are chosen.
    ///
    /// # Errors
    /// [`GgufError`] if it cannot be written.
    fn widths(&mut self, _widths: &[usize]) -> Result<(), GgufError> {
        Ok(())
    }

    /// It is known what neurons go by.
    ///
    /// # Errors
    /// [`GgufError`] if it cannot be written.
    fn choice(&mut self, _choice: Choice) -> Result<(), GgufError> {
        Ok(())
    }

    /// Block `il` is done.
    ///
    /// # Errors
    /// [`GgufError`] if it cannot be written.
    fn block(&mut self, _il: usize, _plan: &BlockPlan, _warnings: &[String]) -> Result<(), GgufError> {
        Ok(())
    }
}

/// Remembers nothing.
impl Journal for () {}
