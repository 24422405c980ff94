//! Where large arrays live: in memory or, where that is short, in temporary files that the system keeps in memory as
//! far as there is room.

use crate::ggml::map_scratch;
use bytemuck::Pod;
use memmap2::MmapMut;
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;

/// Makes arrays.
#[derive(Clone, Debug, Default)]
pub struct Shelf {
    /// Where arrays are put into files; without it they stay in memory.
    folder: Option<PathBuf>,
}

/// Numbers in memory or in a file.
#[derive(Debug)]
pub struct Array<T>(Place<T>);

#[derive(Debug)]
enum Place<T> {
    Memory(Vec<T>),
    File(MmapMut),
}

impl Shelf {
    /// Arrays in files of `folder`, which have no names and are gone when the arrays are.
    pub fn in_files(folder: PathBuf) -> Shelf {
        Shelf { folder: Some(folder) }
    }

    /// Whether arrays stay in memory.
    pub fn is_memory(&self) -> bool {
        self.folder.is_none()
    }

    /// `len` zeros.
    ///
    /// # Errors
    /// What the system says if no file can be made there, or the disk is full.
    pub fn zeros<T: Pod>(&self, len: usize) -> std::io::Result<Array<T>> {
        let place = match &self.folder {
            Some(folder) if len > 0 => Place::File(map_scratch(folder, len * size_of::<T>())?),
            _ => Place::Memory(vec![T::zeroed(); len]),
        };
        Ok(Array(place))
    }

    /// `values` themselves.
    ///
    /// # Errors
    /// As [`Shelf::zeros`].
    pub fn put<T: Pod>(&self, values: Vec<T>) -> std::io::Result<Array<T>> {
        if self.folder.is_none() {
            return Ok(Array(Place::Memory(values)));
        }
        let mut array = self.zeros(values.len())?;
        array.copy_from_slice(&values);
        Ok(array)
    }
}

impl<T: Pod> From<Vec<T>> for Array<T> {
    fn from(values: Vec<T>) -> Array<T> {
        Array(Place::Memory(values))
    }
}

impl<T: Pod> Deref for Array<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Place::Memory(values) => values,
            Place::File(map) => bytemuck::cast_slice(map),
        }
    }
}

impl<T: Pod> DerefMut for Array<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.0 {
            Place::Memory(values) => values,
            Place::File(map) => bytemuck::cast_slice_mut(map),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_in_files_are_like_those_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let shelf = Shelf::in_files(folder.path().into());
        let values: Vec<f32> = (0..1_000_003).map(|i| i as f32).collect();
        let mut kept = shelf.put(values.clone()).unwrap();
        assert_eq!(*kept, values[..]);
        kept[77] = -1.0;
        assert_eq!((kept[76], kept[77]), (76.0, -1.0));
        assert!(shelf.zeros::<u16>(70_000).unwrap().iter().all(|v| *v == 0));
        assert!(shelf.zeros::<f32>(0).unwrap().is_empty());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "files without names");
        assert!(Shelf::in_files(folder.path().join("nowhere")).zeros::<f32>(1).is_err());
    }
}

/// What the system said of a temporary file, without its name, which tempfile adds and nobody knows.
pub(crate) fn without_path(e: std::io::Error) -> std::io::Error {
    let text = e.to_string();
    match text.rsplit_once(" at path ") {
        Some((said, _)) if e.raw_os_error().is_none() => std::io::Error::new(e.kind(), said),
        _ => e,
    }
}
