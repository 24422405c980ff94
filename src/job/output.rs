//! Where a job's results go: checked before the work, temporary during it, complete at its end.

use super::{Job, JobError};
use crate::ggml::LlamaModel;
use crate::gguf::{GgufFile, part_suffix, write_parts};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Refuses what would harm a file or cannot be written, before anything costs time.
pub(super) fn check_paths(job: &Job, source: &GgufFile) -> Result<(), JobError> {
    outputs(job, source).iter().try_for_each(|output| check_output(job, source, output))?;
    if job.verify && job.output.to_str().is_none() {
        let problem = "is no UTF-8 path, which llama.cpp needs to verify it";
        let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, problem);
        return Err(JobError::Io { path: job.output.clone(), source });
    }
    let Some(imatrix) = &job.imatrix_out else {
        return Ok(());
    };
    if std::path::absolute(imatrix).ok() == std::path::absolute(&job.output).ok() {
        return Err(JobError::SameOutput(imatrix.clone()));
    }
    check_output(job, source, imatrix)
}

/// The files that the result lies in: as many as the source does, if that shall stay so.
pub(super) fn outputs(job: &Job, source: &GgufFile) -> Vec<PathBuf> {
    match source.paths().count() {
        n if n > 1 && job.keep_split => (0..n).map(|i| part_path(&job.output, i, n)).collect(),
        _ => vec![job.output.clone()],
    }
}

/// The `i`-th of `n` parts of a file that would be called `output`.
fn part_path(output: &Path, i: usize, n: usize) -> PathBuf {
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.strip_suffix(".gguf").unwrap_or(&name);
    // The name of a first part names the others, too.
    let stem = stem.strip_suffix(part_suffix(0, n).trim_end_matches(".gguf")).unwrap_or(stem);
    output.with_file_name(format!("{stem}{}", part_suffix(i, n)))
}

/// Refuses an output that is a folder, a file of the source, there already, or in a place where none can be made.
fn check_output(job: &Job, source: &GgufFile, output: &Path) -> Result<(), JobError> {
    let refused =
        |kind, text: &str| Err(JobError::Io { path: output.into(), source: std::io::Error::new(kind, text) });
    if output.is_dir()
        || output.file_name().is_none()
        || output.as_os_str().as_encoded_bytes().ends_with(b"/")
    {
        return refused(std::io::ErrorKind::IsADirectory, "is a folder; name a file for the output");
    }
    let is_output = |part: &Path| match (part.canonicalize(), output.canonicalize()) {
        (Ok(part), Ok(output)) => same_file(&part, &output),
        _ => false,
    };
    if source.paths().any(is_output) {
        return Err(JobError::SameFile(output.into()));
    }
    // A dangling link exists, too.
    if output.symlink_metadata().is_ok() && !job.force {
        return Err(JobError::Exists(output.into()));
    }
    // Can a file be made there at all? It is gone again at once.
    temporary(output).map(|t| unregister_temporary(t.path()))
}

/// Whether two existing paths are one file, hard links included.
fn same_file(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        if let (Ok(a), Ok(b)) = (a.metadata(), b.metadata()) {
            return (a.dev(), a.ino()) == (b.dev(), b.ino());
        }
    }
    a == b
}

/// The temporary files of the running job, for whoever must end the process without unwinding.
static TEMPORARY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Deletes the temporary files of a running job. For handlers that end the process at once; a job that
/// returns cleans up by itself.
pub fn remove_temporary() {
    // Not `lock`: the thread that is interrupted may hold it.
    if let Ok(mut paths) = TEMPORARY.try_lock() {
        for path in paths.drain(..) {
            let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir_all(&path));
        }
    }
}

/// Takes a file from those that [`remove_temporary`] would delete.
fn unregister_temporary(path: &Path) {
    if let Ok(mut paths) = TEMPORARY.lock() {
        paths.retain(|p| p != path);
    }
}

/// The folder that a file lies in.
pub(super) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A temporary file beside the output, so that the final rename stays on one file system.
pub(super) fn temporary(output: &Path) -> Result<tempfile::NamedTempFile, JobError> {
    let folder = folder_of(output);
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    let temp = tempfile::Builder::new()
        .prefix(&format!(".{name}."))
        .suffix(".part")
        .tempfile_in(folder)
        .map_err(|source| JobError::Io { path: folder.into(), source })?;
    if let Ok(mut paths) = TEMPORARY.lock() {
        // Those that went with their handle.
        paths.retain(|p| p.exists());
        paths.push(temp.path().to_path_buf());
    }
    Ok(temp)
}

/// A temporary folder beside `path`, which goes with its handle.
pub(crate) fn temporary_folder(path: &Path) -> Result<tempfile::TempDir, JobError> {
    let beside = folder_of(path);
    let folder = tempfile::Builder::new()
        .prefix(".putri.")
        .suffix(".part")
        .tempdir_in(beside)
        .map_err(|source| JobError::Io { path: beside.into(), source })?;
    if let Ok(mut paths) = TEMPORARY.lock() {
        paths.push(folder.path().to_path_buf());
    }
    Ok(folder)
}

/// Cuts the temporary file into parts and gives them their names, once libllama loads them. Returns the length of all.
pub(super) fn finish_parts(
    job: &Job,
    temp: tempfile::NamedTempFile,
    paths: &[PathBuf],
) -> Result<u64, JobError> {
    let io = |source| JobError::Io { path: paths[0].clone(), source };
    let whole = GgufFile::open(temp.path())?;
    // A folder of its own, for libllama finds parts by their names.
    let folder = temporary_folder(&job.output)?;
    let n = paths.len();
    let inside = |i: usize| folder.path().join(paths[i].file_name().unwrap_or_default());
    write_parts(&whole, n, inside)?;
    drop((whole, temp));
    if job.verify {
        LlamaModel::load_mapped(&inside(0)).map_err(JobError::DoesNotLoad)?;
    }
    let mut bytes = 0;
    for (i, path) in paths.iter().enumerate() {
        let part = inside(i);
        bytes += part.metadata().map_err(io)?.len();
        make_readable(job, &std::fs::File::open(&part).map_err(io)?);
        if !job.force && path.symlink_metadata().is_ok() {
            return Err(JobError::Exists(path.clone()));
        }
        std::fs::rename(&part, path).map_err(io)?;
    }
    unregister_temporary(folder.path());
    Ok(bytes)
}

/// Syncs the temporary file and gives it the name `path`. Returns its length.
pub(super) fn finish(job: &Job, temp: tempfile::NamedTempFile, path: &Path) -> Result<u64, JobError> {
    let io = |source| JobError::Io { path: path.into(), source };
    temp.as_file().sync_all().map_err(io)?;
    let bytes = temp.as_file().metadata().map_err(io)?.len();
    make_readable(job, temp.as_file());
    let name = temp.path().to_path_buf();
    let persisted = if job.force { temp.persist(path) } else { temp.persist_noclobber(path) };
    unregister_temporary(&name);
    persisted.map_err(|e| io(e.error))?;
    Ok(bytes)
}

/// Makes a temporary file, which is private, as readable as the source. Where the file system knows no such thing, it
/// stays as it is.
fn make_readable(job: &Job, file: &std::fs::File) {
    #[cfg(unix)]
    if let Ok(source) = job.input.metadata() {
        use std::os::unix::fs::PermissionsExt;
        let mode = source.permissions().mode() & 0o644 | 0o600;
        let _ = file.set_permissions(std::fs::Permissions::from_mode(mode));
    }
}
