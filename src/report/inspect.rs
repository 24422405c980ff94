//! Output of `inspect`.

use super::plain;
use super::table::{megabytes, millions};
use crate::Inspection;
use crate::model::BlockShape;
use serde_json::{Value, json};
use std::fmt::Write;

/// Inspection as text for a terminal.
pub fn inspection_table(i: &Inspection) -> String {
    let mut out = String::new();
    let mut line = |label: &str, text: String| {
        let _ = writeln!(out, "{label:<16} {}", plain(&text));
    };
    let all = i.size.params;
    let share = |n: usize| format!("{} ({:.1} %)", millions(n), n as f64 / all as f64 * 100.0);
    line("name", i.name.clone().unwrap_or_else(|| "-".into()));
    line("architecture", i.arch.clone());
    line("file", megabytes(i.size.bytes));
    line("parameters", millions(all));
    line("  attention", share(i.attention_params));
    line("  feed-forward", share(i.ffn_params));
    line("  embeddings", share(i.embedding_params) + if i.tied { ", tied" } else { ", untied" });
    line("blocks", i.size.blocks.len().to_string());
    line("heads", of_blocks(&i.size.blocks, |b| b.n_head));
    line("KV heads", of_blocks(&i.size.blocks, |b| b.n_head_kv));
    line("neurons", of_blocks(&i.size.blocks, |b| b.n_ff));
    if let Some(n_used) = i.n_expert_used {
        line("experts", of_blocks(&i.size.blocks, |b| b.n_expert) + &format!(", {n_used} for a token"));
    }
    if let Some(m) = &i.mixture {
        let steps = if m.step == 1 { "one by one".into() } else { format!("in steps of {}", m.step) };
        let drafts = match m.n_drafts {
            0 => String::new(),
            n => format!("; {n} of them draft tokens (MTP), whose routers cannot be observed"),
        };
        line(
            "  can go",
            format!(
                "down to {} of {} in each of {} layers, {steps}{drafts}",
                m.least, m.n_expert, m.n_layers
            ),
        );
        let widths = match &m.widths[..] {
            [] => "not in this architecture".into(),
            [first, second, .., most] if m.widths.len() > 4 => {
                format!("to {first}, {second}, … {most} neurons")
            }
            all => format!("to {} neurons", all.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")),
        };
        line("  narrower", widths);
    }
    line("n_embd", i.n_embd.to_string());
    line("head_dim", i.head_dim.to_string());
    line("vocabulary", i.n_vocab.to_string());
    line("context", i.n_ctx_train.to_string());
    let types = i.types.iter().map(|(ty, n, bytes)| format!("{ty} ({n} tensors, {})", megabytes(*bytes)));
    line("types", types.collect::<Vec<_>>().join(", "));
    line("pruned file", format!("architecture {}: {}", i.output_arch, i.why));
    let of = if i.mixture.is_some() { "experts" } else { "blocks" };
    line("sparsity", format!("up to about {:.2} of the {of}, {}", i.reachable, sizes(i)));
    out
}

/// Inspection as a JSON object.
pub fn inspection_json(i: &Inspection) -> String {
    let per_block = |f: fn(&BlockShape) -> usize| i.size.blocks.iter().map(f).collect::<Vec<_>>();
    let types: Vec<Value> = i
        .types
        .iter()
        .map(|(ty, n, bytes)| json!({ "type": ty.name(), "tensors": n, "bytes": bytes }))
        .collect();
    let object = json!({
        "architecture": i.arch,
        "name": i.name,
        "bytes": i.size.bytes,
        "parameters": {
            "all": i.size.params,
            "attention": i.attention_params,
            "feed_forward": i.ffn_params,
            "embeddings": i.embedding_params,
        },
        "tied": i.tied,
        "block_count": i.size.blocks.len(),
        "n_head": per_block(|b| b.n_head),
        "n_head_kv": per_block(|b| b.n_head_kv),
        "n_ff": per_block(|b| b.n_ff),
        "n_expert": i.size.blocks.iter().map(|b| b.n_expert).max(),
        "n_expert_used": i.n_expert_used.unwrap_or(0),
        "n_embd": i.n_embd,
        "head_dim": i.head_dim,
        "n_vocab": i.n_vocab,
        "n_ctx_train": i.n_ctx_train,
        "types": types,
        "output_arch": { "architecture": i.output_arch, "why": i.why, "per_block": i.per_block },
        "mixture": i.mixture.as_ref().map(|m| json!({
            "n_expert_least": m.least,
            "n_expert_step": m.step,
            "layers": m.n_layers,
            "layers_that_draft": m.n_drafts,
            "widths": m.widths,
        })),
        "reachable_sparsity": i.reachable,
    });
    format!("{object:#}")
}

fn sizes(i: &Inspection) -> &'static str {
    if i.mixture.is_some() {
        return "as many experts in every layer";
    }
    if i.per_block { "head counts and widths per block" } else { "as many heads and neurons in every block" }
}

/// Number that all blocks share, or the numbers of all.
fn of_blocks(blocks: &[BlockShape], f: fn(&BlockShape) -> usize) -> String {
    let all: Vec<usize> = blocks.iter().map(f).collect();
    let [least, most] = [all.iter().min(), all.iter().max()].map(|n| n.copied().unwrap_or(0));
    if least == most {
        return format!("{most} in each block");
    }
    all.iter().map(usize::to_string).collect::<Vec<_>>().join(" ")
}
