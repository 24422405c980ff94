//! GGUF headers, read and written by ggml itself.

use super::system::{logged_error, with_cause};
use super::{GgmlError, Type};
use llama_cpp_sys_2 as sys;
use std::borrow::Cow;
use std::ffi::{CStr, CString, c_char};
use std::ops::Range;
use std::ptr::NonNull;

/// GGML_MAX_NAME, including the terminating NUL.
const MAX_NAME: usize = 64;

/// Metadata value with exactly the type that it has in the file.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum RawValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    /// String: usually UTF-8, but tokens and foreign names may hold any bytes.
    Str(Vec<u8>),
    /// Array of strings.
    StrArray(Vec<Vec<u8>>),
    /// Any other array: ggml's element type number, the bytes, the length in elements.
    Array {
        ty: u32,
        bytes: Vec<u8>,
        len: usize,
    },
}

impl RawValue {
    /// Text of a string, with U+FFFD for invalid UTF-8; `None` for other types.
    pub fn as_text(&self) -> Option<Cow<'_, str>> {
        if let RawValue::Str(bytes) = self { Some(String::from_utf8_lossy(bytes)) } else { None }
    }

    /// Strings of the value; empty for other types.
    fn strings(&self) -> &[Vec<u8>] {
        match self {
            RawValue::Str(one) => std::slice::from_ref(one),
            RawValue::StrArray(all) => all,
            _ => &[],
        }
    }

    /// Array of unsigned 32-bit integers.
    pub fn u32_array(values: &[u32]) -> RawValue {
        RawValue::Array {
            ty: sys::GGUF_TYPE_UINT32,
            bytes: bytemuck::cast_slice(values).to_vec(),
            len: values.len(),
        }
    }

    /// Array of 32-bit floats.
    pub fn f32_array(values: &[f32]) -> RawValue {
        RawValue::Array {
            ty: sys::GGUF_TYPE_FLOAT32,
            bytes: bytemuck::cast_slice(values).to_vec(),
            len: values.len(),
        }
    }

    /// Elements of an array of 32-bit floats; `None` for other types.
    pub fn as_f32_array(&self) -> Option<Vec<f32>> {
        match self {
            RawValue::Array { ty: sys::GGUF_TYPE_FLOAT32, bytes, .. } => {
                Some(bytes.as_chunks().0.iter().map(|b| f32::from_ne_bytes(*b)).collect())
            }
            _ => None,
        }
    }

    /// Array of booleans.
    pub fn bool_array(values: &[bool]) -> RawValue {
        let bytes = values.iter().map(|v| u8::from(*v)).collect();
        RawValue::Array { ty: sys::GGUF_TYPE_BOOL, bytes, len: values.len() }
    }

    /// Array of unsigned 64-bit integers.
    pub fn u64_array(values: &[u64]) -> RawValue {
        RawValue::Array {
            ty: sys::GGUF_TYPE_UINT64,
            bytes: bytemuck::cast_slice(values).to_vec(),
            len: values.len(),
        }
    }

    /// Array of signed 32-bit integers.
    pub fn i32_array(values: &[i32]) -> RawValue {
        RawValue::Array {
            ty: sys::GGUF_TYPE_INT32,
            bytes: bytemuck::cast_slice(values).to_vec(),
            len: values.len(),
        }
    }

    /// Elements of an integer (8 to 64 bits) or boolean array; `None` for other types or negative elements.
    pub fn as_unsigned_array(&self) -> Option<Vec<u64>> {
        let RawValue::Array { ty, bytes, .. } = self else {
            return None;
        };
        fn each<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> Option<u64>) -> Option<Vec<u64>> {
            bytes.as_chunks::<N>().0.iter().map(|b| f(*b)).collect()
        }
        match *ty {
            sys::GGUF_TYPE_UINT8 | sys::GGUF_TYPE_BOOL => each(bytes, |b: [u8; 1]| Some(b[0].into())),
            sys::GGUF_TYPE_INT8 => each(bytes, |b| i8::from_ne_bytes(b).try_into().ok()),
            sys::GGUF_TYPE_UINT16 => each(bytes, |b| Some(u16::from_ne_bytes(b).into())),
            sys::GGUF_TYPE_INT16 => each(bytes, |b| i16::from_ne_bytes(b).try_into().ok()),
            sys::GGUF_TYPE_UINT32 => each(bytes, |b| Some(u32::from_ne_bytes(b).into())),
            sys::GGUF_TYPE_INT32 => each(bytes, |b| i32::from_ne_bytes(b).try_into().ok()),
            sys::GGUF_TYPE_UINT64 => each(bytes, |b| Some(u64::from_ne_bytes(b))),
            sys::GGUF_TYPE_INT64 => each(bytes, |b| i64::from_ne_bytes(b).try_into().ok()),
            _ => None,
        }
    }

    /// Name of the type, as the GGUF specification spells it.
    pub fn type_name(&self) -> &'static str {
        match self {
            RawValue::U8(_) => "uint8",
            RawValue::I8(_) => "int8",
            RawValue::U16(_) => "uint16",
            RawValue::I16(_) => "int16",
            RawValue::U32(_) => "uint32",
            RawValue::I32(_) => "int32",
            RawValue::U64(_) => "uint64",
            RawValue::I64(_) => "int64",
            RawValue::F32(_) => "float32",
            RawValue::F64(_) => "float64",
            RawValue::Bool(_) => "bool",
            RawValue::Str(_) => "string",
            RawValue::StrArray(_) | RawValue::Array { .. } => "array",
        }
    }
}

