//! Opening of a GGUF over a memory map.

use super::{GgufError, Value};
use crate::ggml::{FileMap, RawGguf, Type};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Tensor of an open file; its data is known to lie inside the file.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Element type.
    pub ty: Type,
    /// Sizes, ne\[0\] first, without trailing ones beyond the second.
    pub ne: Vec<usize>,
    part: usize,
    start: usize,
    len: usize,
}

impl TensorInfo {
    /// Number of elements.
    pub fn n_elements(&self) -> usize {
        self.ne.iter().product()
    }

    /// Size in the file in bytes.
    pub fn n_bytes(&self) -> usize {
        self.len
    }

    /// Number of rows of ne\[0\] elements.
    pub fn n_rows(&self) -> usize {
        self.n_elements() / self.ne[0]
    }
}

/// One mapped file.
struct Part {
    path: PathBuf,
    map: FileMap,
}

/// Open GGUF: metadata in file order, and tensors over a read-only memory map.
/// A GGUF that is split into several files acts as one.
pub struct GgufFile {
    parts: Vec<Part>,
    metadata: Vec<(String, Value)>,
    keys: HashMap<String, usize>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl GgufFile {
    /// Opens `path`, and the other parts if it is the first of several, and checks every tensor against the
    /// length of its file.
    ///
    /// # Errors
    /// [`GgufError`] naming the fault; nothing larger than the headers is allocated.
    pub fn open(path: &Path) -> Result<GgufFile, GgufError> {
        let mut file = GgufFile::one(path, 0)?;
        let n_parts = file.split_number("split.count")?.unwrap_or(1);
        if n_parts > 1 {
            file.join(path, n_parts)?;
        }
        Ok(file)
    }

    /// Opens one file as part number `part`, without looking for others.
    fn one(path: &Path, part: usize) -> Result<GgufFile, GgufError> {
        let io = |source| GgufError::Io { path: path.into(), source };
        // Checked before opening: a pipe would wait for a writer.
        let refused = |problem| Err(GgufError::NoFile { path: path.into(), problem });
        match path.metadata().map_err(io)? {
            found if found.is_dir() => {
                return refused("is a directory, not a GGUF file");
            }
            found if !found.is_file() => {
                return refused("is a device, pipe or socket; a model has to be a file, which is mapped");
            }
            found if found.len() == 0 => {
                return refused("is empty, not a GGUF file");
            }
            _ => {}
        }
        let file = File::open(path).map_err(io)?;
        let map = FileMap::new(&file, path).map_err(io)?;
        if map.starts_with(LFS_POINTER) {
            return Err(GgufError::LfsPointer(path.into()));
        }
        if !map.starts_with(b"GGUF") {
            let magic = String::from_utf8_lossy(&map[..map.len().min(4)]).into_owned();
            return Err(GgufError::Magic { path: path.into(), magic });
        }
        let raw = RawGguf::parse(&map)
            .map_err(|e| GgufError::Header { path: path.into(), reason: e.to_string() })?;

        let metadata =
            raw.metadata(&map).map_err(|e| GgufError::Header { path: path.into(), reason: e.to_string() })?;
        // Users see these names; no model uses others.
        let printable = |what: &str, name: &str| {
            let fine = !name.chars().any(char::is_control);
            let reason = || format!("{what} {name:?} holds control characters");
            if fine { Ok(()) } else { Err(GgufError::Header { path: path.into(), reason: reason() }) }
        };
        metadata.iter().try_for_each(|(key, _)| printable("metadata key", key))?;
        let keys = metadata.iter().enumerate().map(|(i, (k, _))| (k.clone(), i)).collect();
        let mut tensors = Vec::with_capacity(raw.n_tensors());
        for i in 0..raw.n_tensors() {
            let (name, ty, ne, offset) = raw.tensor(i);
            printable("the name of tensor", &name)?;
            let Some(ty) = Type::from_raw(ty) else {
                return Err(GgufError::UnknownType { path: path.into(), name, ty });
            };
            let Some((start, len)) = extent(ty, ne, offset, raw.data_offset() as u64) else {
                let reason = format!("tensor {name} of type {ty} has impossible sizes {ne:?}");
                return Err(GgufError::Header { path: path.into(), reason });
            };
            let end = start.saturating_add(len);
            if start % LLAMA_ALIGNMENT != 0 {
                let reason = format!(
                    "tensor {name} starts at byte {start} (general.alignment is {}), and llama.cpp stops on those that do not \
                     start at a multiple of {LLAMA_ALIGNMENT}; convert the model anew, without another alignment",
                    raw.alignment()
                );
                return Err(GgufError::Header { path: path.into(), reason });
            }
            if end > map.len() as u64 {
                return Err(GgufError::Truncated { path: path.into(), name, end, len: map.len() as u64 });
            }
            let n_dims = (1..=4).rev().find(|&d| d == 1 || ne[d - 1] > 1).unwrap_or(1);
            let ne = ne[..n_dims].iter().map(|&n| n as usize).collect();
            tensors.push(TensorInfo { name, ty, ne, part, start: start as usize, len: len as usize });
        }
        let by_name = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(GgufFile { parts: vec![Part { path: path.into(), map }], metadata, keys, tensors, by_name })
    }

    /// Adds the tensors of the other `n_parts` − 1 parts, and drops the keys that describe the split
    /// (`llama_model_loader` of llama.cpp, `tools/gguf-split`).
    fn join(&mut self, path: &Path, n_parts: usize) -> Result<(), GgufError> {
        let header = |path: &Path, reason: String| GgufError::Header { path: path.into(), reason };
        let number = self.split_number("split.no")?.unwrap_or(0);
        let name = path.to_string_lossy();
        let Some(prefix) = name.strip_suffix(&part_suffix(number, n_parts)) else {
            let reason = format!(
                "this is part {} of {n_parts} of a split model; its name must end in {} for the others to be found",
                number + 1,
                part_suffix(number, n_parts)
            );
            return Err(header(path, reason));
        };
        let part_path = |i: usize| PathBuf::from(format!("{prefix}{}", part_suffix(i, n_parts)));
        if number != 0 {
            let first = part_path(0);
            let reason = format!(
                "this is part {} of {n_parts} of a split model; give the first, {}",
                number + 1,
                first.display()
            );
            return Err(header(path, reason));
        }
        for i in 1..n_parts {
            let path = part_path(i);
            let part = GgufFile::one(&path, i)?;
            let said = [part.split_number("split.no")?, part.split_number("split.count")?];
            if said != [Some(i), Some(n_parts)] {
                let reason = format!("does not say that it is part {} of {n_parts} of a split model", i + 1);
                return Err(header(&path, reason));
            }
            self.parts.extend(part.parts);
            for t in part.tensors {
                if self.by_name.insert(t.name.clone(), self.tensors.len()).is_some() {
                    return Err(header(&path, format!("tensor {} is in an earlier part, too", t.name)));
                }
                self.tensors.push(t);
            }
        }
        if let Some(n) = self.split_number("split.tensors.count")?.filter(|n| *n != self.tensors.len()) {
            let reason = format!("the parts have {} tensors; there should be {n}", self.tensors.len());
            return Err(header(path, reason));
        }
        self.metadata.retain(|(key, _)| !key.starts_with("split."));
        self.keys = self.metadata.iter().enumerate().map(|(i, (k, _))| (k.clone(), i)).collect();
        Ok(())
    }

    /// Number in a key about parts; llama.cpp writes them in 16 and 32 bits.
    fn split_number(&self, key: &str) -> Result<Option<usize>, GgufError> {
        match self.get(key) {
            Some(Value::U16(n)) => Ok(Some(usize::from(*n))),
            _ => self.get_u32(key),
        }
    }

    /// Paths of its files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().map(|p| p.path.as_path())
    }

