//! Judging: a file by the runtime that will run it, libllama; a pruned model against the dense one by
//! our own forward pass.

mod compare;
mod file;
mod window;

pub use crate::numeric::{Kl, Metrics};
pub use compare::{Judge, own_losses};
pub use file::{
    EvaluateError, Evaluation, Protocol, Speed, Task, accuracy, continuation, evaluate, llama_losses, speed,
    tasks, windows,
};
