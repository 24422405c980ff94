//! Program `putri-gguf`: parses the command line, runs it and returns the exit code.
#![deny(unsafe_code)]

mod cli;

/// Allocator that reports when there is no memory left.
#[global_allocator]
static ALLOCATOR: putri_gguf::ggml::Allocator = putri_gguf::ggml::Allocator;

fn main() -> std::process::ExitCode {
    cli::main()
}