    /// Bytes of each of its files.
    pub fn bytes(&self) -> impl Iterator<Item = &[u8]> {
        self.parts.iter().map(|p| &p.map[..])
    }

    /// SHA-256 over all its files, in hex.
    pub fn sha256(&self) -> String {
        sha256(self.bytes())
    }

    /// Total size of its files in bytes.
    pub fn n_bytes(&self) -> u64 {
        self.bytes().map(|part| part.len() as u64).sum()
    }

    /// Metadata in file order.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// Tensors in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Tensor with the name `name`, if there is one.
    pub fn find(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// Bytes of a tensor.
    pub fn data(&self, t: &TensorInfo) -> &[u8] {
        &self.parts[t.part].map[t.start..t.start + t.len]
    }

    /// Decodes the rows `rows` of a tensor to floats, `[rows.len(), ne0]` row-major.
    ///
    /// # Errors
    /// [`GgufError::Tensor`] if ggml cannot decode the type, [`GgufError::NotFinite`] if a value is NaN or
    /// infinite.
    pub fn floats(&self, t: &TensorInfo, rows: std::ops::Range<usize>) -> Result<Vec<f32>, GgufError> {
        let row_bytes = t.ty.row_bytes(t.ne[0]);
        let mut out = vec![0.0; rows.len() * t.ne[0]];
        let bytes = &self.data(t)[rows.start * row_bytes..rows.end * row_bytes];
        t.ty.dequantize(bytes, t.ne[0], &mut out)
            .map_err(|source| GgufError::Tensor { name: t.name.clone(), source })?;
        const PART: usize = 1 << 16;
        let sound = |part: &[f32]| part.iter().fold(true, |all, v| all & v.is_finite());
        let damaged = out.par_chunks(PART).position_first(|part| !sound(part)).map(|i| i * PART);
        match damaged.and_then(|start| out[start..].iter().position(|v| !v.is_finite()).map(|at| start + at))
        {
            None => Ok(out),
            Some(at) => {
                let row = rows.start + at / t.ne[0];
                Err(GgufError::NotFinite { name: t.name.clone(), value: out[at], row })
            }
        }
    }

    /// Checks that all tensors decode to finite numbers, judged by their scales.
    ///
    /// # Errors
    /// [`GgufError::Damaged`] with the first tensor that does not.
    pub fn check_values(&self) -> Result<(), GgufError> {
        let damaged = self.tensors.iter().find(|t| !t.ty.decodes_to_numbers(self.data(t)));
        damaged.map_or(Ok(()), |t| Err(GgufError::Damaged(t.name.clone())))
    }

    /// Value of `key`, if it exists.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).map(|&i| &self.metadata[i].1)
    }

