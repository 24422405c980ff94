//! Opening a GGUF over a memory map.

use super::{GgufError, Value};
use crate::ggml::{RawGguf, Type};
use memmap2::Mmap;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// A tensor of an open file; its data is known to lie inside the file.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Name, as `blk.0.attn_q.weight`.
    pub name: String,
    /// Element type.
    pub ty: Type,
    /// Sizes, ne\[0\] first, without trailing ones beyond the second.
    pub ne: Vec<usize>,
    start: usize,
    len: usize,
}

impl TensorInfo {
    /// Number of elements.
    pub fn n_elements(&self) -> usize {
        self.ne.iter().product()
    }

    /// Bytes in the file.
    pub fn n_bytes(&self) -> usize {
        self.len
    }

    /// Number of rows of ne\[0\] elements.
    pub fn n_rows(&self) -> usize {
        self.n_elements() / self.ne[0]
    }
}

/// An open GGUF: metadata in file order, and tensors over a read-only memory map.
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    metadata: Vec<(String, Value)>,
    keys: HashMap<String, usize>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl GgufFile {
    /// Opens `path` and checks every tensor against the length of the file.
    ///
    /// # Errors
    /// One of [`GgufError`], naming what is wrong; nothing larger than the header is allocated.
    pub fn open(path: &Path) -> Result<GgufFile, GgufError> {
        let io = |source| GgufError::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        if file.metadata().map_err(io)?.is_dir() {
            return Err(io(std::io::Error::new(
                std::io::ErrorKind::IsADirectory,
                "is a directory, not a GGUF file",
            )));
        }
        let map = crate::ggml::map_file(&file).map_err(io)?;
        if !map.starts_with(b"GGUF") {
            let magic = String::from_utf8_lossy(&map[..map.len().min(4)]).into_owned();
            return Err(GgufError::Magic { path: path.into(), magic });
        }
        let raw = RawGguf::parse(&map)
            .map_err(|e| GgufError::Header { path: path.into(), reason: e.to_string() })?;

        let metadata =
            raw.metadata().map_err(|e| GgufError::Header { path: path.into(), reason: e.to_string() })?;
        let keys = metadata.iter().enumerate().map(|(i, (k, _))| (k.clone(), i)).collect();
        let mut tensors = Vec::with_capacity(raw.n_tensors());
        for i in 0..raw.n_tensors() {
            let (name, ty, ne, offset) = raw.tensor(i);
            let Some(ty) = Type::from_raw(ty) else {
                return Err(GgufError::UnknownType { path: path.into(), name, ty });
            };
            let Some((start, len)) = extent(ty, ne, offset, raw.data_offset() as u64) else {
                let reason = format!("tensor {name} of type {ty} has impossible sizes {ne:?}");
                return Err(GgufError::Header { path: path.into(), reason });
            };
            let end = start.saturating_add(len);
            // Blocks hold 16-bit scales, which decoders read in place.
            if start % 2 != 0 {
                let reason =
                    format!("tensor {name} starts at an odd byte (general.alignment is {})", raw.alignment());
                return Err(GgufError::Header { path: path.into(), reason });
            }
            if end > map.len() as u64 {
                return Err(GgufError::Truncated { path: path.into(), name, end, len: map.len() as u64 });
            }
            let n_dims = (1..=4).rev().find(|&d| d == 1 || ne[d - 1] > 1).unwrap_or(1);
            let ne = ne[..n_dims].iter().map(|&n| n as usize).collect();
            tensors.push(TensorInfo { name, ty, ne, start: start as usize, len: len as usize });
        }
        let by_name = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(GgufFile { path: path.into(), map, metadata, keys, tensors, by_name })
    }

    /// Where the file was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Metadata in file order.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// Tensors in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`, if there is one.
    pub fn find(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// Bytes of a tensor.
    pub fn data(&self, t: &TensorInfo) -> &[u8] {
        &self.map[t.start..t.start + t.len]
    }

    /// Rows `rows` of a tensor as floats, `[n, ne0]` in row-major order.
    ///
    /// # Errors
    /// [`GgufError::Tensor`] if ggml cannot decode the type.
    pub fn floats(&self, t: &TensorInfo, rows: std::ops::Range<usize>) -> Result<Vec<f32>, GgufError> {
        let row_bytes = t.ty.row_bytes(t.ne[0]);
        let mut out = vec![0.0; rows.len() * t.ne[0]];
        let bytes = &self.data(t)[rows.start * row_bytes..rows.end * row_bytes];
        t.ty.dequantize(bytes, t.ne[0], &mut out)
            .map_err(|source| GgufError::Tensor { name: t.name.clone(), source })?;
        Ok(out)
    }

    /// The value of `key`, if it is there.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).map(|&i| &self.metadata[i].1)
    }

    /// A string.
    ///
    /// # Errors
    /// [`GgufError::BadKey`] if the key holds something else.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Str(s)) => Ok(Some(s)),
            Some(other) => Err(bad_type(key, other, "string")),
        }
    }

    /// A non-negative 32-bit number. llama.cpp reads such keys as uint32 only; int32 is accepted
    /// where it is not negative.
    ///
    /// # Errors
    /// [`GgufError::BadKey`] if the key holds something else.
    pub fn get_u32(&self, key: &str) -> Result<Option<usize>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::U32(v)) => Ok(Some(*v as usize)),
            Some(Value::I32(v)) if *v >= 0 => Ok(Some(*v as usize)),
            Some(other) => Err(bad_type(key, other, "uint32")),
        }
    }

    /// A 32-bit float.
    ///
    /// # Errors
    /// [`GgufError::BadKey`] if the key holds something else or is not finite.
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F32(v)) if v.is_finite() => Ok(Some(*v)),
            Some(Value::F32(v)) => Err(GgufError::BadKey { key: key.into(), problem: format!("is {v}") }),
            Some(other) => Err(bad_type(key, other, "float32")),
        }
    }

    /// One number per block: a scalar stands for all of them, an array must have `n` elements.
    ///
    /// # Errors
    /// [`GgufError::BadKey`] if the key holds something else or has another length.
    pub fn get_per_block(&self, key: &str, n: usize) -> Result<Option<Vec<usize>>, GgufError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let Some(array) = value.as_unsigned_array() else {
            return Ok(self.get_u32(key)?.map(|v| vec![v; n]));
        };
        if array.len() != n {
            let problem = format!("has {} elements for {n} blocks", array.len());
            return Err(GgufError::BadKey { key: key.into(), problem });
        }
        Ok(Some(array.into_iter().map(|v| v as usize).collect()))
    }
}

fn bad_type(key: &str, found: &Value, wanted: &str) -> GgufError {
    GgufError::BadKey { key: key.into(), problem: format!("is of type {}, not {wanted}", found.type_name()) }
}

/// Start and length of a tensor's data in the file, or nothing if they do not fit in 64 bits.
fn extent(ty: Type, ne: [u64; 4], offset: u64, data_offset: u64) -> Option<(u64, u64)> {
    let n = ne.iter().try_fold(1u64, |n, &k| n.checked_mul(k))?;
    if n == 0 || !ne[0].is_multiple_of(ty.block_size() as u64) {
        return None;
    }
    let len = (n / ty.block_size() as u64).checked_mul(ty.row_bytes(ty.block_size()) as u64)?;
    Some((data_offset.checked_add(offset)?, len))
}
