//! What an interrupted run leaves behind for the next one: a folder of small GGUF files, each complete or absent.

use super::result::method_name;
use super::{Job, JobError};
use crate::calibrate::{Recipe, Windows};
use crate::gguf::{GgufError, GgufFile, OutTensor, Value, sha256, write_gguf};
use crate::model::{BlockShape, BlockVector, Model, Piece};
use crate::pipeline::{BlockPlan, Journal, Settings, Settled};
use crate::prune::{Candidate, Choice, GroupId, LazyGreedy};
use crate::requant::Quantised;
use std::borrow::Cow;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

/// On what terms the run was made: another run may only go on from here on the same.
const TERMS: &str = "run.txt";
const WINDOWS: &str = "windows.gguf";
const HEADS: &str = "heads.gguf";
const WIDTHS: &str = "widths.gguf";
const CHOICE: &str = "choice.gguf";
/// What is being written. Always the same name, so that a run that was killed leaves one at most, which the next
/// one writes over or deletes.
const UNFINISHED: &str = "unfinished.part";
/// Held by the run that works here. The system lets go of it however that ends.
const LOCK: &str = "lock";

fn block_file(il: usize) -> String {
    format!("block-{il:03}.gguf")
}

/// An open state folder.
pub(super) struct State {
    folder: PathBuf,
    /// Of each block of the source.
    shapes: Vec<BlockShape>,
    /// What goes from feed-forwards.
    piece: Piece,
    _lock: Lock,
}

/// The right to work in a folder, while it lives.
struct Lock(File);

impl Lock {
    /// # Errors
    /// [`JobError`] if another has it, or there is no writing to the folder.
    fn of(folder: &Path) -> Result<Lock, JobError> {
        let io = |source| JobError::Io { path: folder.into(), source };
        let file = File::create(folder.join(LOCK)).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JobError::StateBusy(folder.into())),
            // A file system without locks: one run at a time is up to the user there.
            Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(io(e)),
        }
        Ok(Lock(file))
    }
}

impl Drop for Lock {
    /// To close the file is not enough: a process that is being started at this moment holds all files of this one until it
    /// is another program.
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

impl State {
    /// Opens or makes `folder` for runs of `job` on a source with that checksum. What is there already is only
    /// taken over with `resume`, and if it was made on the same terms.
    ///
    /// # Errors
    /// [`JobError`] if there is a state that may not be used, or the folder cannot be made.
    pub(super) fn open(
        folder: &Path,
        resume: bool,
        job: &Job,
        source: &Model,
        source_sha256: &str,
    ) -> Result<State, JobError> {
        let io = |source| JobError::Io { path: folder.into(), source };
        std::fs::create_dir_all(folder).map_err(io)?;
        let lock = Lock::of(folder)?;
        let (shapes, piece) = (source.hparams.blocks.clone(), job.settings.piece(source));
        let state = State { folder: folder.into(), shapes, piece, _lock: lock };
        let (path, terms) = (folder.join(TERMS), terms(job, source_sha256));
        match std::fs::read_to_string(&path) {
            Ok(_) if !resume => Err(JobError::StateExists(folder.into())),
            Ok(found) if found == terms => Ok(state),
            Ok(found) => {
                // Of lines of the form `name: value`, the first that is not the same.
                let mut lines = found.lines().zip(terms.lines()).filter(|(a, b)| a != b);
                let (then, now) = lines.next().unwrap_or(("shorter", "longer"));
                let [then, now] = [then, now].map(|l| l.trim().trim_end_matches(',').to_string());
                Err(JobError::StateMismatch { path: folder.into(), then, now })
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                // Without its terms nobody can say what the rest belongs to.
                state.clear();
                state.replace(TERMS, |file| {
                    let written = std::io::Write::write_all(file, terms.as_bytes());
                    written.map_err(|source| GgufError::Io { path, source })
                })?;
                Ok(state)
            }
            Err(e) => Err(JobError::Io { path, source: e }),
        }
    }

    /// The calibration windows, if they were collected.
    pub(super) fn windows(&self) -> Result<Option<Windows>, GgufError> {
        let Some(file) = self.read(WINDOWS)? else { return Ok(None) };
        let numbers = |key| self.numbers(&file, key);
        let tokens = numbers("tokens")?.into_iter().map(|t| t as i32).collect();
        let sizes = numbers("sizes")?;
        let [n_ctx, n_fit, n_held_out, n_self] = sizes[..] else {
            return Err(self.damaged(WINDOWS, "sizes"));
        };
        let w = Windows { n_ctx, tokens, n_fit, n_held_out, n_self };
        if n_ctx == 0 || w.tokens.len() != n_ctx * w.n_windows() || n_fit == 0 || n_held_out == 0 {
            return Err(self.damaged(WINDOWS, "tokens"));
        }
        Ok(Some(w))
    }

    pub(super) fn keep_windows(&self, w: &Windows) -> Result<(), GgufError> {
        let sizes = [w.n_ctx, w.n_fit, w.n_held_out, w.n_self];
        self.write(WINDOWS, &[("sizes", numbers(sizes)), ("tokens", Value::i32_array(&w.tokens))], &[])
    }