    /// String value of `key`, if it exists.
    ///
    /// # Errors
    /// [`GgufError::BadKey`] if the key holds another type.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Str(s)) => match std::str::from_utf8(s) {
                Ok(s) => Ok(Some(s)),
                Err(_) => Err(GgufError::BadKey { key: key.into(), problem: "is not UTF-8".into() }),
            },
            Some(other) => Err(bad_type(key, other, "string")),
        }
    }

    /// Non-negative 32-bit number of `key`, if it exists.
    /// llama.cpp reads such keys as uint32 only; this also accepts a non-negative int32.
    ///
    /// # Errors
    /// [`GgufError::BadKey`] if the key holds another type.
    pub fn get_u32(&self, key: &str) -> Result<Option<usize>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::U32(v)) => Ok(Some(*v as usize)),
            Some(Value::I32(v)) if *v >= 0 => Ok(Some(*v as usize)),
            Some(other) => Err(bad_type(key, other, "uint32")),
        }
    }

    /// Value of `key` as a 32-bit float, if it exists.
    ///
    /// # Errors
    /// [`GgufError::BadKey`] if the key holds another type or is not finite.
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F32(v)) if v.is_finite() => Ok(Some(*v)),
            Some(Value::F32(v)) => Err(GgufError::BadKey { key: key.into(), problem: format!("is {v}") }),
            Some(other) => Err(bad_type(key, other, "float32")),
        }
    }

    /// Numbers of `key` per block: a scalar stands for all blocks, an array must have `n` elements.
    ///
    /// # Errors
    /// [`GgufError::BadKey`] if the key holds another type or has another length.
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

/// First bytes of a Git LFS pointer file.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Alignment of tensors that ggml needs to compute with them in place (`TENSOR_ALIGNMENT`).
const LLAMA_ALIGNMENT: u64 = 32;

/// SHA-256 over all parts, in hex.
pub(crate) fn sha256<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut sha256 = Sha256::new();
    parts.into_iter().for_each(|part| sha256.update(part));
    sha256.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Suffix of the name of part `i` of `n` (`llama_split_path` of llama.cpp).
pub(crate) fn part_suffix(i: usize, n: usize) -> String {
    format!("-{:05}-of-{n:05}.gguf", i + 1)
}

fn bad_type(key: &str, found: &Value, wanted: &str) -> GgufError {
    GgufError::BadKey { key: key.into(), problem: format!("is of type {}, not {wanted}", found.type_name()) }
}

/// Start and length of a tensor's data in the file; `None` if they do not fit in 64 bits.
fn extent(ty: Type, ne: [u64; 4], offset: u64, data_offset: u64) -> Option<(u64, u64)> {
    let n = ne.iter().try_fold(1u64, |n, &k| n.checked_mul(k))?;
    if n == 0 || !ne[0].is_multiple_of(ty.block_size() as u64) {
        return None;
    }
    let len = (n / ty.block_size() as u64).checked_mul(ty.row_bytes(ty.block_size()) as u64)?;
    Some((data_offset.checked_add(offset)?, len))
}
