//! Part of the page about the experts of a mixture: which stay, how often tokens choose them, and what that
//! does to each text.

use super::percent;
use crate::report::document::{Experts, LayerExperts};
use maud::{Markup, html};

/// Sizes in the picture's own units: its width without labels, a row, the label.
const WIDTH: usize = 560;
const ROW: usize = 16;
const LABEL: usize = 34;

/// Sections about the choice, the texts and the experts of each layer.
pub(super) fn experts(e: &Experts) -> Markup {
    let cell = (WIDTH / e.n_expert.max(1)).clamp(3, 14);
    let (wide, tall) = (LABEL + e.n_expert * cell + 4, e.layers.len() * ROW + 4);
    html! {
        section {
            h2 { "Experts" }
            p {
                (e.n_kept) " of " (e.n_expert) " experts stay in each layer; a token passes through "
                (e.n_used) " of them."
            }
            figure {
                svg viewBox=(format!("0 0 {wide} {tall}")) role="img" aria-label="experts that stay in each layer" {
                    @for (i, layer) in e.layers.iter().enumerate() {
                        (row(i, layer, e.n_expert, cell))
                    }
                }
                figcaption {
                    "One row per layer, one cell per expert: filled cells stay. The darker a cell, the more tokens chose it."
                }
            }
        }
        @if !e.steps.is_empty() {
            section {
                h2 { "Choice" }
                table {
                    tr { th { "Step" } th { "KL divergence" } th { "" } }
                    @for s in &e.steps {
                        tr {
                            td { (s.name) }
                            td { (format!("{:.4}", s.kl_divergence)) }
                            td { @if !s.kept { "undone" } }
                        }
                    }
                }
            }
        }
        section {
            h2 { "Texts" }
            table {
                tr { th { "Text" } th { "Before" } th { "After" } th { "KL divergence" } th { "Same top token" } }
                @for t in &e.texts {
                    tr {
                        td { (t.name) }
                        td { (format!("{:.2}", t.ppl_before)) }
                        td { (format!("{:.2}", t.ppl_after)) }
                        td { (format!("{:.4}", t.kl_divergence)) }
                        td { (percent(t.top1)) }
                    }
                }
            }
        }
    }
}

/// Cells of one layer.
fn row(i: usize, layer: &LayerExperts, n_expert: usize, cell: usize) -> Markup {
    let y = i * ROW + 2;
    let most = layer.tokens.iter().copied().max().unwrap_or(0).max(1) as f64;
    html! {
        text x=(LABEL - 8) y=(y + 11) class="n" { (layer.layer) }
        @for e in 0..n_expert {
            @let tokens = layer.tokens.get(e).copied();
            @let shade = tokens.map_or(1.0, |n| 0.25 + 0.75 * n as f64 / most);
            @let kept = layer.kept.contains(&e);
            rect x=(LABEL + e * cell) y=(y) width=((cell - 1).max(2)) height="12" rx="2"
                class=(if kept { "ff" } else { "off" }) opacity=(format!("{shade:.2}")) {
                title {
                    (format!(
                        "layer {}, expert {e}: {}{}",
                        layer.layer,
                        if kept { "stays" } else { "removed" },
                        tokens.map_or(String::new(), |n| format!(", chosen by {n} tokens"))
                    ))
                }
            }
        }
    }
}
