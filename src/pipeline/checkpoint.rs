//! Records that a run keeps, stage by stage, so that an interrupted run can resume.
//!
//! A stage encodes its result as a [`Record`] and reads it back itself. A [`Checkpoint`] knows only the names
//! of records.

use crate::ggml::Type;
use crate::gguf::{GgufError, Value};

/// Named values and tensors of a stage.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// Values by name.
    pub values: Vec<(String, Value)>,
    /// Tensors.
    pub tensors: Vec<KeptTensor>,
}

/// A tensor of a record.
#[derive(Clone, Debug)]
pub struct KeptTensor {
    /// Name.
    pub name: String,
    /// Element type.
    pub ty: Type,
    /// Sizes, ne\[0\] first.
    pub ne: Vec<usize>,
    /// Encoded rows.
    pub bytes: Vec<u8>,
}

impl KeptTensor {
    /// Values of a tensor of 32-bit floats.
    pub fn floats(&self) -> Vec<f32> {
        self.bytes.as_chunks().0.iter().map(|b| f32::from_ne_bytes(*b)).collect()
    }
}

impl Record {
    /// Adds a value.
    pub fn with(mut self, key: &str, value: Value) -> Record {
        self.values.push((key.into(), value));
        self
    }

    /// Adds a list of numbers.
    pub fn with_numbers(self, key: &str, numbers: impl IntoIterator<Item = usize>) -> Record {
        let numbers: Vec<u64> = numbers.into_iter().map(|n| n as u64).collect();
        self.with(key, Value::u64_array(&numbers))
    }

    /// Value called `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.iter().find(|(k, _)| k == key).map(|(_, value)| value)
    }

    /// List of numbers called `key`.
    pub fn numbers(&self, key: &str) -> Option<Vec<usize>> {
        let numbers = self.get(key).and_then(Value::as_unsigned_array)?;
        Some(numbers.into_iter().map(|n| n as usize).collect())
    }

    /// Tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&KeptTensor> {
        self.tensors.iter().find(|t| t.name == name)
    }
}

/// Store of records from one run to the next. The default methods keep nothing.
pub trait Checkpoint {
    /// Loads the record that an earlier run of the same job kept under `name`.
    ///
    /// # Errors
    /// [`GgufError`] if it cannot be read.
    fn load(&mut self, _name: &str) -> Result<Option<Record>, GgufError> {
        Ok(None)
    }

    /// Returns whether there is a record called `name`.
    fn holds(&self, _name: &str) -> bool {
        false
    }

    /// Saves `record` under `name` and replaces an earlier one.
    ///
    /// # Errors
    /// [`GgufError`] if it cannot be written.
    fn save(&mut self, _name: &str, _record: Record) -> Result<(), GgufError> {
        Ok(())
    }

    /// Error that `part` of the record `name` is not what its stage wrote.
    fn damaged(&self, name: &str, part: &str) -> GgufError {
        GgufError::BadKey { key: format!("{name}.{part}"), problem: "is not what was kept".into() }
    }
}

/// Checkpoint that keeps nothing.
impl Checkpoint for () {}