    /// Deletes what is kept here, and the folder if nothing else is in it.
    pub(super) fn remove(self) {
        self.clear();
        let _ = std::fs::remove_file(self.folder.join(LOCK));
        let _ = std::fs::remove_dir(&self.folder);
    }

    /// Deletes what is kept here, the terms first.
    fn clear(&self) {
        let blocks = (0..self.shapes.len()).map(block_file);
        let others = [TERMS, WINDOWS, HEADS, WIDTHS, CHOICE, UNFINISHED].map(String::from);
        others.into_iter().chain(blocks).for_each(|name| drop(std::fs::remove_file(self.folder.join(name))));
    }

    /// Writes a file beside its name, and gives it its name when it is complete and on the disk.
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

    fn write(&self, name: &str, metadata: &[(&str, Value)], tensors: &[OutTensor]) -> Result<(), GgufError> {
        let metadata: Vec<_> = metadata.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
        let path = self.folder.join(name);
        self.replace(name, |file| write_gguf(&mut std::io::BufWriter::new(file), &path, &metadata, tensors))
    }

    fn read(&self, name: &str) -> Result<Option<GgufFile>, GgufError> {
        let path = self.folder.join(name);
        if path.exists() { GgufFile::open(&path).map(Some) } else { Ok(None) }
    }

    fn damaged(&self, name: &str, part: &str) -> GgufError {
        let reason = format!("{part}: not as this program writes it; remove the folder and begin anew");
        GgufError::Header { path: self.folder.join(name), reason }
    }

    fn numbers(&self, file: &GgufFile, key: &str) -> Result<Vec<usize>, GgufError> {
        let name = file.paths().next().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        let found = file.get(key).and_then(Value::as_unsigned_array);
        Ok(found.ok_or_else(|| self.damaged(&name, key))?.into_iter().map(|n| n as usize).collect())
    }

    fn read_heads(&self) -> Result<Option<LazyGreedy>, GgufError> {
        let Some(file) = self.read(HEADS)? else { return Ok(None) };
        let group = |n: &[usize]| {
            let [block, group] = n[..] else { return None };
            let there = self.shapes.get(block).is_some_and(|s| group < s.n_head_kv);
            there.then_some(GroupId { block, group })
        };
        let candidate = |n: &[usize]| {
            let [block, at, score, scored_at] = n[..] else { return None };
            let scored_at = scored_at.checked_sub(1);
            Some(Candidate { id: group(&[block, at])?, score: f64::from_bits(score as u64), scored_at })
        };
        let removed = self.numbers(&file, "removed")?.chunks(2).map(group).collect::<Option<_>>();
        let candidates = self.numbers(&file, "candidates")?.chunks(4).map(candidate).collect::<Option<_>>();
        match (removed, candidates) {
            (Some(removed), Some(candidates)) => Ok(Some(LazyGreedy { removed, candidates })),
            _ => Err(self.damaged(HEADS, "groups")),
        }
    }

    fn read_choice(&self) -> Result<Option<Choice>, GgufError> {
        let Some(file) = self.read(CHOICE)? else { return Ok(None) };
        let written = match file.get("choice") {
            Some(name) => name.as_text().and_then(|name| Choice::named(&name)),
            None => None,
        };
        written.map(Some).ok_or_else(|| self.damaged(CHOICE, "choice"))
    }

    fn read_block(&self, il: usize) -> Result<Option<(BlockPlan, Vec<String>)>, GgufError> {
        let name = block_file(il);
        let Some(file) = self.read(&name)? else { return Ok(None) };
        let shape = self.shapes[il];
        let subset = |key, n: usize| {
            let found = self.numbers(&file, key)?;
            let mut sorted = found.clone();
            sorted.sort_unstable();
            sorted.dedup();
            let sound = sorted.len() == found.len() && sorted.last().is_none_or(|&last| last < n);
            if sound { Ok(found) } else { Err(self.damaged(&name, key)) }
        };
        let matrix =
            |key| file.find(key).map(|t| Quantised::new(t.ty, t.ne[0], t.n_rows(), file.data(t).to_vec()));
        let vector =
            |v: BlockVector| file.find(&format!("{v:?}")).map(|t| file.floats(t, 0..t.n_rows())).transpose();
        let mut vectors: [Option<Vec<f32>>; BlockVector::ALL.len()] = Default::default();
        for (slot, v) in vectors.iter_mut().zip(BlockVector::ALL) {
            *slot = vector(v)?;
        }
        let plan = BlockPlan {
            groups: subset("groups", shape.n_head_kv)?,
            experts: subset("experts", shape.n_expert)?,
            neurons: subset("neurons", shape.n_feed_forwards() * shape.n_ff)?,
            attn_output: matrix("attn_output"),
            ffn_down: matrix("ffn_down"),
            vectors,
        };
        let left = shape.with_kept(&plan.experts, &plan.neurons);
        let of_its_own =
            |(i, n): (usize, &usize)| Some(&(n / shape.n_ff)) == plan.experts.get(i / left.n_ff.max(1));
        let in_order = shape.n_expert == 0 || plan.neurons.iter().enumerate().all(of_its_own);
        // Experts that stay whole are taken over as they are.
        let fits = plan.ffn_down.as_ref().map_or(shape.n_expert > 0, |m| m.n_in == left.n_ff);
        if !fits || !in_order {
            return Err(self.damaged(&name, "ffn_down"));
        }
        let warnings = match file.get("warnings") {
            Some(Value::StrArray(warnings)) => {
                warnings.iter().map(|w| String::from_utf8_lossy(w).into_owned()).collect()
            }
            _ => return Err(self.damaged(&name, "warnings")),
        };
        Ok(Some((plan, warnings)))
    }
}

impl Journal for State {
    fn settled(&mut self) -> Result<Settled, GgufError> {
        let widths = match self.read(WIDTHS)? {
            Some(file) => Some(self.numbers(&file, "widths")?),
            None => None,
        };
        let fits = |widths: &Vec<usize>| {
            widths.len() == self.shapes.len()
                && widths.iter().zip(&self.shapes).all(|(&w, s)| w > 0 && w <= s.n_pieces(self.piece))
        };
        if widths.as_ref().is_some_and(|w| !fits(w)) {
            return Err(self.damaged(WIDTHS, "widths"));
        }
        let mut blocks = Vec::new();
        while blocks.len() < self.shapes.len()
            && let Some(block) = self.read_block(blocks.len())?
        {
            blocks.push(block);
        }
        Ok(Settled { heads: self.read_heads()?, widths, choice: self.read_choice()?, blocks })
    }

