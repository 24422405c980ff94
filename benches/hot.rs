//! Benchmarks of the parts that take most of a run's time, one by one, on random numbers.
//!
//!     cargo bench --bench hot                    # all, at several sizes
//!     cargo bench --bench hot -- 'select.*2048'  # some
//!
//! Throughput is in floating-point operations if they can be counted ("elem/s"), with the counts of
//! `forecast.rs`.

#[path = "../tests/common/test_model.rs"]
#[allow(dead_code)]
mod test_model;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use putri_gguf::forward::{BlockGradient, BlockOutputs, Collect, Forward, OnTheWay};
use putri_gguf::ggml::{Type, operations};
use putri_gguf::model::{Matrix, Model};
use putri_gguf::numeric::{Cholesky, Moments, SymMatrix};
use putri_gguf::prune::{Inverse, InverseIn, Metric, NeuronCriterion, greedy, refit};
use putri_gguf::requant::quantise_with_feedback;
use std::hint::black_box;
use test_model::{Rng, TestModel};

/// Numbers of neurons of an FFN; outputs are three eighths as many, as in SmolLM2.
const WIDTHS: [usize; 3] = [512, 1536, 4096];
/// Tokens that pass through a block in one graph.
const TOKENS: usize = 2048;

/// A regular Gram matrix: a band of correlations.
fn gram(n: usize) -> SymMatrix {
    SymMatrix::from_fn(n, |i, j| if i == j { 1.5 } else { 0.9f64.powi((j - i) as i32) * 0.5 })
}

fn map(n_in: usize) -> Matrix {
    let n_out = n_in * 3 / 8;
    Matrix::new(n_in, n_out, Rng(n_in as u64).vec(n_in * n_out, 1.0))
}

/// Linear algebra of one FFN.
fn algebra(c: &mut Criterion) {
    let mut g = c.benchmark_group("algebra");
    g.sample_size(10);
    for n in WIDTHS {
        let (h, w) = (gram(n), map(n));
        let m = w.n_out;
        let moments = Moments { gram: h.clone(), cross: vec![0.1; n * m], ..Moments::new(n, m) };
        let all: Vec<usize> = (0..n).collect();
        let cube = (n * n * n) as u64;
        g.throughput(Throughput::Elements(cube / 3));
        g.bench_function(BenchmarkId::new("factor", n), |b| {
            b.iter(|| black_box(Cholesky::<f64>::new(&h, None, 1e-3)));
        });
        g.throughput(Throughput::Elements(cube));
        g.bench_function(BenchmarkId::new("inverse in 64 bits", n), |b| {
            b.iter(|| InverseIn::new(&h, 1e-3).expect("regular"));
        });
        g.bench_function(BenchmarkId::new("inverse", n), |b| {
            b.iter(|| Inverse::new(&h, 1e-3).expect("regular"));
        });
        g.throughput(Throughput::Elements(cube / 3 + (2 * n * n * m) as u64));
        g.bench_function(BenchmarkId::new("refit towards a stream", n), |b| {
            b.iter(|| refit(&w, &moments, 0.35, &all, 0.1).expect("regular"));
        });
        // Half of the inputs are removed.
        g.throughput(Throughput::Elements(cube * 31 / 24 + (n * n * m * 3 / 4) as u64));
        g.bench_function(BenchmarkId::new("select half", n), |b| {
            b.iter(|| {
                greedy(&w, None, Inverse::new(&h, 1e-3).expect("regular"), n / 2, NeuronCriterion::Obs)
                    .expect("regular")
            });
        });
        g.throughput(Throughput::Elements(cube / 3 + (n * n * m) as u64));
        g.bench_function(BenchmarkId::new("round to Q4_0 with feedback", n), |b| {
            b.iter(|| quantise_with_feedback(&w, &h, &all, 1e-3, Type::Q4_0, None).expect("regular"));
        });
        let samples = Rng(1).vec(TOKENS * m, 1.0);
        g.throughput(Throughput::Elements((2 * TOKENS * m * m + m * m * m / 3 + 2 * m * m * n) as u64));
        g.bench_function(BenchmarkId::new("metric", n), |b| {
            b.iter(|| Metric::new(&samples, m).expect("finite").apply(&w));
        });
    }
}

/// Cost of a chunk of tokens in a block of SmolLM2's shape.
fn block(c: &mut Criterion) {
    let mut g = c.benchmark_group("block of SmolLM2");
    g.sample_size(20);
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().join("in.gguf");
    TestModel {
        n_embd: 576,
        head_dim: 64,
        blocks: vec![(9, 3, 1536)],
        n_ctx_train: TOKENS,
        ty: Type::Q8_0,
        ..TestModel::default()
    }
    .write(&path);
    let model = Model::open(&path).expect("our own model");
    let n_threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let w = model.block(0).expect("a block");
    for n_ctx in [512, 2048] {
        let forward = Forward::new(&model, n_ctx, n_threads).expect("engine");
        let block = forward.upload(&w).expect("engine");
        let n_embd = forward.n_embd();
        let x = Rng(2).vec(TOKENS * n_embd, 1.0);
        let (mut out, scales) = (vec![0.0; x.len()], vec![1.0; TOKENS]);
        let heads = forward.attn_out_input(&block, &x, None).expect("engine");
        let (n_in, n_out) = (w.ffn_down.n_in, w.ffn_down.n_out);
        let mut moments = forward.gathering(&block, n_in, n_out).expect("engine");

        let before = operations();
        forward.block(&block, &x, None, &mut out).expect("engine");
        g.throughput(Throughput::Elements(operations() - before));
        g.bench_function(BenchmarkId::new("forward", n_ctx), |b| {
            b.iter(|| forward.block(&block, &x, None, &mut out).expect("engine"));
        });

        let mut collect = || {
            let collect = Collect { target: Some(&x), scales: &scales, into: &mut moments };
            let wanted = BlockOutputs { moments: Some(collect), ..BlockOutputs::default() };
            forward.from_attn_out_input(&block, &x, &heads, wanted).expect("engine");
        };
        let before = operations();
        collect();
        g.throughput(Throughput::Elements(operations() - before));
        g.bench_function(BenchmarkId::new("moments at ffn_down", n_ctx), |b| b.iter(&mut collect));

        if n_ctx == 512 {
            let mut back = || {
                let mut grad = x.clone();
                let mut sums = BlockGradient::default();
                let found = OnTheWay { vectors: Some(&mut sums), ..OnTheWay::default() };
                forward.block_gradient(&block, &x, &mut grad, found).expect("engine");
            };
            let before = operations();
            back();
            g.throughput(Throughput::Elements(operations() - before));
            g.bench_function(BenchmarkId::new("gradient", n_ctx), |b| b.iter(&mut back));
        }
    }
}

criterion_group!(benches, algebra, block);
criterion_main!(benches);
