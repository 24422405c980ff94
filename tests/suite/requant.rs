//! Requantisation, measured by the error of the outputs.

use crate::common::test_model::Rng;
use putri_gguf::ggml::Type;
use putri_gguf::model::Matrix;
use putri_gguf::numeric::SymMatrix;
use putri_gguf::requant::{Quantised, output_type, quantise, quantise_with_feedback};

/// A Gram matrix of correlated inputs.
fn gram(n: usize, rng: &mut Rng) -> SymMatrix {
    let (t, hidden) = (3 * n, n / 4);
    let mix = rng.vec(hidden * n, 1.0);
    let mut x = Vec::with_capacity(t * n);
    for _ in 0..t {
        let z = rng.vec(hidden, 1.0);
        let own = rng.vec(n, 0.5);
        x.extend((0..n).map(|j| f64::from(own[j] + (0..hidden).map(|k| z[k] * mix[k * n + j]).sum::<f32>())));
    }
    SymMatrix::from_fn(n, |i, j| x.chunks_exact(n).map(|x| x[i] * x[j]).sum())
}

/// tr((Q − W) H (Q − W)ᵀ) relative to tr(W H Wᵀ).
fn relative_loss(w: &Matrix, q: &Quantised, h: &SymMatrix) -> f64 {
    let form = |d: &[f32]| -> f64 {
        d.chunks_exact(h.n())
            .map(|r| {
                let hr = |i: usize| (0..h.n()).map(|j| h.get(i, j) * f64::from(r[j])).sum::<f64>();
                (0..h.n()).map(|i| f64::from(r[i]) * hr(i)).sum::<f64>()
            })
            .sum()
    };
    let back = q.to_matrix().unwrap();
    let diff: Vec<f32> = back.data.iter().zip(w.data.iter()).map(|(a, b)| a - b).collect();
    form(&diff) / form(&w.data)
}

fn all(n: usize) -> Vec<usize> {
    (0..n).collect()
}

#[test]
fn feedback_beats_plain_rounding_in_every_type() {
    let mut rng = Rng(11);
    let (n, m) = (512, 24);
    let h = gram(n, &mut rng);
    let w = Matrix::new(n, m, rng.vec(n * m, 1.0));
    let importance: Vec<f32> = h.diagonal().iter().map(|v| *v as f32).collect();
    for name in
        ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq4_xs"]
    {
        let ty = Type::from_name(name).unwrap();
        let plain = quantise(&w, ty, &importance).unwrap();
        let fed = quantise_with_feedback(&w, &h, &all(n), 1e-3, ty, None).unwrap();
        assert_eq!((plain.ty, plain.bytes.len()), (fed.ty, fed.bytes.len()));
        let (a, b) = (relative_loss(&w, &plain, &h), relative_loss(&w, &fed, &h));
        println!("{name}: plain {a:.3e}, with feedback {b:.3e}, ratio {:.2}", b / a);
        assert!(b < a, "{name}: {b} is not below {a}");
    }
}

/// Blocks of a matrix that was quantised before keep their bytes where nothing better is found.
#[test]
fn what_hardly_moved_keeps_its_bytes() {
    let mut rng = Rng(12);
    let (n, m) = (512, 24);
    let h = gram(n, &mut rng);
    let first = Matrix::new(n, m, rng.vec(n * m, 1.0));
    for name in ["q4_0", "q4_1", "q8_0", "q4_K", "q6_K"] {
        let ty = Type::from_name(name).unwrap();
        let old = quantise_with_feedback(&first, &h, &all(n), 1e-3, ty, None).unwrap();
        let values = old.to_matrix().unwrap();
        let again = quantise_with_feedback(&values, &h, &all(n), 1e-3, ty, Some(&old)).unwrap();
        assert!(again.bytes[..] == old.bytes[..], "{name}: nothing moved");
        let step = relative_loss(&first, &old, &h).sqrt() as f32;
        for share in [0.1, 1.0] {
            let by = rng.vec(n * m, share * step);
            let moved: Vec<f32> = values.data.iter().zip(&by).map(|(v, d)| v + d).collect();
            let moved = Matrix::new(n, m, moved);
            let [with, without] = [Some(&old), None]
                .map(|old| quantise_with_feedback(&moved, &h, &all(n), 1e-3, ty, old).unwrap());
            let (a, b) = (relative_loss(&moved, &with, &h), relative_loss(&moved, &without, &h));
            println!("{name}, {share}: {a:.3e} with the old blocks, {b:.3e} without");
            assert!(a < 1.05 * b, "{name}, {share}: {a} {b}");
        }
    }
}

#[test]
fn types_without_blocks_are_written_whole() {
    let mut rng = Rng(5);
    let h = gram(72, &mut rng);
    let w = Matrix::new(72, 5, rng.vec(72 * 5, 1.0));
    let q = quantise_with_feedback(&w, &h, &all(72), 1e-3, Type::F32, None).unwrap();
    assert_eq!(q.ty, Type::F32);
    for (a, b) in q.to_matrix().unwrap().data.iter().zip(w.data.iter()) {
        assert!((a - b).abs() < 1e-5, "F32 rounds nothing");
    }
}

#[test]
fn fallbacks_are_llama_quantizes() {
    let ty = |n: &str| Type::from_name(n).unwrap();
    for (wanted, n, expected) in [
        ("q4_K", 512, "q4_K"),
        ("q4_K", 480, "q5_0"),
        ("q5_K", 480, "q5_1"),
        ("q6_K", 480, "q8_0"),
        ("q2_K", 480, "q4_0"),
        ("q3_K", 480, "q4_0"),
        ("iq4_xs", 480, "iq4_nl"),
        ("q4_1", 480, "q4_1"),
        ("q4_1", 470, "f16"),
        ("q4_K", 470, "f16"),
        ("f32", 470, "f32"),
        ("bf16", 470, "bf16"),
    ] {
        assert_eq!(output_type(ty(wanted), n), ty(expected), "{wanted} with rows of {n}");
    }
}
