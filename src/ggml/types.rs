//! Tensor types: sizes, and conversion between quantised rows and floats.

use super::GgmlError;
use llama_cpp_sys_2 as sys;
use rayon::prelude::*;
use std::ffi::CStr;

/// Tensor type of ggml that the engine knows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Type(u32);

impl Type {
    /// 32-bit float.
    pub const F32: Type = Type(sys::GGML_TYPE_F32);
    /// IEEE half-precision float.
    pub const F16: Type = Type(sys::GGML_TYPE_F16);
    /// Upper half of a 32-bit float.
    pub const BF16: Type = Type(sys::GGML_TYPE_BF16);
    /// 32-bit integer.
    pub const I32: Type = Type(sys::GGML_TYPE_I32);
    /// 32-element blocks of 4-bit numbers with one scale.
    pub const Q4_0: Type = Type(sys::GGML_TYPE_Q4_0);
    /// 32-element blocks of 4-bit numbers with scale and minimum.
    pub const Q4_1: Type = Type(sys::GGML_TYPE_Q4_1);
    /// 32-element blocks of 5-bit numbers with one scale.
    pub const Q5_0: Type = Type(sys::GGML_TYPE_Q5_0);
    /// 32-element blocks of 5-bit numbers with scale and minimum.
    pub const Q5_1: Type = Type(sys::GGML_TYPE_Q5_1);
    /// 32-element blocks of 8-bit numbers with one scale.
    pub const Q8_0: Type = Type(sys::GGML_TYPE_Q8_0);
    /// 32-element blocks of non-linear 4-bit numbers.
    pub const IQ4_NL: Type = Type(sys::GGML_TYPE_IQ4_NL);

    /// Type with ggml's number `raw`, if the engine knows it.
    pub fn from_raw(raw: u32) -> Option<Type> {
        if raw >= sys::GGML_TYPE_COUNT {
            return None;
        }
        let ty = Type(raw);
        (ty.traits().blck_size > 0 && ty.traits().type_size > 0).then_some(ty)
    }

    /// All types that the engine knows, in ggml's order.
    pub fn all() -> impl Iterator<Item = Type> {
        (0..sys::GGML_TYPE_COUNT).filter_map(Type::from_raw)
    }

    /// Type with the name `name`, in any case (`Q4_K`, `q4_k`).
    pub fn from_name(name: &str) -> Option<Type> {
        Type::all().find(|t| t.name().eq_ignore_ascii_case(name))
    }

    pub(super) fn raw(self) -> u32 {
        self.0
    }