    fn heads(&mut self, search: &LazyGreedy) -> Result<(), GgufError> {
        let removed: Vec<u64> =
            search.removed.iter().flat_map(|g| [g.block, g.group].map(|n| n as u64)).collect();
        let candidate = |c: &Candidate| {
            let scored_at = c.scored_at.map_or(0, |n| n as u64 + 1);
            [c.id.block as u64, c.id.group as u64, c.score.to_bits(), scored_at]
        };
        let candidates: Vec<u64> = search.candidates.iter().flat_map(candidate).collect();
        let metadata =
            [("removed", Value::u64_array(&removed)), ("candidates", Value::u64_array(&candidates))];
        self.write(HEADS, &metadata, &[])
    }

    fn widths(&mut self, widths: &[usize]) -> Result<(), GgufError> {
        self.write(WIDTHS, &[("widths", numbers(widths.iter().copied()))], &[])
    }

    fn choice(&mut self, choice: Choice) -> Result<(), GgufError> {
        self.write(CHOICE, &[("choice", Value::Str(choice.name().into()))], &[])
    }

    fn block(&mut self, il: usize, plan: &BlockPlan, warnings: &[String]) -> Result<(), GgufError> {
        let metadata = [
            ("groups", numbers(plan.groups.iter().copied())),
            ("experts", numbers(plan.experts.iter().copied())),
            ("neurons", numbers(plan.neurons.iter().copied())),
            ("warnings", Value::StrArray(warnings.iter().map(|w| w.as_bytes().to_vec()).collect())),
        ];
        let mut tensors = Vec::new();
        for (name, m) in [("attn_output", &plan.attn_output), ("ffn_down", &plan.ffn_down)] {
            tensors.extend(m.as_ref().map(|m| OutTensor {
                name: name.into(),
                ty: m.ty,
                ne: vec![m.n_in, m.n_out],
                data: Box::new(|| Ok(Cow::Borrowed(&m.bytes[..]))),
            }));
        }
        for v in BlockVector::ALL {
            tensors.extend(plan.vector(v).as_ref().map(|values| OutTensor {
                name: format!("{v:?}"),
                ty: crate::ggml::Type::F32,
                ne: vec![values.len()],
                data: Box::new(|| Ok(Cow::Borrowed(bytemuck::cast_slice(values)))),
            }));
        }
        self.write(&block_file(il), &metadata, &tensors)
    }
}

fn numbers(values: impl IntoIterator<Item = usize>) -> Value {
    Value::u64_array(&values.into_iter().map(|n| n as u64).collect::<Vec<_>>())
}

/// Raised whenever the same terms come to other decisions and the version stays.
const DECISIONS: u32 = 2;

/// All that the outcome depends on, a line each; how many threads there are is not among it.
fn terms(job: &Job, source_sha256: &str) -> String {
    let settings = Settings { n_threads: 0, shelf: Default::default(), ..job.settings.clone() };
    let given = job.windows.as_ref().map(|w| sha256([bytemuck::cast_slice(&w.tokens)]));
    let recipe = Recipe { n_threads: 0, n_parallel: 0, ..job.recipe.clone() };
    format!(
        "putri-gguf {} ({DECISIONS}) with ggml {}, method {}\nsource: {source_sha256}\n{settings:#?}\n{recipe:#?}\n{:#?}\nwindows given: {given:?}\n",
        env!("CARGO_PKG_VERSION"),
        crate::ggml::engine_version(),
        method_name(job.settings.method),
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
