//! Process-wide settings of the engine and what it says about itself.

use llama_cpp_sys_2 as sys;
use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

/// What the first of the built-in backends that did not start says of it.
static GAVE_UP: OnceLock<Option<String>> = OnceLock::new();

/// Starts libllama and the backends that are built in, the first time.
pub(super) fn init_once() {
    GAVE_UP.get_or_init(|| {
        // SAFETY: called once, before any other function of libllama; the second starts the backends.
        unsafe {
            sys::llama_backend_init();
            sys::ggml_backend_reg_count();
        }
        logged_error()
    });
}

/// What the first of the built-in backends that did not start says of it, once logs are silenced: a driver that is too old.
pub fn gave_up() -> Option<&'static str> {
    init_once();
    GAVE_UP.get()?.as_deref()
}

static ON_ABORT: OnceLock<fn(&str, &str) -> !> = OnceLock::new();

/// Calls `handler` with ggml's message, and the last errors that it logged, instead of letting a failed assertion abort the
/// process. The first handler stays.
pub fn install_abort_handler(handler: fn(&str, &str) -> !) {
    unsafe extern "C" fn callback(message: *const c_char) {
        // SAFETY: ggml passes a C string that lives during the call.
        let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
        // A backend that gives up logs why, in three lines, and then says only that it does.
        let logged = ERRORS.lock().map(|l| l[l.len().saturating_sub(3)..].join("; ")).unwrap_or_default();
        if let Some(handler) = ON_ABORT.get() {
            handler(&text, &logged);
        }
    }
    if ON_ABORT.set(handler).is_ok() {
        // SAFETY: a function pointer that lives as long as the process.
        unsafe { sys::ggml_set_abort_callback(Some(callback)) };
    }
}

/// The errors that the engine logged since it was last asked: the first, which is the cause of what followed, and the last three.
static ERRORS: Mutex<Vec<String>> = Mutex::new(Vec::new());

thread_local! {
    /// What the engine logs on this thread, while somebody listens.
    static LISTENER: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// Runs `work`, and returns with it what the engine logs meanwhile on this thread, once logs are silenced.
pub(super) fn logged_by<R>(work: impl FnOnce() -> R) -> (R, Vec<String>) {
    LISTENER.set(Some(Vec::new()));
    let done = work();
    (done, LISTENER.take().unwrap_or_default())
}

/// Keeps ggml's and libllama's own log lines off the terminal (they are many, and not for our users);
/// what they say of an error becomes part of ours.
pub fn silence_logs() {
    unsafe extern "C" fn quiet(level: sys::ggml_log_level, text: *const c_char, _user: *mut c_void) {
        LISTENER.with_borrow_mut(|lines| {
            // SAFETY: the engine passes a C string that lives during the call.
            let text = || unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
            lines.iter_mut().for_each(|lines| lines.push(text()));
        });
        if level != sys::GGML_LOG_LEVEL_ERROR {
            return;
        }
        // SAFETY: the engine passes a C string that lives during the call.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_string();
        if let Ok(mut errors) = ERRORS.lock()
            && !text.is_empty()
        {
            if errors.len() == 4 {
                errors.remove(1);
            }
            errors.push(text);
        }
    }
    // SAFETY: a callback that lives as long as the process.
    unsafe {
        sys::llama_log_set(Some(quiet), std::ptr::null_mut());
        sys::ggml_log_set(Some(quiet), std::ptr::null_mut());
    }
}

/// The first error that the engine logged since it was last asked.
pub(super) fn logged_error() -> Option<String> {
    let logged = ERRORS.lock().map(|mut l| std::mem::take(&mut *l)).unwrap_or_default();
    let first = logged.into_iter().next()?;
    // `function: text`; the function is of no use to a user.
    Some(first.split_once(": ").map_or(first.as_str(), |(_, rest)| rest).to_string())
}

/// `message`, with what the engine logged since it was last asked, if anything.
pub(super) fn with_cause(message: String) -> String {
    match logged_error() {
        Some(reason) => format!("{message} ({reason})"),
        None => message,
    }
}

pub(super) fn static_text(p: *const c_char) -> &'static str {
    if p.is_null() {
        return "?";
    }
    // SAFETY: the callers pass static strings of the engine.
    unsafe { CStr::from_ptr(p) }.to_str().unwrap_or("?")
}

/// Version of the ggml that is linked in.
pub fn engine_version() -> &'static str {
    // SAFETY: returns a static string.
    static_text(unsafe { sys::ggml_version() })
}

/// CPU features that ggml's kernels were compiled for.
pub fn cpu_features() -> Vec<String> {
    init_once();
    // SAFETY: returns a string of `NAME = 0|1 |` items that the next call rewrites; it is copied first.
    let info = static_text(unsafe { sys::llama_print_system_info() }).to_string();
    let info = info.split_once(':').map_or(info.as_str(), |(_, rest)| rest);
    info.split('|')
        .filter_map(|item| item.split_once('='))
        .filter(|(_, on)| on.trim() != "0")
        .map(|(name, _)| name.trim().to_string())
        .collect()
}

