//! Requantisation of whole files with libllama's own quantiser, as llama-quantize does.

use super::llama::c_path;
use super::system::{init_once, logged_error, with_cause};
use super::{GgmlError, Type};
use llama_cpp_sys_2 as sys;
use std::ffi::CString;
use std::path::Path;

/// Quantisation mix for a whole model, by llama-quantize's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileType {
    name: &'static str,
    raw: sys::llama_ftype,
    /// Type of most matrices (`llama_ftype_get_default_type`).
    main: sys::ggml_type,
}

/// Names and mixes (`QUANT_OPTIONS` in llama-quantize), except those for mixtures of experts.
const FILE_TYPES: &[FileType] = &[
    FileType { name: "F32", raw: sys::LLAMA_FTYPE_ALL_F32, main: sys::GGML_TYPE_F32 },
    FileType { name: "F16", raw: sys::LLAMA_FTYPE_MOSTLY_F16, main: sys::GGML_TYPE_F16 },
    FileType { name: "BF16", raw: sys::LLAMA_FTYPE_MOSTLY_BF16, main: sys::GGML_TYPE_BF16 },
    FileType { name: "Q8_0", raw: sys::LLAMA_FTYPE_MOSTLY_Q8_0, main: sys::GGML_TYPE_Q8_0 },
    FileType { name: "Q6_K", raw: sys::LLAMA_FTYPE_MOSTLY_Q6_K, main: sys::GGML_TYPE_Q6_K },
    FileType { name: "Q5_K_M", raw: sys::LLAMA_FTYPE_MOSTLY_Q5_K_M, main: sys::GGML_TYPE_Q5_K },
    FileType { name: "Q5_K", raw: sys::LLAMA_FTYPE_MOSTLY_Q5_K_M, main: sys::GGML_TYPE_Q5_K },
    FileType { name: "Q5_K_S", raw: sys::LLAMA_FTYPE_MOSTLY_Q5_K_S, main: sys::GGML_TYPE_Q5_K },
    FileType { name: "Q5_1", raw: sys::LLAMA_FTYPE_MOSTLY_Q5_1, main: sys::GGML_TYPE_Q5_1 },
    FileType { name: "Q5_0", raw: sys::LLAMA_FTYPE_MOSTLY_Q5_0, main: sys::GGML_TYPE_Q5_0 },
    FileType { name: "Q4_K_M", raw: sys::LLAMA_FTYPE_MOSTLY_Q4_K_M, main: sys::GGML_TYPE_Q4_K },
    FileType { name: "Q4_K", raw: sys::LLAMA_FTYPE_MOSTLY_Q4_K_M, main: sys::GGML_TYPE_Q4_K },
    FileType { name: "Q4_K_S", raw: sys::LLAMA_FTYPE_MOSTLY_Q4_K_S, main: sys::GGML_TYPE_Q4_K },
    FileType { name: "Q4_1", raw: sys::LLAMA_FTYPE_MOSTLY_Q4_1, main: sys::GGML_TYPE_Q4_1 },
    FileType { name: "Q4_0", raw: sys::LLAMA_FTYPE_MOSTLY_Q4_0, main: sys::GGML_TYPE_Q4_0 },
    FileType { name: "IQ4_NL", raw: sys::LLAMA_FTYPE_MOSTLY_IQ4_NL, main: sys::GGML_TYPE_IQ4_NL },
    FileType { name: "IQ4_XS", raw: sys::LLAMA_FTYPE_MOSTLY_IQ4_XS, main: sys::GGML_TYPE_IQ4_XS },
    FileType { name: "Q3_K_L", raw: sys::LLAMA_FTYPE_MOSTLY_Q3_K_L, main: sys::GGML_TYPE_Q3_K },
    FileType { name: "Q3_K_M", raw: sys::LLAMA_FTYPE_MOSTLY_Q3_K_M, main: sys::GGML_TYPE_Q3_K },
    FileType { name: "Q3_K", raw: sys::LLAMA_FTYPE_MOSTLY_Q3_K_M, main: sys::GGML_TYPE_Q3_K },
    FileType { name: "Q3_K_S", raw: sys::LLAMA_FTYPE_MOSTLY_Q3_K_S, main: sys::GGML_TYPE_Q3_K },
    FileType { name: "IQ3_M", raw: sys::LLAMA_FTYPE_MOSTLY_IQ3_M, main: sys::GGML_TYPE_IQ3_S },
    FileType { name: "IQ3_S", raw: sys::LLAMA_FTYPE_MOSTLY_IQ3_S, main: sys::GGML_TYPE_IQ3_S },
    FileType { name: "IQ3_XS", raw: sys::LLAMA_FTYPE_MOSTLY_IQ3_XS, main: sys::GGML_TYPE_IQ3_S },
    FileType { name: "IQ3_XXS", raw: sys::LLAMA_FTYPE_MOSTLY_IQ3_XXS, main: sys::GGML_TYPE_IQ3_XXS },
    FileType { name: "Q2_K", raw: sys::LLAMA_FTYPE_MOSTLY_Q2_K, main: sys::GGML_TYPE_Q2_K },
    FileType { name: "Q2_K_S", raw: sys::LLAMA_FTYPE_MOSTLY_Q2_K_S, main: sys::GGML_TYPE_Q2_K },
    FileType { name: "IQ2_M", raw: sys::LLAMA_FTYPE_MOSTLY_IQ2_M, main: sys::GGML_TYPE_IQ2_S },
    FileType { name: "IQ2_S", raw: sys::LLAMA_FTYPE_MOSTLY_IQ2_S, main: sys::GGML_TYPE_IQ2_XS },
    FileType { name: "IQ2_XS", raw: sys::LLAMA_FTYPE_MOSTLY_IQ2_XS, main: sys::GGML_TYPE_IQ2_XS },
    FileType { name: "IQ2_XXS", raw: sys::LLAMA_FTYPE_MOSTLY_IQ2_XXS, main: sys::GGML_TYPE_IQ2_XXS },
    FileType { name: "IQ1_M", raw: sys::LLAMA_FTYPE_MOSTLY_IQ1_M, main: sys::GGML_TYPE_IQ1_M },
    FileType { name: "IQ1_S", raw: sys::LLAMA_FTYPE_MOSTLY_IQ1_S, main: sys::GGML_TYPE_IQ1_S },
    FileType { name: "TQ2_0", raw: sys::LLAMA_FTYPE_MOSTLY_TQ2_0, main: sys::GGML_TYPE_TQ2_0 },
    FileType { name: "TQ1_0", raw: sys::LLAMA_FTYPE_MOSTLY_TQ1_0, main: sys::GGML_TYPE_TQ1_0 },
];

