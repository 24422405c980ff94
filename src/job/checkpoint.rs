//! State of an interrupted run for the next one: a folder of small GGUF files, each complete or absent.

use super::{Job, JobError};
use crate::calibrate::{Recipe, Text, Windows};
use crate::forward::SUM_TOKENS;
use crate::gguf::{GgufError, GgufFile, OutTensor, TensorData, TensorInfo, Value, sha256, write_gguf};
use crate::pipeline::{Checkpoint, KeptTensor, Record, Settings, record_names};
use std::borrow::Cow;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

/// File with the terms of the run. Another run may only resume on the same terms.
const TERMS: &str = "run.txt";
const WINDOWS: &str = "windows.gguf";
const TEXTS: &str = "texts.gguf";
/// File that is being written. It always has the same name, so that a killed run leaves at most one, which
/// the next run overwrites or deletes.
const UNFINISHED: &str = "unfinished.part";
/// Lock file of the run that uses the folder. The system releases the lock however the run ends.
const LOCK: &str = "lock";

/// Checkpoint in an open folder.
pub(super) struct DiskCheckpoint {
    folder: PathBuf,
    /// Number of blocks of the source.
    n_layer: usize,
    _lock: Lock,
}

/// Exclusive lock on a folder while the value lives.
struct Lock(File);

impl Lock {
    /// Acquires the lock of `folder`.
    ///
    /// # Errors
    /// [`JobError`] if another run holds it, or the folder is not writable.
    fn of(folder: &Path) -> Result<Lock, JobError> {
        let io = |source| JobError::Io { path: folder.into(), source };
        let file = File::create(folder.join(LOCK)).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JobError::StateBusy(folder.into())),
            // On a file system without locks, the user must ensure that only one run uses the folder.
            Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(io(e)),
        }
        Ok(Lock(file))
    }
}

impl Drop for Lock {
    /// Releases the lock explicitly. Closing the file is not enough: a process that is being started at this
    /// moment holds all files of this one until it executes another program.
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

impl DiskCheckpoint {
    /// Opens or creates `folder` for runs of `job` on a source of `n_layer` blocks with the checksum
    /// `source_sha256`.
    /// Existing records are used only with `resume`, and only if they were made on the same terms.
    ///
    /// # Errors
    /// [`JobError`] if there is a state that may not be used, or the folder cannot be created.
    pub(super) fn open(
        folder: &Path,
        resume: bool,
        job: &Job,
        n_layer: usize,
        source_sha256: &str,
    ) -> Result<DiskCheckpoint, JobError> {
        let io = |source| JobError::Io { path: folder.into(), source };
        std::fs::create_dir_all(folder).map_err(io)?;
        let lock = Lock::of(folder)?;
        let state = DiskCheckpoint { folder: folder.into(), n_layer, _lock: lock };
        let (path, terms) = (folder.join(TERMS), terms(job, source_sha256));
        match std::fs::read_to_string(&path) {
            Ok(_) if !resume => Err(JobError::StateExists(folder.into())),
            Ok(found) if found == terms => Ok(state),
            Ok(found) => {
                // Finds the first line of the form `name: value` that differs.
                let mut lines = found.lines().zip(terms.lines()).filter(|(a, b)| a != b);
                let (then, now) = lines.next().unwrap_or(("shorter", "longer"));
                let [then, now] = [then, now].map(|l| l.trim().trim_end_matches(',').to_string());
                Err(JobError::StateMismatch { path: folder.into(), then, now })
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                // Without its terms, it is unknown to which run the rest belongs.
                state.clear();
                state.replace(TERMS, |file| {
                    let written = std::io::Write::write_all(file, terms.as_bytes());
                    written.map_err(|source| GgufError::Io { path, source })
                })?;
                Ok(state)
            }
            Err(source) => Err(GgufError::Io { path, source }.into()),
        }
    }

    /// Calibration windows, if they were collected.
    pub(super) fn windows(&self) -> Result<Option<Windows>, GgufError> {
        let Some(file) = self.read(WINDOWS)? else { return Ok(None) };
        let numbers = |key| self.numbers(&file, key);
        let tokens = numbers("tokens")?.into_iter().map(|t| t as i32).collect();
        let sizes = numbers("sizes")?;
        let [n_ctx, n_fit, n_held_out, n_self] = sizes[..] else {
            return Err(self.damaged_file(WINDOWS, "sizes"));
        };
        let w = Windows { n_ctx, tokens, n_fit, n_held_out, n_self };
        if n_ctx == 0 || w.tokens.len() != n_ctx * w.n_windows() || n_fit == 0 || n_held_out == 0 {
            return Err(self.damaged_file(WINDOWS, "tokens"));
        }
        Ok(Some(w))
    }

