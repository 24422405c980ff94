//! Matrix products by faer, as an operation of a ggml graph.
//!
//! On the wide batches of calibration, faer's kernels take a third of the time that ggml's take in F32, and
//! half of the time that those take in BF16 (`benches/results`). Operands may have any strides, so nothing
//! has to be transposed first.

use super::{Engine, GgmlError, Graph};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use llama_cpp_sys_2 as sys;
use rayon::prelude::*;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Largest number of rows and of columns of the result that are computed in one go, and smallest number of
/// rows: a multiple of the kernels' register tiles.
/// Tiles are wide, because the rows of the first operand are packed anew for each.
const LARGEST_TILE: [usize; 2] = [768, 512];
const SMALLEST_ROWS: usize = 96;

/// Number of tiles that a large enough product is cut into, so that idle threads can help.
const ENOUGH_TILES: usize = 8;

/// Number of operations from which a product is worth waking other threads.
const WORTH_SHARING: i64 = 1 << 20;

/// Floating-point operations of the products of all graphs that have run.
static OPERATIONS: AtomicU64 = AtomicU64::new(0);

/// Number of floating-point operations in the matrix products of all graphs of this process.
/// A multiplication with its addition counts as two.
pub fn operations() -> u64 {
    OPERATIONS.load(Ordering::Relaxed)
}

/// Adds to [`operations`], for products outside graphs that belong to a forward pass.
pub(crate) fn count(operations: u64) {
    OPERATIONS.fetch_add(operations, Ordering::Relaxed);
}

/// Operations per second of a plain product of two matrices on all threads of rayon's pool.
///
/// # Errors
/// [`GgmlError`] if the backend fails.
pub fn product_rate() -> Result<f64, GgmlError> {
    const N: usize = 2048;
    let engine = Engine::cpu();
    let x = vec![1.0f32; N * N];
    let mut best = f64::INFINITY;
    // The first run warms up. The best of the others counts, since other programs can only slow it down.
    for _ in 0..4 {
        let mut g = Graph::new(&engine, 8);
        let (a, b) = (g.input_f32([N, N], &x), g.input_f32([N, N], &x));
        let y = g.mul_mat(a, b);
        g.output(y);
        let start = Instant::now();
        g.compute(&engine)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (N * N * N) as f64 / best)
}

/// Custom operation: `dst` `[m, n, ..]` = aᵀ b for its sources a `[k, m, ..]` and b `[k, n, ..]`, all F32,
/// in `ne` order.
/// Outer dimensions of a are repeated to those of b, as `ggml_mul_mat` does.
///
/// # Safety
/// Only ggml's CPU backend may call it, on a tensor that [`super::Graph::mul_mat`] made.
pub(super) unsafe extern "C" fn multiply(
    dst: *mut sys::ggml_tensor,
    _ith: c_int,
    _nth: c_int,
    _user: *mut c_void,
) {
    // SAFETY: by the caller; the tensor and its sources live while the graph runs.
    let product = Product(unsafe { &*dst });
    let done = std::panic::catch_unwind(|| product.compute());
    if done.is_err() {
        // A panic must not cross into C.
        std::process::abort();
    }
}

/// Result of a product, for the threads that compute its tiles.
struct Product<'t>(&'t sys::ggml_tensor);

// SAFETY: nobody changes headers while a graph runs, and each tile is written by one thread.
unsafe impl Sync for Product<'_> {}

impl Product<'_> {
    fn compute(&self) {
        let tiling = Tiling::of(self.0.ne.map(|n| n as usize));
        let tile = |i: usize| self.tile(&tiling, i);
        // SAFETY: a product has two sources.
        let k = unsafe { (*self.0.src[0]).ne[0] };
        if 2 * k * self.0.ne.iter().product::<i64>() < WORTH_SHARING {
            (0..tiling.count()).for_each(tile);
        } else {
            (0..tiling.count()).into_par_iter().for_each(tile);
        }
    }

    /// Computes tile `i`.
    fn tile(&self, tiling: &Tiling, i: usize) {
        // SAFETY: a product has two sources, and each of its tiles is computed by one thread.
        unsafe { multiply_tile(self.0, tiling, i) }
    }
}

/// Division of a result into tiles. It does not depend on the number of threads, so neither do the sums.
struct Tiling {
    /// Sizes of the result, in `ne` order.
    ne: [usize; 4],
    /// Rows and columns of a tile.
    size: [usize; 2],
}

impl Tiling {
    fn of(ne: [usize; 4]) -> Tiling {
        let rows = LARGEST_TILE[0].min(ne[0].next_multiple_of(SMALLEST_ROWS));
        let mut t = Tiling { ne, size: [rows, LARGEST_TILE[1].min(ne[1].max(1))] };
        while t.count() < ENOUGH_TILES && t.size[0] > SMALLEST_ROWS {
            t.size[0] = (t.size[0] / 2).next_multiple_of(SMALLEST_ROWS);
        }
        t
    }

    /// Number of tiles of one matrix, down and across.
    fn grid(&self) -> [usize; 2] {
        [self.ne[0].div_ceil(self.size[0]), self.ne[1].div_ceil(self.size[1])]
    }