impl FileType {
    /// Mix with the name `name`, in upper or lower case.
    pub fn from_name(name: &str) -> Option<FileType> {
        FILE_TYPES.iter().copied().find(|t| t.name.eq_ignore_ascii_case(name))
    }

    /// Names of all mixes.
    pub fn names() -> impl Iterator<Item = &'static str> {
        FILE_TYPES.iter().map(|t| t.name)
    }

    /// Mix with the number `raw` in `general.file_type`.
    pub fn from_raw(raw: u32) -> Option<FileType> {
        FILE_TYPES.iter().copied().find(|t| t.raw == raw)
    }

    /// Plainest mix that consists mostly of `ty`: the one of that name, or the last such mix in
    /// llama-quantize's list.
    pub fn mostly(ty: Type) -> Option<FileType> {
        let named = FileType::from_name(ty.name()).filter(|t| t.main_type() == ty);
        named.or_else(|| FILE_TYPES.iter().copied().rfind(|t| t.main_type() == ty))
    }

    /// Number in `general.file_type`.
    pub fn raw(self) -> u32 {
        self.raw
    }

    /// Type of most matrices.
    pub fn main_type(self) -> Type {
        Type::from_raw(self.main).expect("the engine knows the types of its mixes")
    }

    /// Name as llama-quantize spells it.
    pub fn name(self) -> &'static str {
        self.name
    }
}

/// Writes the model at `input` to `output` in the mix `to`, as llama-quantize does.
/// `importance` holds the mean squared inputs of matrices, by the matrices' names. Tensors that are already
/// quantised are refused unless `requantise` is set.
///
/// # Errors
/// [`GgmlError::Llama`] if libllama refuses.
pub fn quantize_file(
    input: &Path,
    output: &Path,
    to: FileType,
    importance: &[(String, Vec<f32>)],
    requantise: bool,
    n_threads: usize,
) -> Result<(), GgmlError> {
    init_once();
    let _ = logged_error();
    let (from, into) = (c_path(input)?, c_path(output)?);
    let names: Vec<CString> = importance
        .iter()
        .map(|(name, _)| CString::new(name.as_str()))
        .collect::<Result<_, _>>()
        .map_err(|_| GgmlError::Llama("cannot quantise a tensor with NUL in its name".into()))?;
    let entry = |(name, (_, values)): (&CString, &(String, Vec<f32>))| sys::llama_model_imatrix_data {
        name: name.as_ptr(),
        data: values.as_ptr(),
        size: values.len(),
    };
    let end = sys::llama_model_imatrix_data { name: std::ptr::null(), data: std::ptr::null(), size: 0 };
    let entries: Vec<_> = names.iter().zip(importance).map(entry).chain([end]).collect();
    // SAFETY: paths, names and values outlive the call, and a null name ends the entries.
    let status = unsafe {
        let mut params = sys::llama_model_quantize_default_params();
        params.ftype = to.raw;
        params.nthread = n_threads as i32;
        params.allow_requantize = requantise;
        params.imatrix = if importance.is_empty() { std::ptr::null() } else { entries.as_ptr() };
        sys::llama_model_quantize(from.as_ptr(), into.as_ptr(), &params)
    };
    if status == 0 {
        return Ok(());
    }
    Err(GgmlError::Llama(with_cause(format!("cannot write {} as {}", input.display(), to.name))))
}
