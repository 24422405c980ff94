//! Output files of a job: checked before the work, temporary during it, complete at its end.

use super::{Job, JobError};
use crate::calibrate::CalibrateError;
use crate::ggml::LlamaModel;
use crate::gguf::{GgufFile, part_suffix, write_parts};
use crate::spill::without_path;
use crate::text::TextFile;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Rejects paths that would damage a file or are not writable, before the work.
pub(super) fn check_paths(job: &Job, source: &GgufFile) -> Result<(), JobError> {
    let files: Vec<PathBuf> = outputs(job, source).into_iter().chain(job.imatrix_out.clone()).collect();
    let folder = job.state.as_ref().map(|keep| keep.folder.clone());
    let all: Vec<PathBuf> = files.iter().cloned().chain(folder).collect();
    let parts: Vec<PathBuf> = source.paths().map(Path::to_path_buf).collect();
    let parts: Vec<PathBuf> = parts.into_iter().chain(job.recover_from.clone()).collect();
    check_distinct(&all, &parts, &job.recipe.files)?;
    files.iter().try_for_each(|output| check_output(output, job.force))?;
    // A pipe can be read only once, so it is checked when it is read.
    let texts = job.recipe.files.iter().filter(|path| !path.exists() || path.is_file() || path.is_dir());
    for path in texts {
        TextFile::open(path, job.recipe.encoding).map_err(CalibrateError::from)?;
    }
    if job.verify && job.output.to_str().is_none() {
        let problem = "is no UTF-8 path, which llama.cpp needs to verify the result; choose another name";
        return Err(JobError::BadOutput { path: job.output.clone(), problem });
    }
    Ok(())
}

/// Rejects two outputs with one name, and outputs that are files of the `model` or one of the `texts`.
///
/// # Errors
/// [`JobError::SameFile`], [`JobError::SameOutput`] or [`JobError::AlsoRead`].
pub fn check_distinct(outputs: &[PathBuf], model: &[PathBuf], texts: &[PathBuf]) -> Result<(), JobError> {
    for (i, output) in outputs.iter().enumerate() {
        let is_output = |other: &PathBuf| same_file(output, other);
        if model.iter().any(is_output) {
            return Err(JobError::SameFile(output.clone()));
        }
        if texts.iter().any(is_output) {
            return Err(JobError::AlsoRead(output.clone()));
        }
        if outputs[..i].iter().any(is_output) {
            return Err(JobError::SameOutput(output.clone()));
        }
    }
    Ok(())
}

/// Files of the result: as many as the source has, if the job keeps the split.
pub(super) fn outputs(job: &Job, source: &GgufFile) -> Vec<PathBuf> {
    match source.paths().count() {
        n if n > 1 && job.keep_split => (0..n).map(|i| part_path(&job.output, i, n)).collect(),
        _ => vec![job.output.clone()],
    }
}

/// Path of the `i`-th of `n` parts of a file called `output`.
fn part_path(output: &Path, i: usize, n: usize) -> PathBuf {
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.strip_suffix(".gguf").unwrap_or(&name);
    // A given name of a first part is the stem of the others, too.
    let stem = stem.strip_suffix(part_suffix(0, n).trim_end_matches(".gguf")).unwrap_or(stem);
    output.with_file_name(format!("{stem}{}", part_suffix(i, n)))
}

/// Rejects an output that is a folder or device, exists already (unless `force` is set), or cannot be
/// created.
///
/// # Errors
/// [`JobError::Exists`], [`JobError::BadOutput`] or [`JobError::Io`].
pub fn check_output(output: &Path, force: bool) -> Result<(), JobError> {
    let refused = |problem| Err(JobError::BadOutput { path: output.into(), problem });
    if output.is_dir()
        || output.file_name().is_none()
        || output.as_os_str().as_encoded_bytes().ends_with(b"/")
    {
        return refused("is a folder; name a file for the output");
    }
    // Only regular files may be replaced. A replaced device, pipe or socket would be lost to all programs.
    if output.metadata().is_ok_and(|found| !found.is_file()) {
        return refused("is a device, pipe or socket, which is not replaced; name a file for the output");
    }
    match output.symlink_metadata() {
        // A dangling link exists, too.
        Ok(_) if !force => return Err(JobError::Exists(output.into())),
        // The name is too long, or the path is not accessible.
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(JobError::Io { path: output.into(), source });
        }
        _ => {}
    }
    // Tests whether a file can be created there, and deletes it at once.
    temporary(output).map(|t| unregister_temporary(t.path()))
}

/// Returns whether two paths name one file, also through links and hard links, or would once they exist.
fn same_file(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        if let (Ok(a), Ok(b)) = (a.metadata(), b.metadata()) {
            return (a.dev(), a.ino()) == (b.dev(), b.ino());
        }
    }
    resolved(a) == resolved(b)
}

/// Resolves the links of the part of a path that exists.
pub(crate) fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
    match (path.canonicalize(), path.parent(), path.file_name()) {
        (Ok(real), ..) => real,
        (Err(_), Some(parent), Some(name)) => resolved(parent).join(name),
        _ => path,
    }
}

/// Temporary files of the running job, for handlers that end the process without unwinding.
static TEMPORARY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Deletes the temporary files of a running job.
/// It is for handlers that end the process at once. A job that returns cleans up by itself.
pub fn remove_temporary() {
    // `lock` could deadlock: the interrupted thread may hold it.
    if let Ok(mut paths) = TEMPORARY.try_lock() {
        for path in paths.drain(..) {
            let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir_all(&path));
        }
    }
}

/// Removes a file from the list of [`remove_temporary`].
fn unregister_temporary(path: &Path) {
    if let Ok(mut paths) = TEMPORARY.lock() {
        paths.retain(|p| p != path);
    }
}

