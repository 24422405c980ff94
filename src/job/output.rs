//! Where a job's results go: checked before the work, temporary during it, complete at its end.

use super::{Job, JobError};
use crate::gguf::GgufFile;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Refuses what would harm a file or cannot be written, before anything costs time.
pub(super) fn check_paths(job: &Job, source: &GgufFile) -> Result<(), JobError> {
    check_output(job, source, &job.output)?;
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
            let _ = std::fs::remove_file(path);
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

/// Syncs the temporary file and gives it the name `path`. Returns its length.
pub(super) fn finish(job: &Job, temp: tempfile::NamedTempFile, path: &Path) -> Result<u64, JobError> {
    let io = |source| JobError::Io { path: path.into(), source };
    temp.as_file().sync_all().map_err(io)?;
    let bytes = temp.as_file().metadata().map_err(io)?.len();
    // A temporary file is private, an output as readable as its source. Where the file system knows no
    // such thing, it stays as it is.
    #[cfg(unix)]
    if let Ok(source) = job.input.metadata() {
        use std::os::unix::fs::PermissionsExt;
        let mode = source.permissions().mode() & 0o644 | 0o600;
        let _ = temp.as_file().set_permissions(std::fs::Permissions::from_mode(mode));
    }
    let name = temp.path().to_path_buf();
    let persisted = if job.force { temp.persist(path) } else { temp.persist_noclobber(path) };
    unregister_temporary(&name);
    persisted.map_err(|e| io(e.error))?;
    Ok(bytes)
}