    pub(super) fn keep_windows(&self, w: &Windows) -> Result<(), GgufError> {
        let sizes = [w.n_ctx, w.n_fit, w.n_held_out, w.n_self];
        let values = [("sizes".into(), numbers(sizes)), ("tokens".into(), Value::i32_array(&w.tokens))];
        self.write(WINDOWS, &values, &[])
    }

    /// Calibration texts of a mixture, if they were collected.
    pub(super) fn texts(&self) -> Result<Option<Vec<Text>>, GgufError> {
        let Some(file) = self.read(TEXTS)? else { return Ok(None) };
        let damaged = || self.damaged_file(TEXTS, "texts");
        let Some(Value::StrArray(names)) = file.get("names") else { return Err(damaged()) };
        let (weights, counts) = (self.numbers(&file, "weights")?, self.numbers(&file, "counts")?);
        let lengths = self.numbers(&file, "lengths")?;
        let mut tokens = self.numbers(&file, "tokens")?.into_iter().map(|t| t as i32);
        let mut lengths = lengths.into_iter();
        let mut windows = |n: usize| -> Option<Vec<Vec<i32>>> {
            (0..n)
                .map(|_| {
                    let length = lengths.next()?;
                    let window: Vec<i32> = tokens.by_ref().take(length).collect();
                    (window.len() == length).then_some(window)
                })
                .collect()
        };
        if weights.len() != names.len() || counts.len() != 2 * names.len() {
            return Err(damaged());
        }
        let text = |(i, name): (usize, &Vec<u8>)| {
            Some(Text {
                name: String::from_utf8_lossy(name).into_owned(),
                weight: f64::from_bits(weights[i] as u64),
                fit: windows(counts[2 * i])?,
                held_out: windows(counts[2 * i + 1])?,
            })
        };
        names.iter().enumerate().map(text).collect::<Option<_>>().map(Some).ok_or_else(damaged)
    }

    pub(super) fn keep_texts(&self, texts: &[Text]) -> Result<(), GgufError> {
        let windows = || texts.iter().flat_map(|t| t.fit.iter().chain(&t.held_out));
        let tokens: Vec<i32> = windows().flatten().copied().collect();
        let names = texts.iter().map(|t| t.name.clone().into_bytes()).collect();
        let values = [
            ("names".into(), Value::StrArray(names)),
            ("weights".into(), numbers(texts.iter().map(|t| t.weight.to_bits() as usize))),
            ("counts".into(), numbers(texts.iter().flat_map(|t| [t.fit.len(), t.held_out.len()]))),
            ("lengths".into(), numbers(windows().map(Vec::len))),
            ("tokens".into(), Value::i32_array(&tokens)),
        ];
        self.write(TEXTS, &values, &[])
    }

    /// Deletes all records, and the folder if it contains nothing else.
    pub(super) fn remove(self) {
        self.clear();
        let _ = std::fs::remove_file(self.folder.join(LOCK));
        let _ = std::fs::remove_dir(&self.folder);
    }

    /// Deletes all records, the terms first.
    fn clear(&self) {
        let records = record_names(self.n_layer).into_iter().map(|name| file_of(&name));
        let others = [TERMS, WINDOWS, TEXTS, UNFINISHED].map(String::from);
        others.into_iter().chain(records).for_each(|name| drop(std::fs::remove_file(self.folder.join(name))));
    }

    /// Writes a file under a temporary name, and renames it when it is complete and on the disk.
    fn replace(
        &self,
        name: &str,
        write: impl FnOnce(&mut File) -> Result<(), GgufError>,
    ) -> Result<(), GgufError> {
        let (unfinished, path) = (self.folder.join(UNFINISHED), self.folder.join(name));
        let io = |source| GgufError::Io { path: path.clone(), source };
        let mut file = File::create(&unfinished).map_err(io)?;
        write(&mut file)?;
        file.sync_data().map_err(io)?;
        std::fs::rename(unfinished, &path).map_err(io)
    }