/// GGUF header held by ggml: metadata in file order and tensor descriptions.
pub struct RawGguf {
    ctx: NonNull<sys::gguf_context>,
    /// Keys whose strings hold NUL, with their values: ggml takes C strings, which end there.
    with_nul: Vec<(String, RawValue)>,
}

// SAFETY: a gguf_context has no thread affinity and all shared access is through const calls.
unsafe impl Send for RawGguf {}
// SAFETY: as above; mutation needs `&mut self`.
unsafe impl Sync for RawGguf {}

/// Converts to a C string of the same length; [`RawGguf::to_bytes`] restores each NUL in its place.
fn c_string(s: impl AsRef<[u8]>) -> CString {
    let bytes = s.as_ref().iter().map(|b| if *b == 0 { b'?' } else { *b }).collect::<Vec<_>>();
    CString::new(bytes).expect("no NUL is left")
}

/// Byte ranges of the strings of each metadata value in `header`, in file order; empty for other values.
/// ggml returns strings as C strings, so their bytes are taken from the file. Returns `None` if ggml would
/// not accept `header`.
fn string_ranges(header: &[u8]) -> Option<Vec<Vec<Range<usize>>>> {
    struct Walk<'a>(&'a [u8], usize);
    impl Walk<'_> {
        fn skip(&mut self, n: usize) -> Option<Range<usize>> {
            let range = self.1..self.1.checked_add(n)?;
            self.0.get(range.clone())?;
            self.1 = range.end;
            Some(range)
        }
        fn u32(&mut self) -> Option<u32> {
            let range = self.skip(4)?;
            Some(u32::from_le_bytes(self.0[range].try_into().ok()?))
        }
        fn length(&mut self) -> Option<usize> {
            let range = self.skip(8)?;
            u64::from_le_bytes(self.0[range].try_into().ok()?).try_into().ok()
        }
        fn string(&mut self) -> Option<Range<usize>> {
            let n = self.length()?;
            self.skip(n)
        }
        /// Skips `n` consecutive values of type `ty` and returns the ranges of strings among them.
        fn values(&mut self, ty: u32, n: usize) -> Option<Vec<Range<usize>>> {
            if ty == sys::GGUF_TYPE_STRING {
                return (0..n).map(|_| self.string()).collect();
            }
            self.skip(n.checked_mul(element_bytes(ty)?)?)?;
            Some(Vec::new())
        }
    }
    // Skips magic, version and number of tensors.
    let mut walk = Walk(header, 16);
    let n = walk.length()?;
    (0..n)
        .map(|_| {
            walk.string()?;
            match walk.u32()? {
                sys::GGUF_TYPE_ARRAY => {
                    let ty = walk.u32()?;
                    let len = walk.length()?;
                    walk.values(ty, len)
                }
                ty => walk.values(ty, 1),
            }
        })
        .collect()
}

