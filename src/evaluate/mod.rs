//! Evaluation of a file by libllama, the runtime that will run it, and of a pruned model against the dense
//! one by the crate's own forward pass.

mod compare;
mod file;
mod window;

pub use crate::numeric::{Kl, Metrics};
pub use compare::{Judge, own_losses};
pub use file::{
    EvaluateError, Evaluation, Protocol, Speed, Task, accuracy, continuation, evaluate, llama_losses, speed,
    tasks, windows,
};