    fn count(&self) -> usize {
        self.grid().iter().product::<usize>() * self.ne[2] * self.ne[3]
    }
}

/// Computes tile `i` of `dst`.
///
/// # Safety
/// `dst` and its two sources are F32 with data in memory and of fitting sizes, and nobody else writes this
/// tile.
unsafe fn multiply_tile(dst: &sys::ggml_tensor, tiling: &Tiling, i: usize) {
    // SAFETY: the caller guarantees that both exist.
    let (a, b) = unsafe { (&*dst.src[0], &*dst.src[1]) };
    let [down, across] = tiling.grid();
    let outer = i / (down * across);
    let (i2, i3) = (outer % tiling.ne[2], outer / tiling.ne[2]);
    let (row, col) = (i % down * tiling.size[0], i / down % across * tiling.size[1]);
    let rows = tiling.size[0].min(tiling.ne[0] - row);
    let cols = tiling.size[1].min(tiling.ne[1] - col);
    let k = a.ne[0] as usize;
    let repeated = |n: usize, d: usize| n / (b.ne[d] / a.ne[d]) as usize;
    // SAFETY: offsets lie inside the tensors, whose strides are multiples of a float.
    unsafe {
        let at = |t: &sys::ggml_tensor, j: usize, i2: usize, i3: usize| {
            t.data.cast::<u8>().add(j * t.nb[1] + i2 * t.nb[2] + i3 * t.nb[3])
        };
        let strided = |t: &sys::ggml_tensor, p: *mut u8, n: usize| {
            MatRef::from_raw_parts(p.cast::<f32>(), k, n, (t.nb[0] / 4) as isize, (t.nb[1] / 4) as isize)
        };
        let a = strided(a, at(a, row, repeated(i2, 2), repeated(i3, 3)), rows);
        let b = strided(b, at(b, col, i2, i3), cols);
        let out = at(dst, col, i2, i3).cast::<f32>().add(row);
        let out = MatMut::from_raw_parts_mut(out, rows, cols, 1, (dst.nb[1] / 4) as isize);
        matmul(out, Accum::Replace, a.transpose(), b, 1.0, Par::Seq);
    }
}

#[cfg(test)]
mod tests {
    use crate::ggml::{Engine, Graph};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Product aᵀ b of `ne` `[k, m, heads]` and `[k, n, heads · repeats]` by definition, in f64.
    fn naive(a: &[f32], b: &[f32], [k, m, n]: [usize; 3], repeats: usize) -> Vec<f64> {
        let outer = b.len() / (k * n);
        let row = |x: &[f32], i: usize| x[i * k..][..k].to_vec();
        let pair = |o: usize, j: usize, i: usize| {
            let (a, b) = (row(a, o / repeats * m + i), row(b, o * n + j));
            a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        (0..outer * n * m).map(|at| pair(at / (n * m), at / m % n, at % m)).collect()
    }

    #[test]
    fn products_are_those_of_the_definition() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let sizes = [
            [1, 1, 1],
            [5, 3, 7],
            [64, 768, 256],
            [33, 769, 257],
            [100, 2000, 5],
            [17, 2, 700],
            [9, 200, 100],
        ];
        for ([k, m, n], heads, repeats) in sizes.into_iter().flat_map(|s| [(s, 1, 1), (s, 2, 3)]) {
            let mut random =
                |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random::<f32>() - 0.5).collect() };
            let (a, b) = (random(k * m * heads), random(k * n * heads * repeats));
            let expected = naive(&a, &b, [k, m, n], repeats);
            // The same values with rows and columns exchanged, to test strides.
            let turned: Vec<f32> =
                (0..a.len()).map(|i| a[i / (k * m) * k * m + i % m * k + i / m % k]).collect();
            let mut first: Option<Vec<f32>> = None;
            let engine = Engine::cpu();
            for (n_threads, turn) in [(1, false), (3, false), (2, true)] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
                let found = pool.install(|| {
                    let mut g = Graph::new(&engine, 16);
                    let x = if turn {
                        g.input_f32([m, k * heads], &turned)
                    } else {
                        g.input_f32([k, m * heads], &a)
                    };
                    let x =
                        if turn { g.reshape(x, [m, k, heads, 1]) } else { g.reshape(x, [k, m, heads, 1]) };
                    let x = if turn { g.transpose(x) } else { x };
                    let y = g.input_f32([k, n * heads * repeats], &b);
                    let y = g.reshape(y, [k, n, heads * repeats, 1]);
                    let z = g.mul_mat(x, y);
                    g.output(z);
                    g.compute(&engine).unwrap().to_vec(z)
                });
                for (f, e) in found.iter().zip(&expected) {
                    assert!((f64::from(*f) - e).abs() < 1e-5 * k as f64, "{k} {m} {n}: {f} {e}");
                }
                if !turn {
                    let first = first.get_or_insert_with(|| found.clone());
                    assert!(*first == found, "{k} {m} {n}: {n_threads} threads give other sums");
                }
            }
        }
    }
}