impl RawGguf {
    /// Parses the header at the start of `file`.
    ///
    /// # Errors
    /// [`GgmlError::Header`] if ggml refuses it.
    pub fn parse(file: &[u8]) -> Result<RawGguf, GgmlError> {
        let _ = logged_error();
        let params = sys::gguf_init_params { no_alloc: true, ctx: std::ptr::null_mut() };
        // SAFETY: the slice is alive during the call; no pointer into it is kept.
        let ctx = unsafe { sys::gguf_init_from_buffer(file.as_ptr().cast(), file.len(), params) };
        NonNull::new(ctx).map(|ctx| RawGguf { ctx, with_nul: Vec::new() }).ok_or_else(|| {
            let reason = "not a readable GGUF header: damaged, cut short, or of a version that llama.cpp does not read";
            GgmlError::Header(with_cause(reason.into()))
        })
    }

    /// Creates a header without metadata or tensors.
    pub fn empty() -> RawGguf {
        // SAFETY: plain constructor.
        let ctx = NonNull::new(unsafe { sys::gguf_init_empty() }).expect("out of memory for an empty header");
        RawGguf { ctx, with_nul: Vec::new() }
    }

    fn raw(&self) -> *mut sys::gguf_context {
        self.ctx.as_ptr()
    }

    /// Alignment of tensor data, in bytes.
    pub fn alignment(&self) -> usize {
        // SAFETY: a live context.
        unsafe { sys::gguf_get_alignment(self.raw()) }
    }

    /// Offset in the file where tensor data starts.
    pub fn data_offset(&self) -> usize {
        // SAFETY: a live context.
        unsafe { sys::gguf_get_data_offset(self.raw()) }
    }

    /// Metadata of the `file` that this header was parsed from, in file order.
    ///
    /// # Errors
    /// [`GgmlError::Header`] if a key is empty or not UTF-8: it could not be copied exactly.
    pub fn metadata(&self, file: &[u8]) -> Result<Vec<(String, RawValue)>, GgmlError> {
        let strings = string_ranges(file)
            .ok_or_else(|| GgmlError::Header("the strings of its metadata cannot be found".into()))?;
        // SAFETY: a live context; ids run from 0 to n_kv.
        let n = unsafe { sys::gguf_get_n_kv(self.raw()) };
        (0..n)
            .zip(strings)
            .map(|(id, strings)| {
                // SAFETY: a valid id; ggml returns a C string owned by the context.
                let key = unsafe { CStr::from_ptr(sys::gguf_get_key(self.raw(), id)) };
                let strings = strings.into_iter().map(|range| file[range].to_vec());
                match key.to_str() {
                    Ok(key) if !key.is_empty() => Ok((key.to_string(), self.value(id, strings))),
                    _ => Err(GgmlError::Header(format!("metadata key {id} is empty or not UTF-8"))),
                }
            })
            .collect()
    }

