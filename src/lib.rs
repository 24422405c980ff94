//! x
pub mod ggml;
pub mod gguf;
pub mod model;
