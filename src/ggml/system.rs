//! Process-wide settings of the engine and what it says about itself.

use llama_cpp_sys_2 as sys;
use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, OnceLock};

static ON_ABORT: OnceLock<fn(&str) -> !> = OnceLock::new();

/// Calls `handler` with ggml's message instead of letting a failed assertion abort the process.
/// The first handler stays.
pub fn install_abort_handler(handler: fn(&str) -> !) {
    unsafe extern "C" fn callback(message: *const c_char) {
        // SAFETY: ggml passes a C string that lives during the call.
        let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
        if let Some(handler) = ON_ABORT.get() {
            handler(&text);
        }
    }
    if ON_ABORT.set(handler).is_ok() {
        // SAFETY: a function pointer that lives as long as the process.
        unsafe { sys::ggml_set_abort_callback(Some(callback)) };
    }
}

/// The first error that the engine logged since it was last asked: the cause, before what followed.
static FIRST_ERROR: Mutex<String> = Mutex::new(String::new());

/// Keeps ggml's and libllama's own log lines off the terminal (they are many, and not for our users);
/// what they say of an error becomes part of ours.
pub fn silence_logs() {
    unsafe extern "C" fn quiet(level: sys::ggml_log_level, text: *const c_char, _user: *mut c_void) {
        if level == sys::GGML_LOG_LEVEL_ERROR
            && let Ok(mut first) = FIRST_ERROR.lock()
            && first.is_empty()
        {
            // SAFETY: the engine passes a C string that lives during the call.
            *first = unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_string();
        }
    }
    // SAFETY: a callback that lives as long as the process.
    unsafe {
        sys::llama_log_set(Some(quiet), std::ptr::null_mut());
        sys::ggml_log_set(Some(quiet), std::ptr::null_mut());
    }
}

/// `message`, with what the engine logged since it was last asked, if anything.
pub(super) fn with_cause(message: String) -> String {
    let logged = FIRST_ERROR.lock().map(|mut l| std::mem::take(&mut *l)).unwrap_or_default();
    // `function: text`; the function is of no use to a user.
    let reason = logged.split_once(": ").map_or(logged.as_str(), |(_, rest)| rest);
    if reason.is_empty() { message } else { format!("{message} ({reason})") }
}

fn static_text(p: *const c_char) -> &'static str {
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
    // SAFETY: returns a string of `NAME = 0|1 |` items that the next call rewrites; it is copied first.
    let info = static_text(unsafe { sys::llama_print_system_info() }).to_string();
    let info = info.split_once(':').map_or(info.as_str(), |(_, rest)| rest);
    info.split('|')
        .filter_map(|item| item.split_once('='))
        .filter(|(_, on)| on.trim() != "0")
        .map(|(name, _)| name.trim().to_string())
        .collect()
}

/// Maps `file` read-only.
///
/// # Errors
/// What the system says, for example for an empty file.
pub fn map_file(file: &std::fs::File) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the map is only read. A file that somebody shortens meanwhile raises SIGBUS, as it
    // does in llama.cpp; that is the price of a map.
    unsafe { memmap2::Mmap::map(file) }
}

/// A map of `n_bytes` zero bytes in a temporary file of `folder` that has no name and goes with the map.
///
/// # Errors
/// What the system says; a disk without enough room is noticed here.
pub fn map_scratch(folder: &std::path::Path, n_bytes: usize) -> std::io::Result<memmap2::MmapMut> {
    const ZEROS: &[u8] = &[0; 1 << 20];
    let mut file = tempfile::tempfile_in(folder)?;
    // Not just a longer file: where the disk turned out to be full later, a write to the map would be a SIGBUS.
    for start in (0..n_bytes).step_by(ZEROS.len()) {
        std::io::Write::write_all(&mut file, &ZEROS[..ZEROS.len().min(n_bytes - start)])?;
    }
    // SAFETY: nobody else knows the file, so nobody changes or shortens it.
    unsafe { memmap2::MmapMut::map_mut(&file) }
}
