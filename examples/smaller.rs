//! Prunes a model from another program: `cargo run --release --example smaller -- in.gguf out.gguf 0.2`

use putri_gguf::{Job, JobError, Observer, run, silence_logs};

/// Says which stage runs; a program with a window would move a bar.
struct Stages;

impl Observer for Stages {
    fn stage(&mut self, name: &str, steps: usize) {
        eprintln!("{name}, {steps} steps");
    }

    fn step(&mut self, _done: usize, _note: &str) {}

    /// Asked again and again: here nobody wants to stop.
    fn interrupted(&self) -> bool {
        false
    }
}

fn main() -> Result<(), JobError> {
    let mut args = std::env::args().skip(1);
    let (Some(input), Some(output), Some(share)) = (args.next(), args.next(), args.next()) else {
        eprintln!("usage: smaller INPUT OUTPUT SPARSITY");
        std::process::exit(2);
    };
    let sparsity = share.parse().unwrap_or_else(|_| {
        eprintln!("{share} is not a share, as in 0.2");
        std::process::exit(2);
    });
    silence_logs();
    let mut job = Job::new(input, output);
    job.settings.sparsity = sparsity;
    let outcome = run(&job, &mut Stages)?;
    println!("{}: {} bytes, {} before", outcome.output.display(), outcome.after.bytes, outcome.before.bytes);
    if let Some(q) = outcome.quality {
        println!("perplexity {:.2}, {:.2} before", q.held_out.ppl, q.held_out.base_ppl);
    }
    Ok(())
}
