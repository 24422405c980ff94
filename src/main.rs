//! `putri-gguf`: parse, run, exit code.
#![deny(unsafe_code)]

mod cli;

/// Says what is wrong where there is no memory left.
#[global_allocator]
static ALLOCATOR: putri_gguf::ggml::Allocator = putri_gguf::ggml::Allocator;

fn main() -> std::process::ExitCode {
    cli::main()
}
