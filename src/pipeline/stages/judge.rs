//! Comparison of the pruned model with the dense one on the held-out windows, at the end of a method.

use super::Stage;
use crate::pipeline::PruneError;
use crate::pipeline::forecast::{StageForecast, Work};
use crate::pipeline::run::Run;
use crate::pipeline::stream::Streams;

/// Stage that compares the residual streams that the passes left after the last block.
pub(in crate::pipeline) struct JudgeStreams;

impl Stage for JudgeStreams {
    fn forecast(&self, _: &Work) -> Vec<StageForecast> {
        Vec::new()
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        let Some(Streams { dense, pruned }) = run.streams.take() else { return Ok(()) };
        let held_out = run.forward.span(&(run.fitted.n_fit..run.fitted.n_windows()));
        run.judge([&dense[held_out.clone()], &pruned[held_out]])
    }
}

/// Stage that carries the held-out windows through the plan and compares the results.
pub(in crate::pipeline) struct EvaluatePlan;

impl Stage for EvaluatePlan {
    fn forecast(&self, _: &Work) -> Vec<StageForecast> {
        Vec::new()
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        let w = run.windows;
        let tokens = w.tokens_of(w.n_fit..w.n_windows());
        let embedded = |model| run.forward.embed(model, tokens);
        let mut streams = [embedded(run.reference)?, embedded(run.model)?];
        let n_layer = run.model.hparams.n_layer();
        run.observer.stage("evaluate", n_layer);
        for il in 0..n_layer {
            run.check_interrupted()?;
            let dense = run.forward.upload(&run.reference.block(il)?)?;
            let pruned = run.forward.upload(&run.plan.block(run.model, il)?)?;
            for (stream, block) in streams.iter_mut().zip([&dense, &pruned]) {
                run.forward.advance(block, stream)?;
            }
            run.observer.step(il + 1, "");
        }
        run.judge([&streams[0], &streams[1]])
    }
}
