//! Splits each feed-forward of a dense model into experts: a test tool for comparing criteria of expert
//! pruning where no small trained mixture of experts is at hand.
//!
//!     cargo run --release --example split_into_experts -- in.gguf out.gguf --file fit.txt --judge other.txt
//!
//! The input has architecture `llama`. The output has the same architecture with experts, as Mixtral does.
//! Each block is split in four steps:
//!
//! 1. Neurons are clustered into experts of equal width, by the part of their activation that a linear map of
//!    the FFN input predicts.
//! 2. The router is the ridge regression of the logarithm of each expert's output norm. It is shifted so that
//!    no expert is chosen by nearly none or nearly all of the tokens.
//! 3. `ffn_down` is refitted by ridge regression, because a token uses only some of the experts.
//! 4. All matrices are trained for a few passes over the tokens, towards the dense FFN's output.
//!
//! Blocks are split in order, each on the residual stream that the split blocks before it produce. The target
//! is in part the dense model's residual stream, so that blocks correct the errors of those before. The
//! experts are Q8_0; all other tensors are copied. Fitting uses the tokens of `--file` only; perplexity is
//! measured on those of `--judge`. The same arguments give the same bytes.

mod algebra;
mod experts;
mod fit;

use clap::Parser;
use experts::Split;
use fit::Fit;
use putri_gguf::calibrate::file_windows;
use putri_gguf::evaluate::Judge;
use putri_gguf::forward::{BlockOutputs, Forward};
use putri_gguf::ggml::{LlamaModel, Type, silence_logs};
use putri_gguf::gguf::{OutTensor, TensorData, Value, write_gguf};
use putri_gguf::model::{Family, Model};
use std::borrow::Cow;
use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