    fn write(
        &self,
        name: &str,
        metadata: &[(String, Value)],
        tensors: &[OutTensor],
    ) -> Result<(), GgufError> {
        let path = self.folder.join(name);
        self.replace(name, |file| write_gguf(&mut std::io::BufWriter::new(file), &path, metadata, tensors))
    }

    fn read(&self, name: &str) -> Result<Option<GgufFile>, GgufError> {
        let path = self.folder.join(name);
        if path.exists() { GgufFile::open(&path).map(Some) } else { Ok(None) }
    }

    fn damaged_file(&self, name: &str, part: &str) -> GgufError {
        let reason = format!("{part}: not as this program writes it; remove the folder and begin anew");
        GgufError::Header { path: self.folder.join(name), reason }
    }

    fn numbers(&self, file: &GgufFile, key: &str) -> Result<Vec<usize>, GgufError> {
        let name = file.paths().next().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        let found = file.get(key).and_then(Value::as_unsigned_array);
        Ok(found.ok_or_else(|| self.damaged_file(&name, key))?.into_iter().map(|n| n as usize).collect())
    }
}

impl Checkpoint for DiskCheckpoint {
    fn load(&mut self, name: &str) -> Result<Option<Record>, GgufError> {
        let Some(file) = self.read(&file_of(name))? else { return Ok(None) };
        let kept = |t: &TensorInfo| KeptTensor {
            name: t.name.clone(),
            ty: t.ty,
            ne: t.ne.clone(),
            bytes: file.data(t).to_vec(),
        };
        let tensors = file.tensors().iter().map(kept).collect();
        Ok(Some(Record { values: file.metadata().to_vec(), tensors }))
    }

    fn holds(&self, name: &str) -> bool {
        self.folder.join(file_of(name)).exists()
    }

    fn save(&mut self, name: &str, record: Record) -> Result<(), GgufError> {
        let tensor = |t: &KeptTensor| OutTensor {
            name: t.name.clone(),
            ty: t.ty,
            ne: t.ne.clone(),
            data: TensorData::made({
                let bytes = t.bytes.clone();
                move || Ok(Cow::Owned(bytes.clone()))
            }),
        };
        let tensors: Vec<OutTensor> = record.tensors.iter().map(tensor).collect();
        self.write(&file_of(name), &record.values, &tensors)
    }

    fn damaged(&self, name: &str, part: &str) -> GgufError {
        self.damaged_file(&file_of(name), part)
    }
}

/// Name of the file of a record.
fn file_of(record: &str) -> String {
    format!("{record}.gguf")
}

fn numbers(values: impl IntoIterator<Item = usize>) -> Value {
    Value::u64_array(&values.into_iter().map(|n| n as u64).collect::<Vec<_>>())
}

/// Version of the decisions. It increases whenever the same terms lead to other decisions within one version
/// of the program.
const DECISIONS: u32 = 4;

/// All inputs that the result depends on, one per line. The number of threads is not among them.
fn terms(job: &Job, source_sha256: &str) -> String {
    // Chunks that hold a whole sum in 32 bits give the same sums, however large they are.
    let chunk_tokens = job.settings.chunk_tokens.min(SUM_TOKENS);
    let settings = Settings { n_threads: 0, spill: Default::default(), chunk_tokens, ..job.settings.clone() };
    let given = job.windows.as_ref().map(|w| sha256([bytemuck::cast_slice(&w.tokens)]));
    let recipe = Recipe { n_threads: 0, n_parallel: 0, ..job.recipe.clone() };
    format!(
        "putri-gguf {} ({DECISIONS}) with ggml {}, method {}\nsource: {source_sha256}\n{settings:#?}\n{recipe:#?}\n{:#?}\nwindows given: {given:?}\n",
        env!("CARGO_PKG_VERSION"),
        crate::ggml::engine_version(),
        job.settings.method.name(),
        job.quantise,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_free_again_though_a_process_that_is_being_started_holds_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::of(dir.path()).unwrap();
        assert!(matches!(Lock::of(dir.path()), Err(JobError::StateBusy(_))));
        let held = lock.0.try_clone().unwrap();
        drop(lock);
        drop(Lock::of(dir.path()).unwrap());
        drop(held);
    }
}
