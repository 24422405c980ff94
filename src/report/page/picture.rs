//! Pictures of the page: the kept part of each block, and the loss by its width.

use crate::model::FfnUnit;
use crate::report::document::{Block, Report, Shape};
use maud::{Markup, html};

/// Sizes in the picture's own units: the cell of a group, the widest bar, the gap between rows, the label.
const CELL: usize = 14;
const BAR: usize = 320;
const ROW: usize = 18;
const LABEL: usize = 34;

/// Height of the columns of [`curve`], and the distance between them.
const TALLEST: usize = 90;
const COLUMN: usize = 12;

/// Picture of the blocks, and of the estimated losses by their widths if they are known.
pub(super) fn picture(report: &Report) -> Markup {
    let layout = Layout::new(report);
    let losses: Option<Vec<f64>> = report.blocks.iter().map(|b| b.loss).collect();
    let what = layout.what;
    html! {
        figure {
            svg viewBox=(view(layout.bars + BAR + 4, report.blocks.len() * ROW + 4)) role="img"
                aria-label=(format!("KV heads and {what} that stay in each block")) {
                @for (il, block) in report.blocks.iter().enumerate() {
                    (layout.row(il, block))
                }
            }
            figcaption {
                "One row per block: KV heads with their query heads (filled: kept), and the " (what) " that stay."
            }
        }
        @if let Some(losses) = losses.filter(|losses| !losses.is_empty()) {
            (curve(&losses))
        }
    }
}

/// Sizes that all rows share.
struct Layout {
    /// Number of FFN units that bars show, and their name.
    units: fn(&Shape) -> usize,
    what: &'static str,
    /// Width of a group's cell.
    cell: usize,
    /// Horizontal position at which bars begin.
    bars: usize,
    /// Number of units of the widest FFN.
    widest: usize,
}

impl Layout {
    fn new(report: &Report) -> Layout {
        let units: fn(&Shape) -> usize = match report.ffn_unit {
            FfnUnit::Expert => |s| s.n_expert,
            FfnUnit::Neuron => |s| s.n_ff,
        };
        let largest = |f: fn(&Shape) -> usize| report.blocks.iter().map(|b| f(&b.before)).max().unwrap_or(0);
        let n_groups = largest(|s| s.n_head_kv);
        // Many groups get smaller cells, so that they fit on a phone's screen.
        let cell = CELL.min(224 / n_groups.max(1)).max(3);
        Layout {
            units,
            what: report.ffn_unit.plural(),
            cell,
            bars: LABEL + n_groups * cell + 12,
            widest: largest(units).max(1),
        }
    }

    /// Row of a block: its groups, with the kept ones filled, and a bar as wide as the kept part of its FFN.
    fn row(&self, il: usize, b: &Block) -> Markup {
        let y = il * ROW + 2;
        let [before, after] = [&b.before, &b.after].map(self.units);
        let scaled = |n: usize| n * BAR / self.widest;
        let loss = b.loss.map_or(String::new(), |l| format!(", costs about {l:.4} nats alone"));
        let (kept, n_groups, what) = (b.kept_groups.len(), b.before.n_head_kv, self.what);
        let class = |group: usize| if b.kept_groups.contains(&group) { "on" } else { "off" };
        html! {
            text x=(LABEL - 8) y=(y + 11) class="n" { (il) }
            @for group in 0..n_groups {
                rect x=(LABEL + group * self.cell) y=(y) width=((self.cell - 1).max(2)) height="13" rx="2"
                    class=(class(group)) {}
            }
            g {
                title {
                    (format!("block {il}: {kept} of {n_groups} KV heads, {after} of {before} {what}{loss}"))
                }
                rect x=(self.bars) y=(y) width=(scaled(before)) height="13" rx="2" class="off" {}
                rect x=(self.bars) y=(y) width=(scaled(after)) height="13" rx="2" class="ff" {}
                text x=(self.bars + 5) y=(y + 11) class="w" { (after) }
            }
        }
    }
}

/// Columns of the estimated loss of the predictions by each block's width.
fn curve(losses: &[f64]) -> Markup {
    let most = losses.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let tall = |loss: f64| (loss.max(0.0) / most * TALLEST as f64).max(1.0);
    html! {
        figure {
            svg viewBox=(view(losses.len() * COLUMN + 4, TALLEST + 14)) role="img"
                aria-label="what the width of each block costs" {
                @for (il, &loss) in losses.iter().enumerate() {
                    @let x = 2 + il * COLUMN;
                    rect x=(x) y=(format!("{:.1}", TALLEST as f64 - tall(loss))) width="9"
                        height=(format!("{:.1}", tall(loss))) class="ff" {
                        title { (format!("block {il}: {loss:.4} nats")) }
                    }
                    @if il % 5 == 0 {
                        text x=(x) y=(TALLEST + 11) class="s" { (il) }
                    }
                }
            }
            figcaption {
                "What the predictions lose by the width of each block alone, about: "
                (format!("{most:.4}"))
                " nats of KL divergence at the highest."
            }
        }
    }
}

fn view(width: usize, height: usize) -> String {
    format!("0 0 {width} {height}")
}