    fn traits(self) -> &'static sys::ggml_type_traits {
        // SAFETY: every number below GGML_TYPE_COUNT indexes ggml's static table.
        unsafe { &*sys::ggml_get_type_traits(self.0) }
    }

    /// Name of the type, as llama-quantize prints it.
    pub fn name(self) -> &'static str {
        // SAFETY: ggml returns a static string, or null for a retired type.
        unsafe {
            let p = sys::ggml_type_name(self.0);
            if p.is_null() { "?" } else { CStr::from_ptr(p).to_str().unwrap_or("?") }
        }
    }

    /// Elements per block: ne\[0\] of a tensor must be a multiple of it.
    pub fn block_size(self) -> usize {
        self.traits().blck_size as usize
    }

    /// Size of `n` elements in bytes; `n` is a multiple of [`Type::block_size`].
    pub fn row_bytes(self, n: usize) -> usize {
        debug_assert_eq!(n % self.block_size(), 0);
        n / self.block_size() * self.traits().type_size
    }

    /// Whether elements share a scale.
    pub fn is_quantized(self) -> bool {
        self.traits().is_quantized
    }

    /// Whether rows of this type can be decoded to floats.
    pub fn can_dequantize(self) -> bool {
        self == Type::F32 || self.traits().to_float.is_some()
    }

    /// Decodes `src` (whole rows of `n_per_row` elements) into `dst`, rows in parallel.
    ///
    /// # Errors
    /// [`GgmlError::Type`] if ggml has no decoder for the type.
    ///
    /// # Panics
    /// If the lengths of `src` and `dst` do not describe the same rows.
    pub fn dequantize(self, src: &[u8], n_per_row: usize, dst: &mut [f32]) -> Result<(), GgmlError> {
        let row_bytes = self.row_bytes(n_per_row);
        assert!(n_per_row > 0 && dst.len().is_multiple_of(n_per_row));
        assert_eq!(src.len(), dst.len() / n_per_row * row_bytes);
        if self == Type::F32 {
            for (d, s) in dst.iter_mut().zip(src.as_chunks::<4>().0) {
                *d = f32::from_ne_bytes(*s);
            }
            return Ok(());
        }
        let Some(to_float) = self.traits().to_float else {
            return Err(GgmlError::Type("read", self.name().into()));
        };
        let rows = dst.par_chunks_mut(n_per_row).zip(src.par_chunks(row_bytes));
        rows.with_min_len((1 << 14) / n_per_row + 1).for_each(|(d, s)| {
            // SAFETY: `s` holds one whole row and `d` has room for its n_per_row floats. The
            // decoders read bytes without alignment needs beyond 2, which whole rows keep
            // relative to the aligned start of a tensor.
            unsafe { to_float(s.as_ptr().cast(), d.as_mut_ptr(), n_per_row as i64) }
        });
        Ok(())
    }

    /// Encodes `src`, rows of `n_per_row` floats, weighting the error of column j by `imatrix[j]`.
    ///
    /// # Errors
    /// [`GgmlError::Type`] if ggml has no encoder, [`GgmlError::Quantise`] if the result is invalid.
    ///
    /// # Panics
    /// If `n_per_row` is not a multiple of the block size or `imatrix` has another length.
    pub fn quantize(
        self,
        src: &[f32],
        n_per_row: usize,
        imatrix: Option<&[f32]>,
    ) -> Result<Vec<u8>, GgmlError> {
        assert!(
            n_per_row > 0
                && n_per_row.is_multiple_of(self.block_size())
                && src.len().is_multiple_of(n_per_row)
        );
        assert!(imatrix.is_none_or(|m| m.len() == n_per_row));
        if !self.can_quantize() {
            return Err(GgmlError::Type("write", self.name().into()));
        }
        // All-zero weights make some quantisers divide by zero; encoding without an importance matrix is
        // the better answer.
        let imatrix = imatrix.filter(|m| m.iter().any(|&w| w > 0.0));
        // SAFETY: initialising twice is allowed and takes ggml's own lock.
        unsafe { sys::ggml_quantize_init(self.0) };
        let row_bytes = self.row_bytes(n_per_row);
        let mut out = vec![0u8; src.len() / n_per_row * row_bytes];
        out.par_chunks_mut(row_bytes).zip(src.par_chunks(n_per_row)).for_each(|(d, s)| {
            let weights = imatrix.map_or(std::ptr::null(), <[f32]>::as_ptr);
            // SAFETY: one row in, one row of exactly row_bytes out, weights of n_per_row floats.
            unsafe {
                sys::ggml_quantize_chunk(
                    self.0,
                    s.as_ptr(),
                    d.as_mut_ptr().cast(),
                    0,
                    1,
                    n_per_row as i64,
                    weights,
                )
            };
        });
        if self.decodes_to_numbers(&out) { Ok(out) } else { Err(GgmlError::Quantise(self.name().into())) }
    }

    /// Whether `bytes`, whole blocks of this type, decode to finite numbers, judged by their scales
    /// (`ggml_validate_row_data`).
    pub fn decodes_to_numbers(self, bytes: &[u8]) -> bool {
        assert!(bytes.len().is_multiple_of(self.traits().type_size));
        // SAFETY: whole blocks of this type.
        unsafe { sys::ggml_validate_row_data(self.0, bytes.as_ptr().cast(), bytes.len()) }
    }

    /// Whether ggml can encode this type, even if there is no importance matrix.
    pub fn can_quantize(self) -> bool {
        matches!(self, Type::F32 | Type::F16 | Type::BF16)
            || (self.is_quantized() && self.traits().from_float_ref.is_some())
            || self.requires_imatrix()
    }

    /// Whether encoding is impossible without an importance matrix (the 1- and 2-bit IQ types).
    pub fn requires_imatrix(self) -> bool {
        // SAFETY: a pure function of the number.
        unsafe { sys::ggml_quantize_requires_imatrix(self.0) }
    }
}

impl std::fmt::Debug for Type {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::fmt::Display for Type {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