/// A file that is mapped to be read.
#[derive(Debug)]
pub struct FileMap(memmap2::Mmap);

/// Where the maps lie and what they are of, for the message when reading one fails.
static MAPS: Mutex<Vec<(Range<usize>, PathBuf)>> = Mutex::new(Vec::new());

impl FileMap {
    /// Maps `file`, which is called `path`, read-only.
    ///
    /// # Errors
    /// What the system says, for example for an empty file.
    pub fn new(file: &std::fs::File, path: &Path) -> std::io::Result<FileMap> {
        // SAFETY: the map is only read. A file that somebody shortens meanwhile raises SIGBUS, as it does in llama.cpp;
        // `install_fault_handler` makes a message of it.
        let map = unsafe { memmap2::Mmap::map(file) }?;
        if let Ok(mut maps) = MAPS.lock() {
            maps.push((range_of(&map), path.into()));
        }
        Ok(FileMap(map))
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for FileMap {
    fn drop(&mut self) {
        if let Ok(mut maps) = MAPS.lock() {
            let range = range_of(&self.0);
            maps.retain(|(other, _)| *other != range);
        }
    }
}

fn range_of(bytes: &[u8]) -> Range<usize> {
    let range = bytes.as_ptr_range();
    range.start as usize..range.end as usize
}

#[cfg(unix)]
static ON_FAULT: OnceLock<fn(&str)> = OnceLock::new();

/// Calls `handler` with the name of a file that became shorter while it was mapped, or whose disk failed, and ends the
/// process with exit code 1, where it would be killed otherwise. The first handler stays.
#[cfg(unix)]
pub fn install_fault_handler(handler: fn(&str)) {
    unsafe extern "C" fn on_fault(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: the system passes the fault's description.
        let at = unsafe { (*info).si_addr() } as usize;
        // Not `lock`: who holds it may be the one that is interrupted. The fault is one of reading, not of allocating, so
        // there is memory for a message.
        let maps = MAPS.try_lock().ok();
        let found = maps.as_ref().and_then(|maps| maps.iter().find(|(range, _)| range.contains(&at)));
        let name = found.map_or("a file that llama.cpp reads".into(), |(_, path)| path.display().to_string());
        if let Some(handler) = ON_FAULT.get() {
            handler(&name);
        }
        // SAFETY: ends the process; what other threads do does not matter any more.
        unsafe { libc::_exit(1) }
    }
    if ON_FAULT.set(handler).is_ok() {
        // SAFETY: a handler that lives as long as the process and does not return, with an empty mask of signals.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_fault as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
        }
    }
}

/// Without such signals there is nothing to handle.
#[cfg(not(unix))]
pub fn install_fault_handler(_: fn(&str)) {}

/// A map of `n_bytes` zero bytes in a temporary file of `folder` that has no name and goes with the map.
///
/// # Errors
/// What the system says; a disk without enough room is noticed here.
pub fn map_scratch(folder: &Path, n_bytes: usize) -> std::io::Result<memmap2::MmapMut> {
    const ZEROS: &[u8] = &[0; 1 << 20];
    let mut file = tempfile::tempfile_in(folder)?;
    // Not just a longer file: where the disk turned out to be full later, a write to the map would be a SIGBUS.
    for start in (0..n_bytes).step_by(ZEROS.len()) {
        std::io::Write::write_all(&mut file, &ZEROS[..ZEROS.len().min(n_bytes - start)])?;
    }
    // SAFETY: nobody else knows the file, so nobody changes or shortens it.
    unsafe { memmap2::MmapMut::map_mut(&file) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs itself once more, where an assertion of ggml's fails.
    #[test]
    fn a_failed_assertion_ends_in_our_message_and_exit_code() {
        const CHILD: &str = "PUTRI_TEST_ABORTS";
        if std::env::var_os(CHILD).is_some() {
            install_abort_handler(|message, logged| {
                eprintln!("error: {message} ({logged})");
                std::process::exit(7);
            });
            silence_logs();
            // SAFETY: C strings, and a format that takes one; what cannot be opened is logged as an error, and nothing returned.
            unsafe {
                let params = sys::gguf_init_params { no_alloc: true, ctx: std::ptr::null_mut() };
                sys::gguf_init_from_file(c"/nowhere/at.all".as_ptr(), params);
                sys::ggml_abort(c"there.c".as_ptr(), 12, c"%s".as_ptr(), c"ne[0] is odd".as_ptr())
            };
        }
        let name = "ggml::system::tests::a_failed_assertion_ends_in_our_message_and_exit_code";
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&child.stderr);
        assert_eq!(child.status.code(), Some(7), "{stderr}");
        assert!(stderr.contains("error: there.c:12: ne[0] is odd ("), "{stderr}");
        assert!(stderr.contains("/nowhere/at.all"), "{stderr}");
    }
}