/// Folder of a file.
pub(super) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Creates a temporary file beside the output, so that the final rename stays on one file system.
pub(super) fn temporary(output: &Path) -> Result<tempfile::NamedTempFile, JobError> {
    let folder = folder_of(output);
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    // File systems allow names of 255 bytes, and the temporary name is longer.
    let short = (0..=name.len().min(200)).rev().find(|&i| name.is_char_boundary(i)).unwrap_or(0);
    let name = &name[..short];
    let temp = tempfile::Builder::new()
        .prefix(&format!(".{name}."))
        .suffix(".part")
        .tempfile_in(folder)
        .map_err(|e| JobError::Io { path: output.into(), source: without_path(e) })?;
    if let Ok(mut paths) = TEMPORARY.lock() {
        // Files that were deleted with their handle need no entry.
        paths.retain(|p| p.exists());
        paths.push(temp.path().to_path_buf());
    }
    Ok(temp)
}

/// Creates a temporary folder beside `path`, which is deleted with its handle.
pub(crate) fn temporary_folder(path: &Path) -> Result<tempfile::TempDir, JobError> {
    let beside = folder_of(path);
    let folder = tempfile::Builder::new()
        .prefix(".putri.")
        .suffix(".part")
        .tempdir_in(beside)
        .map_err(|e| JobError::Io { path: path.into(), source: without_path(e) })?;
    if let Ok(mut paths) = TEMPORARY.lock() {
        paths.push(folder.path().to_path_buf());
    }
    Ok(folder)
}

/// Splits the temporary file into parts and renames them once libllama loads them. Returns the total length
/// in bytes.
pub(super) fn finish_parts(
    job: &Job,
    temp: tempfile::NamedTempFile,
    paths: &[PathBuf],
) -> Result<u64, JobError> {
    let io = |source| JobError::Io { path: paths[0].clone(), source };
    let whole = GgufFile::open(temp.path())?;
    // libllama finds parts by their names, so they need their own folder.
    let folder = temporary_folder(&job.output)?;
    let n = paths.len();
    let inside = |i: usize| folder.path().join(paths[i].file_name().unwrap_or_default());
    write_parts(&whole, n, inside)?;
    drop((whole, temp));
    if job.verify {
        LlamaModel::load_mapped(&inside(0)).map_err(JobError::does_not_load)?;
    }
    let mut bytes = 0;
    for (i, path) in paths.iter().enumerate() {
        let part = inside(i);
        bytes += part.metadata().map_err(io)?.len();
        make_usual(&std::fs::File::open(&part).map_err(io)?, folder_of(path), Some(&job.input));
        if !job.force && path.symlink_metadata().is_ok() {
            return Err(JobError::Exists(path.clone()));
        }
        std::fs::rename(&part, path).map_err(io)?;
    }
    unregister_temporary(folder.path());
    Ok(bytes)
}

/// Syncs the temporary file and renames it to `path`. Returns its length in bytes.
pub(super) fn finish(job: &Job, temp: tempfile::NamedTempFile, path: &Path) -> Result<u64, JobError> {
    let io = |source| JobError::Io { path: path.into(), source };
    temp.as_file().sync_all().map_err(io)?;
    let bytes = temp.as_file().metadata().map_err(io)?.len();
    make_usual(temp.as_file(), folder_of(path), Some(&job.input));
    persist(temp, path, job.force)?;
    Ok(bytes)
}

/// Writes a whole file, or none.
///
/// # Errors
/// [`JobError::Io`], or [`JobError::Exists`] without `force`.
pub fn write_whole(path: &Path, bytes: &[u8], force: bool) -> Result<(), JobError> {
    let io = |source| JobError::Io { path: path.into(), source };
    let temp = temporary(path)?;
    temp.as_file().write_all(bytes).map_err(io)?;
    temp.as_file().sync_all().map_err(io)?;
    make_usual(temp.as_file(), folder_of(path), None);
    persist(temp, path, force)
}

/// Renames a temporary file to its final name.
fn persist(temp: tempfile::NamedTempFile, path: &Path, force: bool) -> Result<(), JobError> {
    let name = temp.path().to_path_buf();
    let persisted = if force { temp.persist(path) } else { temp.persist_noclobber(path) };
    unregister_temporary(&name);
    match persisted {
        Ok(_) => Ok(()),
        Err(e) if e.error.kind() == std::io::ErrorKind::AlreadyExists => Err(JobError::Exists(path.into())),
        Err(e) => Err(JobError::Io { path: path.into(), source: e.error }),
    }
}

/// Sets the permissions of a temporary file, which is private, to those of a new file in `folder`, without
/// those that the file `source` lacks.
/// They are unchanged if the file system has no such permissions.
fn make_usual(file: &std::fs::File, folder: &Path, source: Option<&Path>) {
    #[cfg(unix)]
    if let Some(usual) = usual_mode(folder) {
        use std::os::unix::fs::PermissionsExt;
        let most = source.and_then(|path| path.metadata().ok()).map_or(0o666, |m| m.permissions().mode());
        let _ = file.set_permissions(std::fs::Permissions::from_mode(usual & (most | 0o600)));
    }
}

/// Permissions of a new file in `folder`: 0666 without the bits of the process's umask.
#[cfg(unix)]
pub(crate) fn usual_mode(folder: &Path) -> Option<u32> {
    use std::os::unix::fs::PermissionsExt;
    let all = std::fs::Permissions::from_mode(0o666);
    let probe = tempfile::Builder::new().prefix(".putri.").permissions(all).tempfile_in(folder).ok()?;
    Some(probe.as_file().metadata().ok()?.permissions().mode() & 0o777)
}