    /// Value of key `id`, whose strings are `strings`.
    fn value(&self, id: i64, mut strings: impl Iterator<Item = Vec<u8>>) -> RawValue {
        let c = self.raw();
        // SAFETY: a valid id, and each getter is called for the type that ggml reports.
        unsafe {
            match sys::gguf_get_kv_type(c, id) {
                sys::GGUF_TYPE_UINT8 => RawValue::U8(sys::gguf_get_val_u8(c, id)),
                sys::GGUF_TYPE_INT8 => RawValue::I8(sys::gguf_get_val_i8(c, id)),
                sys::GGUF_TYPE_UINT16 => RawValue::U16(sys::gguf_get_val_u16(c, id)),
                sys::GGUF_TYPE_INT16 => RawValue::I16(sys::gguf_get_val_i16(c, id)),
                sys::GGUF_TYPE_UINT32 => RawValue::U32(sys::gguf_get_val_u32(c, id)),
                sys::GGUF_TYPE_INT32 => RawValue::I32(sys::gguf_get_val_i32(c, id)),
                sys::GGUF_TYPE_UINT64 => RawValue::U64(sys::gguf_get_val_u64(c, id)),
                sys::GGUF_TYPE_INT64 => RawValue::I64(sys::gguf_get_val_i64(c, id)),
                sys::GGUF_TYPE_FLOAT32 => RawValue::F32(sys::gguf_get_val_f32(c, id)),
                sys::GGUF_TYPE_FLOAT64 => RawValue::F64(sys::gguf_get_val_f64(c, id)),
                sys::GGUF_TYPE_BOOL => RawValue::Bool(sys::gguf_get_val_bool(c, id)),
                sys::GGUF_TYPE_STRING => RawValue::Str(strings.next().unwrap_or_default()),
                _ => {
                    let (ty, len) = (sys::gguf_get_arr_type(c, id), sys::gguf_get_arr_n(c, id));
                    if ty == sys::GGUF_TYPE_STRING {
                        return RawValue::StrArray(strings.collect());
                    }
                    let n_bytes = len * array_element_bytes(ty);
                    let data: *const u8 = sys::gguf_get_arr_data(c, id).cast();
                    let bytes = if n_bytes == 0 { &[] } else { std::slice::from_raw_parts(data, n_bytes) };
                    RawValue::Array { ty, bytes: bytes.to_vec(), len }
                }
            }
        }
    }

    /// Appends a key, or moves it to the end with a new value.
    pub fn set(&mut self, key: &str, value: &RawValue) {
        self.with_nul.retain(|(other, _)| other != key);
        if value.strings().iter().any(|s| s.contains(&0)) {
            self.with_nul.push((key.into(), value.clone()));
        }
        let (c, k) = (self.raw(), c_string(key));
        let k = k.as_ptr();
        // SAFETY: a live context that we hold exclusively; strings and arrays outlive the calls,
        // which copy them.
        unsafe {
            match value {
                RawValue::U8(v) => sys::gguf_set_val_u8(c, k, *v),
                RawValue::I8(v) => sys::gguf_set_val_i8(c, k, *v),
                RawValue::U16(v) => sys::gguf_set_val_u16(c, k, *v),
                RawValue::I16(v) => sys::gguf_set_val_i16(c, k, *v),
                RawValue::U32(v) => sys::gguf_set_val_u32(c, k, *v),
                RawValue::I32(v) => sys::gguf_set_val_i32(c, k, *v),
                RawValue::U64(v) => sys::gguf_set_val_u64(c, k, *v),
                RawValue::I64(v) => sys::gguf_set_val_i64(c, k, *v),
                RawValue::F32(v) => sys::gguf_set_val_f32(c, k, *v),
                RawValue::F64(v) => sys::gguf_set_val_f64(c, k, *v),
                RawValue::Bool(v) => sys::gguf_set_val_bool(c, k, *v),
                RawValue::Str(v) => sys::gguf_set_val_str(c, k, c_string(v).as_ptr()),
                RawValue::StrArray(v) => {
                    let owned: Vec<CString> = v.iter().map(c_string).collect();
                    let mut ptrs: Vec<*const c_char> = owned.iter().map(|s| s.as_ptr()).collect();
                    sys::gguf_set_arr_str(c, k, ptrs.as_mut_ptr(), ptrs.len());
                }
                RawValue::Array { ty, bytes, len } => {
                    assert_eq!(
                        bytes.len(),
                        len * array_element_bytes(*ty),
                        "array bytes and length disagree"
                    );
                    sys::gguf_set_arr_data(c, k, *ty, bytes.as_ptr().cast(), *len);
                }
            }
        }
    }

    /// Number of tensors.
    pub fn n_tensors(&self) -> usize {
        // SAFETY: a live context.
        unsafe { sys::gguf_get_n_tensors(self.raw()) as usize }
    }