#[derive(Parser)]
struct Args {
    /// Dense model of architecture llama.
    input: PathBuf,
    /// Mixture of experts to write.
    output: PathBuf,
    /// Text to fit to.
    #[arg(long)]
    file: PathBuf,
    /// Text to measure perplexity on.
    #[arg(long)]
    judge: Option<PathBuf>,
    /// Experts per block.
    #[arg(long, default_value_t = 16)]
    experts: usize,
    /// Experts per token.
    #[arg(long, default_value_t = 6)]
    used: usize,
    /// Tokens to fit to.
    #[arg(long, default_value_t = 16384)]
    tokens: usize,
    /// Passes of training over the tokens.
    #[arg(long, default_value_t = 2)]
    passes: usize,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

/// Tokens per window.
const N_CTX: usize = 512;
/// Windows of the judging text.
const JUDGE_WINDOWS: usize = 16;

fn main() -> Result<(), Box<dyn Error>> {
    silence_logs();
    let args = Args::parse();
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global()?;
    let model = Model::open(&args.input)?;
    let n_ff = model.hparams.blocks[0].n_ff;
    if model.hparams.family != Family::Llama || model.hparams.experts.is_some() {
        return Err("only dense models of architecture llama can be split".into());
    }
    if args.experts == 0 || !n_ff.is_multiple_of(args.experts * Type::Q8_0.block_size()) {
        return Err(format!(
            "{n_ff} neurons cannot be split into {} experts of whole Q8_0 blocks",
            args.experts
        )
        .into());
    }
    if !(1..=args.experts).contains(&args.used) {
        return Err(format!("a token cannot use {} of {} experts", args.used, args.experts).into());
    }
    let splits = split(&model, &args)?;
    write(&model, &splits, &args)?;
    if let Some(text) = &args.judge {
        let vocab = LlamaModel::load_vocab(&args.input)?;
        let windows = file_windows(&vocab, std::slice::from_ref(text), N_CTX, JUDGE_WINDOWS)?;
        let mut judge = Judge::new(&model, windows.concat(), N_CTX, args.threads)?;
        let (dense, found) = (judge.dense()?, judge.compare(&Model::open(&args.output)?)?);
        println!("perplexity {:.2}, {:.2} before, KL divergence {:.4}", found.ppl, dense.ppl, found.kl.mean);
    }
    Ok(())
}

/// Splits all blocks.
fn split(model: &Model, args: &Args) -> Result<Vec<Split>, Box<dyn Error>> {
    let vocab = LlamaModel::load_vocab(&args.input)?;
    let n_windows = args.tokens.div_ceil(N_CTX);
    let windows = file_windows(&vocab, std::slice::from_ref(&args.file), N_CTX, n_windows)?;
    let forward = Forward::new(model, N_CTX, args.threads)?;
    let mut dense = forward.embed(model, &windows.concat())?;
    let mut own = dense.clone();
    let mut splits = Vec::new();
    let mut all_used = Vec::new();
    println!("block | error held out: routed, refitted, trained | weight ratio | share of tokens per expert");
    for il in 0..model.hparams.n_layer() {
        let w = model.block(il)?;
        let block = forward.upload(&w)?;
        let mut mid = vec![0.0; own.len()];
        for chunk in forward.chunks(0..windows.len()) {
            let span = forward.span(&chunk);
            let a = forward.attn_out_input(&block, &own[span.clone()], None)?;
            let wanted = BlockOutputs { mid: Some(&mut mid[span.clone()]), ..BlockOutputs::default() };
            forward.from_attn_out_input(&block, &own[span], &a, wanted)?;
        }
        forward.advance(&block, &mut dense)?;
        let mut fit = Fit::new(&w, &mid, &dense, model.hparams.norm_eps, args);
        let (split, y, report) = fit.run(il as u64);
        own.iter_mut().zip(mid.iter().zip(&y)).for_each(|(o, (m, y))| *o = m + y);
        let [routed, refitted, trained] = report.errors;
        let mut used = report.used;
        used.sort_by(f32::total_cmp);
        let shares: Vec<String> = used.iter().map(|u| format!("{:.0}", u * 100.0)).collect();
        println!(
            "{il:5} | {routed:.3} {refitted:.3} {trained:.3} | {:.2} | {} %",
            report.ratio,
            shares.join(" ")
        );
        all_used.extend(used);
        splits.push(split);
    }
    all_used.sort_by(f32::total_cmp);
    let quantiles = [0, 1, 2, 3, 4].map(|q| all_used[(all_used.len() - 1) * q / 4] * 100.0);
    println!("share of tokens per expert, quartiles over all blocks: {quantiles:.1?} %");
    Ok(splits)
}

/// Writes the model with experts.
fn write(model: &Model, splits: &[Split], args: &Args) -> Result<(), Box<dyn Error>> {
    let (n_expert, n_embd) = (args.experts, model.hparams.n_embd);
    let width = model.hparams.blocks[0].n_ff / n_expert;
    let changed = [
        ("llama.feed_forward_length", width),
        ("llama.expert_count", n_expert),
        ("llama.expert_used_count", args.used),
    ];
    let mut metadata = model.file.metadata().to_vec();
    metadata.retain(|(key, _)| changed.iter().all(|(k, _)| k != key));
    metadata.extend(changed.map(|(key, value)| (key.to_string(), Value::U32(value as u32))));
    let mut tensors = Vec::new();
    for t in model.file.tensors() {
        let parts: Vec<&str> = t.name.splitn(3, '.').collect();
        let ["blk", block, role @ ("ffn_gate.weight" | "ffn_up.weight" | "ffn_down.weight")] = parts[..]
        else {
            tensors.push(OutTensor::copy(&model.file, t));
            continue;
        };
        let split = &splits[block.parse::<usize>()?];
        let mut add = |name: &str, ty: Type, ne: &[usize], floats: &[f32]| -> Result<(), Box<dyn Error>> {
            let bytes = ty.quantize(floats, ne[0], None)?;
            let data = TensorData::made(move || Ok(Cow::Owned(bytes.clone())));
            tensors.push(OutTensor { name: format!("blk.{block}.{name}.weight"), ty, ne: ne.to_vec(), data });
            Ok(())
        };
        let all = |i: usize| split.experts.iter().flat_map(|e| &e[i].now).copied().collect::<Vec<f32>>();
        match role {
            "ffn_gate.weight" => {
                add("ffn_gate_inp", Type::F32, &[n_embd, n_expert], &split.router.now)?;
                add("ffn_gate_exps", Type::Q8_0, &[n_embd, width, n_expert], &all(0))?;
            }
            "ffn_up.weight" => add("ffn_up_exps", Type::Q8_0, &[n_embd, width, n_expert], &all(1))?,
            _ => {
                let n = width * n_embd;
                let at = |i: usize| i / n * n + i % width * n_embd + i % n / width;
                let down = all(2);
                let down: Vec<f32> = (0..down.len()).map(|i| down[at(i)]).collect();
                add("ffn_down_exps", Type::Q8_0, &[width, n_embd, n_expert], &down)?;
            }
        }
    }
    let mut out = BufWriter::new(File::create(&args.output)?);
    write_gguf(&mut out, &args.output, &metadata, &tensors)?;
    out.flush()?;
    Ok(())
}
