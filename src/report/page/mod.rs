//! Report as one HTML page, without scripts or network access, in light and dark.

mod experts;
mod picture;

use super::document::{HeldOut, Options, QuantBaseline, Report, Samples, file_name};
use experts::experts;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use picture::picture;
use serde_json::Value;

/// HTML page of `report`.
pub fn page(report: &Report) -> String {
    let name = file_name(&report.input.path);
    let removed = percent(report.sparsity);
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (name) ": pruned by " (removed) }
                style { (PreEscaped(include_str!("style.css"))) }
            }
            body {
                main {
                    header {
                        h1 { (name) }
                        p { (removed) " of the blocks removed, written as " (report.output.architecture) }
                    }
                    (tiles(report))
                    @match &report.experts {
                        Some(e) => (experts(e)),
                        None => section {
                            h2 { "Blocks" }
                            (picture(report))
                        },
                    }
                    @if !report.quant_baselines.is_empty() {
                        (quant_baselines(&report.quant_baselines))
                    }
                    @if let Some(s) = &report.samples {
                        (samples(s))
                    }
                    @if !report.notes.is_empty() {
                        section {
                            h2 { "Notes" }
                            ul {
                                @for note in &report.notes {
                                    li { (note) }
                                }
                            }
                        }
                    }
                    (table("How it was made", details(report)))
                    (table("Options", options(&report.options)))
                }
            }
        }
    };
    page.into_string() + "\n"
}

/// Large figures: the result's values, and the source's.
fn tiles(report: &Report) -> Markup {
    let (before, after) = (&report.before, &report.after);
    html! {
        section class="tiles" {
            (tile("File", &mebibytes(after.bytes), &than(mebibytes(before.bytes), before.bytes, after.bytes)))
            (tile(
                "Parameters",
                &millions(after.parameters),
                &than(millions(before.parameters), before.parameters as u64, after.parameters as u64),
            ))
            @if let Some(r) = &report.running {
                (tile(
                    &format!("To run {} tokens", r.ctx_size),
                    &mebibytes(r.after.bytes),
                    &than(mebibytes(r.before.bytes), r.before.bytes, r.after.bytes),
                ))
            }
            @if let Some(q) = &report.held_out {
                (quality_tiles(q))
            }
        }
    }
}

fn quality_tiles(q: &HeldOut) -> Markup {
    let (before, after) = (q.ppl_before, q.ppl());
    let ratio = format!("{before:.2} before, x {:.2}", after / before);
    html! {
        (tile("Perplexity", &format!("{after:.2}"), &ratio))
        (tile(
            "KL divergence",
            &format!("{:.3}", q.kl_divergence),
            &format!("same top token in {}", percent(q.top1)),
        ))
    }
}

fn tile(label: &str, value: &str, note: &str) -> Markup {
    html! {
        div class="tile" {
            span { (label) }
            strong { (value) }
            small { (note) }
        }
    }
}

/// Value before, as `shown`, and the change since.
fn than(shown: String, before: u64, after: u64) -> String {
    format!("{shown} before, {:+.1} %", (after as f64 / before as f64 - 1.0) * 100.0)
}

/// Table of the result and of files of about its size that are only quantised.
fn quant_baselines(files: &[QuantBaseline]) -> Markup {
    html! {
        section {
            h2 { "As many bytes by quantisation alone" }
            table {
                tr {
                    th {}
                    th { "file" }
                    th { "perplexity" }
                    th { "KL divergence" }
                    th { "same top token" }
                }
                @for file in files {
                    tr {
                        th { (file.name) }
                        td { (mebibytes(file.bytes)) }
                        td { (format!("{:.2}", file.ppl)) }
                        td { (format!("{:.4}", file.kl_divergence)) }
                        td { (percent(file.top1)) }
                    }
                }
            }
        }
    }
}

fn samples(s: &Samples) -> Markup {
    let side = |title: &str, text: &str| {
        html! {
            div {
                h3 { (title) }
                p class="text" {
                    b { (s.prompt) }
                    (text)
                }
            }
        }
    };
    html! {
        section {
            h2 { "The same beginning, continued" }
            div class="pair" {
                (side("before", &s.before))
                (side("after", &s.after))
            }
        }
    }
}

/// Row of a table; a row without a value is left out.
type Row = (String, Option<String>);

fn table(title: &str, rows: Vec<Row>) -> Markup {
    html! {
        section {
            h2 { (title) }
            table {
                @for (name, value) in rows {
                    @if let Some(value) = value {
                        tr {
                            th { (name) }
                            td { (value) }
                        }
                    }
                }
            }
        }
    }
}

/// Rows of all details besides the options.
fn details(r: &Report) -> Vec<Row> {
    let q = r.held_out.as_ref();
    let rows = [
        ("input", Some(r.input.path.clone())),
        ("input SHA-256", r.input.sha256.clone()),
        ("output", Some(r.output.path.clone())),
        ("output SHA-256", Some(r.output.sha256.clone())),
        ("calibration", r.calibration.clone()),
        ("calibration tokens", q.map(|q| q.calibration_tokens.to_string())),
        ("held-out tokens", q.map(|q| q.tokens.to_string())),
        ("perplexity by our own forward", q.map(|q| q.ppl_after.to_string())),
        ("seconds", r.seconds.map(|s| format!("{s:.0}"))),
        ("peak memory, MiB", r.peak_memory_bytes.map(|bytes| (bytes >> 20).to_string())),
        ("putri-gguf", Some(r.version.to_string())),
        ("engine", Some(r.engine.to_string())),
    ];
    rows.map(|(name, value)| (name.to_string(), value)).into()
}

/// Rows of the options, with the names and values of the JSON report.
fn options(options: &Options) -> Vec<Row> {
    let shown = |value: Value| match value {
        Value::Null => None,
        Value::String(text) => Some(text),
        Value::Array(list) if list.is_empty() => None,
        other => Some(other.to_string()),
    };
    match serde_json::json!(options) {
        Value::Object(fields) => fields.into_iter().map(|(name, value)| (name, shown(value))).collect(),
        _ => Vec::new(),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn millions(n: usize) -> String {
    format!("{:.1} M", n as f64 / 1e6)
}
