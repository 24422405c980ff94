//! Writing a GGUF: header by ggml, tensor data streamed behind it.

use super::{GgufError, GgufFile, TensorInfo, Value};
use crate::ggml::{RawGguf, Type};
use std::io::Write;
use std::path::Path;

/// A tensor to be written; `data` produces its bytes when its turn comes.
pub struct OutTensor<'a> {
    /// Name.
    pub name: String,
    /// Element type.
    pub ty: Type,
    /// Sizes, ne\[0\] first.
    pub ne: Vec<usize>,
    /// Its bytes.
    pub data: Box<dyn Fn() -> Result<std::borrow::Cow<'a, [u8]>, GgufError> + 'a>,
}

impl<'a> OutTensor<'a> {
    /// A tensor as it is in `file`.
    pub fn copy(file: &'a GgufFile, t: &'a TensorInfo) -> OutTensor<'a> {
        let data = Box::new(|| Ok(std::borrow::Cow::Borrowed(file.data(t))));
        OutTensor { name: t.name.clone(), ty: t.ty, ne: t.ne.clone(), data }
    }

    /// Bytes that the tensor takes in the file, without padding.
    pub fn n_bytes(&self) -> usize {
        self.ty.row_bytes(self.ne[0]) * self.ne[1..].iter().product::<usize>()
    }
}

/// Alignment of tensor data in what we write: ggml computes offsets with it whatever
/// `general.alignment` says, since its setters do not look at the key.
const ALIGNMENT: usize = 32;

/// Writes metadata and tensors, in the order given, to `out`. `path` only names the file in errors.
/// A `general.alignment` is written as the one that is used.
///
/// # Errors
/// [`GgufError::Io`] if writing fails, or what a tensor's `data` returns.
///
/// # Panics
/// If a tensor's data has another length than its type and sizes say.
pub fn write_gguf(
    out: &mut impl Write,
    path: &Path,
    metadata: &[(String, Value)],
    tensors: &[OutTensor],
) -> Result<(), GgufError> {
    let io = |source| GgufError::Io { path: path.into(), source };
    let mut header = RawGguf::empty();
    for (key, value) in metadata {
        match key.as_str() {
            "general.alignment" => header.set(key, &Value::U32(ALIGNMENT as u32)),
            _ => header.set(key, value),
        }
    }
    for t in tensors {
        header.add_tensor(&t.name, t.ty, &t.ne);
    }
    out.write_all(&header.to_bytes()).map_err(io)?;
    let padding = [0u8; ALIGNMENT];
    for t in tensors {
        let bytes = (t.data)()?;
        assert_eq!(bytes.len(), t.n_bytes(), "data of tensor {}", t.name);
        out.write_all(&bytes).map_err(io)?;
        out.write_all(&padding[..bytes.len().next_multiple_of(ALIGNMENT) - bytes.len()]).map_err(io)?;
    }
    out.flush().map_err(io)
}
