//! Output of a dry run.

use super::table::{megabytes, millions, percent};
use crate::{BlocksDryRun, DryRun, ExpertsDryRun};
use std::fmt::Write;

/// Shares of a plain product's rate, measured on two cores.
/// `GRAPHS` is that of products in graphs. `ALGEBRA` is that of the algebra, of half the rate, because it
/// counts as in 64 bits. `WRITING` is that of libllama when it generates the tokens of many windows in
/// parallel.
const GRAPHS: f64 = 0.65;
const ALGEBRA: f64 = 0.6;
const WRITING: f64 = 0.14;

/// Dry run as text for a terminal; `rate` is the machine's rate in a plain product, in operations per second.
pub fn dry_run_table(d: &DryRun, rate: Option<f64>) -> String {
    match d {
        DryRun::Blocks(d) => blocks_table(d, rate),
        DryRun::Experts(d) => experts_table(d),
    }
}

fn experts_table(d: &ExpertsDryRun) -> String {
    let mut out = format!("{:<22} {:>14} {:>14}\n", "", "before", "after");
    let mut line = |label: &str, before: String, after: String, change: String| {
        let _ = writeln!(out, "{label:<22} {before:>14} {after:>14}   {change}");
    };
    let (p, q) = (d.before.bytes, d.after.bytes);
    line("file", megabytes(p), megabytes(q), percent(p as f64, q as f64));
    let (p, q) = (d.before.params, d.after.params);
    line("parameters", millions(p), millions(q), percent(p as f64, q as f64));
    let [p, q] = d.n_expert;
    line("experts a layer", p.to_string(), q.to_string(), percent(p as f64, q as f64));
    let (observed, judging) = d.tokens;
    let _ = writeln!(
        out,
        "\nThe file will have {} bytes, to the byte. {} layers lose experts; a token still passes through {} of them,\n\
         so that speed stays about the same. Architecture {}, as before.\n\
         {observed} tokens are decoded to observe the routers, {judging} to judge the result, {} of them written by the\n\
         model itself. llama.cpp decodes them with the memory that it takes to run the source.",
        d.after.bytes, d.n_layers, d.n_used, d.arch, d.self_written
    );
    out
}

/// Dry run of the passes over the blocks; `rate` is the machine's rate in a plain product, in operations per second.
fn blocks_table(d: &BlocksDryRun, rate: Option<f64>) -> String {
    let f = &d.forecast;
    let groups: usize = d.before.blocks.iter().map(|b| b.n_head_kv).sum();
    let units: usize = d.before.blocks.iter().map(|b| b.n_units(d.ffn_unit)).sum();
    let width = units as f64 / d.before.blocks.len() as f64;
    let mut out = format!("{:<22} {:>14} {:>14}\n", "", "before", "after");
    let mut line = |label: &str, before: String, after: String, change: String| {
        let _ = writeln!(out, "{label:<22} {before:>14} {after:>14}   {change}");
    };
    let (before, after) = (d.before.bytes, f.file_bytes);
    line("file", megabytes(before), megabytes(after), percent(before as f64, after as f64));
    line(
        "KV heads",
        groups.to_string(),
        (groups - f.n_groups).to_string(),
        percent(groups as f64, (groups - f.n_groups) as f64),
    );
    let (before, after) = (d.kv_cache.bytes(d.run_ctx), f.kv_cache.bytes(d.run_ctx));
    let label = format!("KV cache, {} tokens", d.run_ctx);
    line(&label, megabytes(before), megabytes(after), percent(before as f64, after as f64));
    line(
        &format!("{} a block", d.ffn_unit.plural()),
        format!("{width:.0}"),
        format!("{:.0}", f.mean_width),
        percent(width, f.mean_width),
    );
    let (share, arch) = (f.sparsity * 100.0, f.output_arch.name());
    let _ = writeln!(out, "\nSparsity {share:.1} % of the blocks, architecture {arch}. New values have:");
    for n in &f.new_matrices {
        let blocks = format!("{:<12} of {:>3} blocks, in {}", n.role, n.n_blocks, n.written);
        let why = format!(" instead of {}, of whose blocks rows would be no multiple", n.wanted);
        let _ = writeln!(out, "  {blocks}{}", if n.wanted == n.written { "" } else { &why });
    }
    out.push('\n');

    let _ =
        writeln!(out, "{:<22} {:>9} {:>10} {:>12} {:>12}", "", "seconds", "GFLOP", "GFLOP (f64)", "memory");
    let seconds = |graphs: f64, algebra: f64| {
        rate.map(|rate| graphs / (rate * GRAPHS) + algebra / (rate / 2.0 * ALGEBRA))
    };
    let shown = |s: Option<f64>| s.map_or("?".into(), |s| format!("{s:.0}"));
    let mut total = Some(0.0);
    if d.self_written > 0 {
        let operations = 2.0 * d.before.params as f64 * d.self_written as f64;
        let time = rate.map(|rate| operations / (rate * WRITING));
        total = total.zip(time).map(|(a, b)| a + b);
        let _ = writeln!(out, "{:<22} {:>9}", "calibration text", shown(time));
    }
    for s in &f.stages {
        let time = seconds(s.operations, s.algebra);
        total = total.zip(time).map(|(a, b)| a + b);
        let _ = writeln!(
            out,
            "{:<22} {:>9} {:>10.0} {:>12.0} {:>8.2} GiB",
            s.name,
            shown(time),
            s.operations / 1e9,
            s.algebra / 1e9,
            s.memory / f64::from(1 << 30),
        );
    }
    let _ = writeln!(
        out,
        "{:<22} {:>9} {:>36}",
        "in all",
        shown(total),
        format!("{:.2} GiB", f.memory() / f64::from(1 << 30))
    );
    let (spills, devices) = (!d.settings.spill.is_memory(), !d.settings.devices.is_empty());
    if spills || devices {
        let files = if spills { "Streams are kept in files beside the output. " } else { "" };
        let there = format!("Devices take up to {:.2} GiB of theirs. ", f.on_devices() / f64::from(1 << 30));
        let there = if devices { &there } else { "" };
        let _ = writeln!(out, "\n{files}{there}{} tokens pass through a block at a time.", d.chunk_tokens);
    }
    if d.quantises {
        out += "\nSizes are those in the source's types, not in the type that the result is written in.\n";
    }
    let _ = writeln!(
        out,
        "\nAll of it is an estimate from shapes: the size within a percent or two, memory (without the mapped file)\nwithin a fifth, time by a product of 2048 x 2048 floats that was just timed."
    );
    out
}
