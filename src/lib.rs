//! x
pub mod forward;
pub mod ggml;
pub mod gguf;
pub mod model;
