//! Storage of large arrays: in memory or, where memory is short, in temporary files.
//! The system caches those files in memory as far as there is room.

use crate::ggml::map_scratch;
use bytemuck::Pod;
use memmap2::MmapMut;
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;

/// Factory of arrays in memory or in temporary files.
#[derive(Clone, Debug, Default)]
pub struct SpillStore {
    /// Folder of the files; without it arrays stay in memory.
    folder: Option<PathBuf>,
}

/// Array in memory or in a file.
#[derive(Debug)]
pub struct SpillVec<T>(Place<T>);

#[derive(Debug)]
enum Place<T> {
    Memory(Vec<T>),
    File(MmapMut),
}

impl SpillStore {
    /// Creates a store whose arrays are nameless files in `folder`, which vanish with the arrays.
    pub fn in_files(folder: PathBuf) -> SpillStore {
        SpillStore { folder: Some(folder) }
    }

    /// Whether arrays stay in memory.
    pub fn is_memory(&self) -> bool {
        self.folder.is_none()
    }

    /// Array of `len` zeros.
    ///
    /// # Errors
    /// Returns the system's error if no file can be made there, or the disk is full.
    pub fn zeros<T: Pod>(&self, len: usize) -> std::io::Result<SpillVec<T>> {
        let place = match &self.folder {
            Some(folder) if len > 0 => Place::File(map_scratch(folder, len * size_of::<T>())?),
            _ => Place::Memory(vec![T::zeroed(); len]),
        };
        Ok(SpillVec(place))
    }

    /// Array that holds `values`.
    ///
    /// # Errors
    /// As [`SpillStore::zeros`].
    pub fn put<T: Pod>(&self, values: Vec<T>) -> std::io::Result<SpillVec<T>> {
        if self.folder.is_none() {
            return Ok(SpillVec(Place::Memory(values)));
        }
        let mut array = self.zeros(values.len())?;
        array.copy_from_slice(&values);
        Ok(array)
    }
}

impl<T: Pod> From<Vec<T>> for SpillVec<T> {
    fn from(values: Vec<T>) -> SpillVec<T> {
        SpillVec(Place::Memory(values))
    }
}

impl<T: Pod> Deref for SpillVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Place::Memory(values) => values,
            Place::File(map) => bytemuck::cast_slice(map),
        }
    }
}

impl<T: Pod> DerefMut for SpillVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.0 {
            Place::Memory(values) => values,
            Place::File(map) => bytemuck::cast_slice_mut(map),
        }
    }
}

/// The system's error about a temporary file, without the file's name: tempfile adds the name, and nobody
/// knows it.
pub(crate) fn without_path(e: std::io::Error) -> std::io::Error {
    let text = e.to_string();
    match text.rsplit_once(" at path ") {
        Some((said, _)) if e.raw_os_error().is_none() => std::io::Error::new(e.kind(), said),
        _ => e,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_in_files_are_like_those_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let spill = SpillStore::in_files(folder.path().into());
        let values: Vec<f32> = (0..1_000_003).map(|i| i as f32).collect();
        let mut kept = spill.put(values.clone()).unwrap();
        assert_eq!(*kept, values[..]);
        kept[77] = -1.0;
        assert_eq!((kept[76], kept[77]), (76.0, -1.0));
        assert!(spill.zeros::<u16>(70_000).unwrap().iter().all(|v| *v == 0));
        assert!(spill.zeros::<f32>(0).unwrap().is_empty());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "files without names");
        assert!(SpillStore::in_files(folder.path().join("nowhere")).zeros::<f32>(1).is_err());
    }
}
