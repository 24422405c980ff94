//! Writer of GGUF files: ggml writes the header, and tensor data is streamed behind it.

use super::{GgufError, GgufFile, TensorInfo, Value};
use crate::ggml::{RawGguf, Type};
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Bytes of a tensor to be written.
pub enum TensorData<'a> {
    /// Function that produces all of them on demand.
    Made(MakeBytes<'a>),
    /// Parts of a mapped file, which are written one after another without a copy of the whole.
    Parts(Vec<&'a [u8]>),
}

/// Function that produces the bytes of a tensor.
pub type MakeBytes<'a> = Box<dyn Fn() -> Result<Cow<'a, [u8]>, GgufError> + 'a>;

impl<'a> TensorData<'a> {
    /// Bytes that `make` produces on demand.
    pub fn made(make: impl Fn() -> Result<Cow<'a, [u8]>, GgufError> + 'a) -> TensorData<'a> {
        TensorData::Made(Box::new(make))
    }
}

/// Tensor to be written.
pub struct OutTensor<'a> {
    /// Name.
    pub name: String,
    /// Element type.
    pub ty: Type,
    /// Sizes, ne\[0\] first.
    pub ne: Vec<usize>,
    /// Its bytes.
    pub data: TensorData<'a>,
}

impl<'a> OutTensor<'a> {
    /// Creates an unchanged copy of a tensor of `file`.
    pub fn copy(file: &'a GgufFile, t: &'a TensorInfo) -> OutTensor<'a> {
        let data = TensorData::Parts(vec![file.data(t)]);
        OutTensor { name: t.name.clone(), ty: t.ty, ne: t.ne.clone(), data }
    }

    /// Size of the tensor in the file in bytes, without padding.
    pub fn n_bytes(&self) -> usize {
        self.ty.row_bytes(self.ne[0]) * self.ne[1..].iter().product::<usize>()
    }
}

/// Alignment of tensor data in the output.
/// ggml computes offsets with it whatever `general.alignment` says, since its setters do not look at the
/// key.
const ALIGNMENT: usize = 32;

/// Writes metadata and tensors, in the given order, to `out`. `path` only names the file in errors.
/// A `general.alignment` is set to the alignment in use.
///
/// # Errors
/// [`GgufError::Io`] if writing fails, or the error of a tensor's `data`.
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
    out.write_all(&header(metadata, tensors)).map_err(io)?;
    let padding = [0u8; ALIGNMENT];
    for t in tensors {
        let n = match &t.data {
            TensorData::Made(make) => {
                let bytes = make()?;
                out.write_all(&bytes).map_err(io)?;
                bytes.len()
            }
            TensorData::Parts(parts) => {
                parts.iter().try_for_each(|part| out.write_all(part)).map_err(io)?;
                parts.iter().map(|part| part.len()).sum()
            }
        };
        assert_eq!(n, t.n_bytes(), "data of tensor {}", t.name);
        out.write_all(&padding[..n.next_multiple_of(ALIGNMENT) - n]).map_err(io)?;
    }
    out.flush().map_err(io)
}

/// Size in bytes of the file that [`write_gguf`] writes, without producing the tensors' bytes.
pub fn gguf_size(metadata: &[(String, Value)], tensors: &[OutTensor]) -> u64 {
    let data: usize = tensors.iter().map(|t| t.n_bytes().next_multiple_of(ALIGNMENT)).sum();
    (header(metadata, tensors).len() + data) as u64
}

/// Header of a file, padded so that the first tensor follows.
fn header(metadata: &[(String, Value)], tensors: &[OutTensor]) -> Vec<u8> {
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
    header.to_bytes()
}

/// Writes `file` as `n_parts` files at the paths that `path` gives, as llama-gguf-split does.
/// Tensors keep their order, with about as many bytes in each file; all metadata is in the first.
///
/// # Errors
/// [`GgufError::Io`] if writing fails.
pub fn write_parts(
    file: &GgufFile,
    n_parts: usize,
    path: impl Fn(usize) -> PathBuf,
) -> Result<(), GgufError> {
    let tensors = file.tensors();
    let total: usize = tensors.iter().map(TensorInfo::n_bytes).sum();
    let (mut next, mut written) = (0, 0);
    for i in 0..n_parts {
        // Each of the remaining parts needs at least one tensor.
        let most = tensors.len() - (n_parts - 1 - i).min(tensors.len());
        let first = next;
        while next < most && (next == first || written < total * (i + 1) / n_parts || i + 1 == n_parts) {
            written += tensors[next].n_bytes();
            next += 1;
        }
        let mut metadata = if i == 0 { file.metadata().to_vec() } else { Vec::new() };
        metadata.extend([
            ("split.no".into(), Value::U16(i as u16)),
            ("split.count".into(), Value::U16(n_parts as u16)),
            ("split.tensors.count".into(), Value::I32(tensors.len() as i32)),
        ]);
        let part: Vec<OutTensor> = tensors[first..next].iter().map(|t| OutTensor::copy(file, t)).collect();
        let path = path(i);
        let io = |source| GgufError::Io { path: path.clone(), source };
        let mut out = BufWriter::new(File::create(&path).map_err(io)?);
        write_gguf(&mut out, &path, &metadata, &part)?;
        out.into_inner().map_err(|e| io(e.into_error()))?.sync_all().map_err(io)?;
    }
    Ok(())
}
