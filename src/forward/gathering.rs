//! Accumulators of second moments: Gram matrices and cross products, chunk by chunk.

use super::stats::Collect;
use super::{Block, Forward, ForwardError, SUM_TOKENS, whole_windows};
use crate::ggml::{Computed, Graph, Resident, TensorId, count};
use crate::numeric::{Moments, products_per_token};
use std::sync::Arc;

/// Number of row panels that a symmetric product is cut into.
/// Each starts at its diagonal, which takes (p + 1) / 2p of the work.
const PANELS: usize = 6;

/// Number of rows in a panel of a symmetric matrix of `n` rows.
fn panel_rows(n: usize) -> usize {
    n.div_ceil(PANELS).next_multiple_of(16)
}

/// First row and number of rows of each panel of a symmetric matrix of `n` rows.
fn panels(n: usize) -> impl Iterator<Item = (usize, usize)> {
    let width = panel_rows(n.max(1));
    (0..n).step_by(width).map(move |start| (start, width.min(n - start)))
}

/// Number of elements of the largest matrix product in these sums.
pub(crate) fn largest_product(n: usize, m: usize) -> usize {
    panels(n).map(|(start, rows)| rows * (n - start)).fold(n * m, usize::max)
}

/// Number of chunks that are added up on a device at a time.
/// The sums are in 32 bits, in which a sum of many similar numbers drifts.
const CHUNKS_THERE: usize = 8;

/// Accumulator of moments, chunk by chunk.
/// On the CPU, graphs leave the inputs and residuals of a chunk's tokens, and all threads multiply them. On a
/// device, graphs multiply, and the products of several chunks are added up next to the block, because they
/// are the largest data to fetch.
pub struct Gathering {
    moments: Moments,
    /// Map whose outputs are still to be subtracted from the residuals.
    map: Option<Arc<Vec<f32>>>,
    /// Number of tokens that are summed in 32 bits.
    summed: usize,
    place: Sums,
}

/// Data of a chunk's tokens, or sums on a device.
enum Sums {
    Here(Rows),
    There(Totals),
}

/// Inputs `[n_tokens, n]` and residuals `[n_tokens, m]` of a chunk's tokens, times the factors `scales`.
#[derive(Default)]
struct Rows {
    x: Vec<f32>,
    r: Vec<f32>,
    scales: Vec<f32>,
}

/// Sums on a device: the panels, followed by the cross products.
pub(super) struct Totals {
    set: Resident,
    cross: Option<usize>,
    n_chunks: usize,
}

impl Gathering {
    /// Moments of all chunks.
    pub fn finish(mut self) -> Moments {
        self.fetch();
        if let Some(map) = &self.map {
            self.moments.subtract_map(map);
        }
        self.moments
    }

    /// Adds the sums on the device to the rest.
    fn fetch(&mut self) {
        let Sums::There(there) = &self.place else { return };
        for (i, (start, _)) in panels(self.moments.gram.n()).enumerate() {
            self.moments.add_panel(start, &there.set.read(i));
        }
        if let Some(cross) = there.cross {
            self.moments.add_cross(&there.set.read(cross));
        }
    }

    /// Begins a chunk of `n_tokens` tokens, of which graphs take `per_graph` each. Returns the accumulators
    /// of the graphs. `residuals` says whether there are any.
    pub(super) fn begin(&mut self, n_tokens: usize, per_graph: usize, residuals: bool) -> Vec<Sink<'_>> {
        if matches!(&self.place, Sums::There(there) if there.n_chunks == CHUNKS_THERE) {
            self.fetch();
            if let Sums::There(there) = &mut self.place {
                there.set.clear();
                there.n_chunks = 0;
            }
        }
        match &mut self.place {
            Sums::There(there) => {
                assert_eq!(n_tokens, per_graph, "a device takes a chunk in one graph");
                there.n_chunks += 1;
                vec![Sink::There(there, &mut self.moments)]
            }
            Sums::Here(rows) => {
                let (n, m) = (self.moments.x.len(), if residuals { self.moments.r.len() } else { 0 });
                rows.x.resize(n_tokens * n, 0.0);
                rows.r.resize(n_tokens * m, 0.0);
                rows.scales.resize(n_tokens, 0.0);
                let mut r = rows.r.chunks_mut((per_graph * m).max(1));
                let parts = rows.x.chunks_mut(per_graph * n).zip(rows.scales.chunks_mut(per_graph));
                parts.map(|(x, scales)| Sink::Here { x, r: r.next().unwrap_or_default(), scales }).collect()
            }
        }
    }

    /// Adds the chunk's products, after its graphs have run.
    pub(super) fn end(&mut self) {
        if let Sums::Here(rows) = &self.place {
            self.moments.add(&rows.x, &rows.r, &rows.scales, self.summed);
            let m = if rows.r.is_empty() { 0 } else { self.moments.r.len() };
            count(2 * (rows.scales.len() * products_per_token(self.moments.x.len(), m)) as u64);
        }
    }
}

/// Accumulator of one graph.
pub(super) enum Sink<'g> {
    /// Places for the data of its tokens.
    Here {
        x: &'g mut [f32],
        r: &'g mut [f32],
        scales: &'g mut [f32],
    },
    There(&'g Totals, &'g mut Moments),
}

