//! Arguments of the command line. Each option has one definition: the first paragraph of its comment is its
//! line in `-h`, and all paragraphs are its text in `--help`, in the manual page and in docs/cli.md.

mod choices;
mod eval;
mod prune;
mod recover;

pub use choices::{
    ArchArg, ExpertCriterionArg, HeadsArg, MethodArg, MoeArg, PplStyle, RecoverMethodArg, RouterWeightsArg,
};
pub use eval::{DeviceArgs, EvalArgs};
pub use prune::Args;
pub use recover::RecoverArgs;

use clap::{Parser, Subcommand};
use std::path::PathBuf;

/// Make a GGUF language model smaller and faster by structured pruning.
///
/// putri-gguf removes whole attention heads and feed-forward neurons, or whole experts of mixtures of
/// experts. It refits what is kept and writes a GGUF that stock llama.cpp and Ollama run. Without --file, the
/// model generates its own calibration text. The source is never changed, and the output appears once it is
/// complete and verified.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "putri-gguf",
    version = version(),
    max_term_width = 100,
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    disable_help_subcommand = true,
    override_usage = "putri-gguf [OPTIONS] --sparsity <S> <INPUT> <OUTPUT>\n       putri-gguf inspect|eval|recover|verify [OPTIONS] <MODEL>"
)]
pub struct Cli {
    /// Command other than pruning.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Arguments of pruning.
    #[command(flatten)]
    pub prune: Option<Args>,
    /// Choice of devices. It is not part of `prune`, because an optional group of arguments cannot contain
    /// another group.
    #[command(flatten)]
    pub devices: DeviceArgs,
    /// Show llama.cpp's own messages on stderr
    ///
    /// llama.cpp reports on loading, devices and memory there, in many lines. By default they are hidden, and
    /// its errors become part of putri-gguf's. --quiet hides the progress only, so the two go together.
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

/// Commands other than pruning.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Show what a model consists of and what can be removed
    ///
    /// inspect reads the header only, so it is fast for files of any size. It shows parameters by part,
    /// heads, widths, types, the architecture that a pruned file would have and why, and the largest sparsity
    /// that can be reached.
    Inspect {
        /// The model (GGUF, or ollama:NAME)
        ///
        /// Of a split model, give the first part.
        input: PathBuf,
        /// Print the result as a JSON object
        ///
        /// The object goes to stdout in place of the table.
        #[arg(long)]
        json: bool,
    },
    /// Measure a model with llama.cpp: perplexity, KL divergence, speed
    ///
    /// eval works on any GGUF that llama.cpp loads, pruned or not. --base adds a comparison with a second
    /// model.
    Eval(EvalArgs),
    /// Train a pruned model on its source's predictions
    ///
    /// recover moves all kept weights so that the predictions come closer to the source's, and rounds them to
    /// the types of the pruned file, whose size does not change. It may be run again on its own result. What
    /// does not help on held-out text is undone.
    Recover(Box<RecoverArgs>),
    /// Check that a pruned file is intact
    ///
    /// verify loads the file and compares its predictions on a few tokens with those recorded in its metadata
    /// when it was written. With --source it also compares the file with its source. Exit code 1: something
    /// is wrong.
    Verify {
        /// The pruned file
        model: PathBuf,
        /// Also compare with the source of the pruned file
        ///
        /// verify checks the source's hash, the sparsity, and that the rows of Q, K, V, gate and up are those
        /// of the source for the same heads and neurons.
        #[arg(long, value_name = "MODEL")]
        source: Option<PathBuf>,
        /// Number of threads, at most one per core [default: all cores]
        ///
        /// From 1 to 512.
        #[arg(short, long, value_name = "N")]
        threads: Option<usize>,
        /// Print the result as a JSON object
        ///
        /// The object goes to stdout in place of the table.
        #[arg(long)]
        json: bool,
        /// Show no progress on stderr
        ///
        /// The result on stdout and errors on stderr are still printed.
        #[arg(short, long)]
        quiet: bool,
    },
    /// List the devices that --device takes
    ///
    /// putri-gguf --list-devices does the same, as in llama.cpp.
    Devices {
        /// Also list the devices of these machines
        ///
        /// Name a machine as HOST:PORT. On each, putri-gguf rpc-server or llama.cpp's rpc-server has to run.
        #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
        rpc: Vec<String>,
    },
    /// Let other machines compute on this one with --rpc; trusted networks only
    ///
    /// The server computes on the CPU for one client at a time, until it is stopped. The protocol has no
    /// password: run it in trusted networks only.
    RpcServer {
        /// Address to listen on
        ///
        /// By default only this machine can connect; 0.0.0.0 listens on all its addresses.
        #[arg(long, default_value = "127.0.0.1")]
        host: String,
        /// Port to listen on
        ///
        /// The clients name it in --rpc HOST:PORT.
        #[arg(short, long, default_value_t = 50052)]
        port: u16,
        /// Number of threads, at most one per core [default: all cores]
        ///
        /// From 1 to 512.
        #[arg(short, long, value_name = "N")]
        threads: Option<usize>,
    },
    /// Print completions for a shell
    ///
    /// The output is a script for that shell. make install installs those for bash, zsh and fish.
    Completions {
        /// Shell to print completions for
        shell: clap_complete::Shell,
    },
    /// Print the manual page, in roff
    ///
    /// make install installs it for the command man.
    Man,
    /// Print the reference of all commands and options, in Markdown
    #[command(hide = true)]
    Reference,
}

/// Default number of tokens per window.
pub const DEFAULT_CTX: usize = 512;

const EXAMPLES: &str = "\
Examples:
  putri-gguf inspect model.gguf
  putri-gguf model.gguf smaller.gguf --sparsity 0.2
  putri-gguf model.gguf smaller.gguf --target-size 3.8G --file notes.txt --file manual.txt
  putri-gguf eval smaller.gguf --base model.gguf --file other.txt";

/// Version, engine, backends and CPU features.
fn version() -> &'static str {
    static TEXT: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    TEXT.get_or_init(|| {
        format!(
            "{}\nengine: ggml {} (llama-cpp-sys-2 {})\nbackends: {}\nCPU features: {}",
            env!("CARGO_PKG_VERSION"),
            putri_gguf::ggml::engine_version(),
            env!("PUTRI_ENGINE_CRATE"),
            env!("PUTRI_BACKENDS"),
            putri_gguf::ggml::cpu_features().join(" ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn args(more: &[&str]) -> Args {
        let base = ["putri-gguf", "in.gguf", "out.gguf", "--sparsity", "0.2"];
        Cli::try_parse_from(base.iter().chain(more)).unwrap().prune.unwrap()
    }

    #[test]
    fn definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn old_spellings_are_understood() {
        for option in ["--twins", "--resample-copies"] {
            assert_eq!(args(&[option, "3"]).resample_copies, Some(3));
        }
        for (old, new, moe) in [("whole", "experts", MoeArg::Experts), ("narrow", "width", MoeArg::Width)] {
            assert_eq!([args(&["--experts", old]).moe, args(&["--moe", new]).moe], [moe, moe]);
        }
    }

    #[test]
    fn commands_can_be_verbose() {
        let verbose =
            |words: &[&str]| Cli::try_parse_from(["putri-gguf"].iter().chain(words)).unwrap().verbose;
        assert!(verbose(&["in.gguf", "out.gguf", "--sparsity", "0.2", "-v"]));
        assert!(verbose(&["eval", "in.gguf", "-v"]) && verbose(&["verify", "in.gguf", "--verbose"]));
        assert!(!verbose(&["eval", "in.gguf"]));
    }
}