    /// Name, raw type number, sizes (`ne` order) and offset in the data section of tensor `i`.
    ///
    /// # Panics
    /// If `i` is out of range.
    pub fn tensor(&self, i: usize) -> (String, u32, [u64; 4], u64) {
        assert!(i < self.n_tensors());
        let (c, id) = (self.raw(), i as i64);
        // SAFETY: a valid id; name and sizes are owned by the context.
        unsafe {
            let name = CStr::from_ptr(sys::gguf_get_tensor_name(c, id)).to_string_lossy().into_owned();
            let ne = std::slice::from_raw_parts(sys::gguf_get_tensor_ne(c, id), 4);
            let ne = std::array::from_fn(|k| ne[k] as u64);
            (name, sys::gguf_get_tensor_type(c, id), ne, sys::gguf_get_tensor_offset(c, id) as u64)
        }
    }

    /// Appends the description of a tensor with the sizes `ne`, after the existing ones.
    ///
    /// # Panics
    /// If the name is taken or too long for ggml, or the sizes do not suit the type.
    pub fn add_tensor(&mut self, name: &str, ty: Type, ne: &[usize]) {
        let c_name = c_string(name);
        assert!(
            name.len() < MAX_NAME && (1..=4).contains(&ne.len()) && ne[0].is_multiple_of(ty.block_size())
        );
        // SAFETY: a header-only context for one tensor, freed before returning; ggml copies it.
        unsafe {
            assert!(sys::gguf_find_tensor(self.raw(), c_name.as_ptr()) < 0, "tensor {name} twice");
            let params = sys::ggml_init_params {
                mem_size: 2 * sys::ggml_tensor_overhead(),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            };
            let ctx = sys::ggml_init(params);
            assert!(!ctx.is_null(), "out of memory for a tensor header");
            let sizes: Vec<i64> = ne.iter().map(|&n| n as i64).collect();
            let t = sys::ggml_new_tensor(ctx, ty.raw(), sizes.len() as i32, sizes.as_ptr());
            sys::ggml_set_name(t, c_name.as_ptr());
            sys::gguf_add_tensor(self.raw(), t);
            sys::ggml_free(ctx);
        }
    }

    /// Serialises the header, padded to the alignment: tensor data follows directly.
    pub fn to_bytes(&self) -> Vec<u8> {
        // SAFETY: ggml writes exactly meta_size bytes.
        let mut bytes = unsafe {
            let mut bytes = vec![0u8; sys::gguf_get_meta_size(self.raw())];
            sys::gguf_get_meta_data(self.raw(), bytes.as_mut_ptr().cast());
            bytes
        };
        if self.with_nul.is_empty() {
            return bytes;
        }
        let ranges = string_ranges(&bytes).expect("ggml writes headers that it reads");
        for (key, value) in &self.with_nul {
            // SAFETY: a live context and a C string.
            let id = unsafe { sys::gguf_find_key(self.raw(), c_string(key).as_ptr()) };
            for (range, text) in ranges[id as usize].iter().zip(value.strings()) {
                bytes[range.clone()].copy_from_slice(text);
            }
        }
        bytes
    }
}

fn array_element_bytes(ty: u32) -> usize {
    element_bytes(ty).unwrap_or_else(|| panic!("arrays of GGUF type {ty} do not exist"))
}

/// Size in bytes of a value of type `ty`, if it is fixed.
fn element_bytes(ty: u32) -> Option<usize> {
    Some(match ty {
        sys::GGUF_TYPE_UINT8 | sys::GGUF_TYPE_INT8 | sys::GGUF_TYPE_BOOL => 1,
        sys::GGUF_TYPE_UINT16 | sys::GGUF_TYPE_INT16 => 2,
        sys::GGUF_TYPE_UINT32 | sys::GGUF_TYPE_INT32 | sys::GGUF_TYPE_FLOAT32 => 4,
        sys::GGUF_TYPE_UINT64 | sys::GGUF_TYPE_INT64 | sys::GGUF_TYPE_FLOAT64 => 8,
        _ => return None,
    })
}

impl Drop for RawGguf {
    fn drop(&mut self) {
        // SAFETY: made by parse or empty, freed once.
        unsafe { sys::gguf_free(self.raw()) }
    }
}