/// Outputs of a graph that are still to be added to its accumulator.
pub(super) enum Pending<'g> {
    Here { into: [&'g mut [f32]; 3], from: [Option<TensorId>; 3] },
    There { moments: &'g mut Moments, x: TensorId, r: Option<TensorId>, scales: TensorId, n_tokens: usize },
}

impl<'g> Sink<'g> {
    /// Adds nodes for the products over tokens of `x` `ne` `[n, n_tokens]` with itself and with `residual`
    /// `ne` `[m, n_tokens]`, and for the sums of both.
    /// `x` and `residual` are multiplied by `scales` `ne` `[1, n_tokens]` first; the sums are weighted by
    /// the squares of `scales`.
    pub(super) fn ask(
        self,
        g: &mut Graph<'g>,
        x: TensorId,
        residual: Option<TensorId>,
        scales: TensorId,
    ) -> Pending<'g> {
        g.output(scales);
        let n_tokens = g.ne(x)[1];
        let weights = g.reshape(scales, [n_tokens, 1, 1, 1]);
        let x = g.mul(x, scales);
        let r = residual.map(|r| g.mul(r, scales));
        match self {
            Sink::Here { x: to, r: to_r, scales: to_scales } => {
                [Some(x), r].into_iter().flatten().for_each(|t| g.output(t));
                Pending::Here { into: [to, to_r, to_scales], from: [Some(x), r, Some(scales)] }
            }
            Sink::There(there, moments) => {
                let (xt, rt) = (g.transpose(x), r.map(|r| g.transpose(r)));
                let product = |g: &mut Graph<'g>, a: TensorId, b: TensorId, total: usize| {
                    let product = g.mul_mat(a, b);
                    let total = g.resident(&there.set, total);
                    let total = g.add_to(total, product);
                    g.output(total);
                };
                for (i, (start, rows)) in panels(g.ne(x)[0]).enumerate() {
                    let panel = g.slice(x, 0, start, rows);
                    let behind = g.slice(x, 0, start, g.ne(x)[0] - start);
                    let (panel, behind) = (g.transpose(panel), g.transpose(behind));
                    product(g, behind, panel, i);
                }
                if let Some((rt, cross)) = rt.zip(there.cross) {
                    product(g, xt, rt, cross);
                }
                let mut sum = |t: TensorId| {
                    let sum = g.mul_mat(t, weights);
                    g.output(sum);
                    sum
                };
                Pending::There { moments, x: sum(xt), r: rt.map(sum), scales, n_tokens }
            }
        }
    }
}

impl Pending<'_> {
    pub(super) fn take(self, done: &Computed) {
        match self {
            Pending::Here { into, from } => {
                into.into_iter().zip(from).for_each(|(into, t)| {
                    if let Some(t) = t {
                        done.read(t, into);
                    }
                });
            }
            Pending::There { moments, x, r, scales, n_tokens } => {
                let r = r.map(|r| done.to_vec(r)).unwrap_or_default();
                let weight = done.to_vec(scales).iter().map(|s| f64::from(*s).powi(2)).sum();
                moments.add_sums(&done.to_vec(x), &r, weight);
                moments.n_tokens += n_tokens;
            }
        }
    }
}

impl Forward {
    /// Creates an empty accumulator of moments in `b` with `n` inputs and `m` residuals; `m` is 0 if no
    /// chunk has a target.
    ///
    /// # Errors
    /// [`ForwardError`] if a device has no room for the sums.
    pub fn gathering(&self, b: &Block, n: usize, m: usize) -> Result<Gathering, ForwardError> {
        let place = if self.engine.has_devices() {
            let cross = (m > 0).then_some([n, m]);
            let shapes: Vec<_> = panels(n).map(|(start, rows)| [n - start, rows]).chain(cross).collect();
            let set = Resident::zeros(&self.engine, &b.set, &shapes)?;
            Sums::There(Totals { set, cross: cross.map(|_| shapes.len() - 1), n_chunks: 0 })
        } else {
            Sums::Here(Rows::default())
        };
        Ok(Gathering {
            moments: Moments::new(n, m),
            map: None,
            summed: whole_windows(SUM_TOKENS, self.n_ctx()),
            place,
        })
    }
}

/// Request to collect moments, divided among the graphs of a chunk.
pub(super) struct Collecting<'c> {
    into: Option<&'c mut Gathering>,
    target: Option<&'c [f32]>,
    scales: &'c [f32],
    per_graph: usize,
    n_graphs: usize,
    n_embd: usize,
}

/// Share of one graph in such a request.
pub(super) struct Part<'c> {
    pub(super) target: Option<&'c [f32]>,
    pub(super) scales: &'c [f32],
    pub(super) into: Sink<'c>,
}

impl<'c> Collecting<'c> {
    /// `later` is the map whose outputs the residuals leave out.
    pub(super) fn new(
        moments: Option<Collect<'c>>,
        n_tokens: usize,
        per_graph: usize,
        n_embd: usize,
        later: Option<Arc<Vec<f32>>>,
    ) -> Collecting<'c> {
        let n_graphs = n_tokens.div_ceil(per_graph);
        match moments {
            None => Collecting { into: None, target: None, scales: &[], per_graph, n_graphs, n_embd },
            Some(Collect { target, scales, into }) => {
                into.map = later.filter(|_| target.is_some());
                Collecting { into: Some(into), target, scales, per_graph, n_graphs, n_embd }
            }
        }
    }

    /// Shares of the graphs, in order; none for any graph if nothing is collected.
    pub(super) fn parts(&mut self) -> Vec<Option<Part<'_>>> {
        let Some(into) = &mut self.into else { return (0..self.n_graphs).map(|_| None).collect() };
        let mut targets = self.target.map(|t| t.chunks(self.per_graph * self.n_embd));
        let into = into.begin(self.scales.len(), self.per_graph, targets.is_some());
        let parts = self.scales.chunks(self.per_graph).zip(into);
        parts
            .map(|(scales, into)| {
                Some(Part { target: targets.as_mut().and_then(Iterator::next), scales, into })
            })
            .collect()
    }

    /// Adds what the graphs have left.
    pub(super) fn end(self) {
        if let Some(into) = self.into {
            into.end();
        }
    }
}
