//! Process-wide settings of the engine, and its description of itself.

use llama_cpp_sys_2 as sys;
use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

/// Message of the first built-in backend that did not start.
static GAVE_UP: OnceLock<Option<String>> = OnceLock::new();

/// Starts libllama and the built-in backends on the first call.
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

/// Message of the first built-in backend that did not start, once logs are silenced; for example, a driver
/// that is too old.
pub fn gave_up() -> Option<&'static str> {
    init_once();
    GAVE_UP.get()?.as_deref()
}

static ON_ABORT: OnceLock<fn(&str, &str) -> !> = OnceLock::new();

/// Installs `handler`, which gets ggml's message and its last logged errors if an assertion fails, instead
/// of an abort.
/// Only the first handler is kept.
pub fn install_abort_handler(handler: fn(&str, &str) -> !) {
    unsafe extern "C" fn callback(message: *const c_char) {
        // SAFETY: ggml passes a C string that lives during the call.
        let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
        // A backend that fails logs the reason in three lines, and its abort message does not repeat it.
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

/// Errors that the engine logged since the last query: the first, which causes the others, and the last
/// three.
static ERRORS: Mutex<Vec<String>> = Mutex::new(Vec::new());

thread_local! {
    /// Log lines of the engine on this thread, while somebody listens.
    static LISTENER: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// Runs `work` and returns its result with the lines that the engine logs meanwhile on this thread, once
/// logs are silenced.
pub(super) fn logged_by<R>(work: impl FnOnce() -> R) -> (R, Vec<String>) {
    LISTENER.set(Some(Vec::new()));
    let done = work();
    (done, LISTENER.take().unwrap_or_default())
}

/// Keeps ggml's and libllama's own log lines off the terminal: they are many, and not for all users.
/// Their error messages become part of ours. Each line also goes to the `log` crate, with the target `ggml`
/// or `llama`: a program that installs a logger sees them.
pub fn silence_logs() {
    unsafe extern "C" fn of_llama(level: sys::ggml_log_level, text: *const c_char, _user: *mut c_void) {
        // SAFETY: the engine passes a C string that lives during the call.
        heard("llama", level, &unsafe { CStr::from_ptr(text) }.to_string_lossy());
    }
    unsafe extern "C" fn of_ggml(level: sys::ggml_log_level, text: *const c_char, _user: *mut c_void) {
        // SAFETY: the engine passes a C string that lives during the call.
        heard("ggml", level, &unsafe { CStr::from_ptr(text) }.to_string_lossy());
    }
    // SAFETY: callbacks that live as long as the process. The first sets that of ggml, too.
    unsafe {
        sys::llama_log_set(Some(of_llama), std::ptr::null_mut());
        sys::ggml_log_set(Some(of_ggml), std::ptr::null_mut());
    }
}

/// Passes a log message of the engine to the listener on this thread, to our own error messages, and to the
/// `log` crate.
fn heard(target: &'static str, level: sys::ggml_log_level, text: &str) {
    LISTENER.with_borrow_mut(|lines| lines.iter_mut().for_each(|lines| lines.push(text.into())));
    let trimmed = text.trim();
    if level == sys::GGML_LOG_LEVEL_ERROR
        && !trimmed.is_empty()
        && let Ok(mut errors) = ERRORS.lock()
    {
        if errors.len() == 4 {
            errors.remove(1);
        }
        errors.push(trimmed.into());
    }
    pass_on(target, level, text);
}

/// Passes the lines that `text` completes to the `log` crate, if logging is enabled.
fn pass_on(target: &'static str, level: sys::ggml_log_level, text: &str) {
    if log::max_level() == log::LevelFilter::Off {
        return;
    }
    let begins = match level {
        sys::GGML_LOG_LEVEL_CONT => None,
        sys::GGML_LOG_LEVEL_ERROR => Some(log::Level::Error),
        sys::GGML_LOG_LEVEL_WARN => Some(log::Level::Warn),
        sys::GGML_LOG_LEVEL_DEBUG => Some(log::Level::Debug),
        _ => Some(log::Level::Info),
    };
    // A thread may log after its thread-local variables are destroyed.
    let lines = UNFINISHED.try_with(|line| line.borrow_mut().take(target, begins, text)).unwrap_or_default();
    for (target, level, text) in lines {
        log::log!(target: target, level, "{text}");
    }
}

thread_local! {
    /// Unfinished line of the log on this thread.
    static UNFINISHED: RefCell<LogLine> =
        const { RefCell::new(LogLine { target: "ggml", level: log::Level::Info, text: String::new() }) };
}

/// Line of the engine's log, which arrives in one or more parts.
#[derive(Debug)]
struct LogLine {
    target: &'static str,
    level: log::Level,
    text: String,
}

impl LogLine {
    /// Adds a part of the log and returns the lines that it completes.
    /// With a level, the part begins a message; without one, it continues the last message.
    fn take(
        &mut self,
        target: &'static str,
        begins: Option<log::Level>,
        text: &str,
    ) -> Vec<(&'static str, log::Level, String)> {
        let mut lines = Vec::new();
        if let Some(level) = begins {
            // The last message has no end of line.
            lines.extend(self.end());
            (self.target, self.level) = (target, level);
        }
        for piece in text.split_inclusive('\n') {
            self.text.push_str(piece);
            if piece.ends_with('\n') {
                lines.extend(self.end());
            }
        }
        lines
    }

    /// Takes the line so far; `None` if it is blank.
    fn end(&mut self) -> Option<(&'static str, log::Level, String)> {
        let text = std::mem::take(&mut self.text);
        let text = text.trim_end();
        (!text.is_empty()).then(|| (self.target, self.level, text.into()))
    }
}

/// First error that the engine logged since the last query.
pub(super) fn logged_error() -> Option<String> {
    let logged = ERRORS.lock().map(|mut l| std::mem::take(&mut *l)).unwrap_or_default();
    let first = logged.into_iter().next()?;
    // The line is `function: text`; the function is of no use to a user.
    Some(first.split_once(": ").map_or(first.as_str(), |(_, rest)| rest).to_string())
}

/// Appends to `message` the first error that the engine logged since the last query, if any.
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

/// Version of the linked ggml.
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

/// File that is memory-mapped read-only.
#[derive(Debug)]
pub struct FileMap(memmap2::Mmap);

/// Address ranges and files of the maps, for the message when reading one fails.
static MAPS: Mutex<Vec<(Range<usize>, PathBuf)>> = Mutex::new(Vec::new());

impl FileMap {
    /// Maps `file`, whose name is `path`, read-only.
    ///
    /// # Errors
    /// Returns the system's error, for example for an empty file.
    pub fn new(file: &std::fs::File, path: &Path) -> std::io::Result<FileMap> {
        // SAFETY: the map is only read. If somebody shortens the file meanwhile, that raises SIGBUS, as it
        // does in llama.cpp; `install_fault_handler` turns it into a message.
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

/// Installs `handler`, which gets the name of a mapped file that became shorter or whose disk failed.
/// The process then ends with exit code 1 instead of being killed. Only the first handler is kept.
#[cfg(unix)]
pub fn install_fault_handler(handler: fn(&str)) {
    unsafe extern "C" fn on_fault(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: the system passes the fault's description.
        let at = unsafe { (*info).si_addr() } as usize;
        // Not `lock`: the interrupted thread may hold it. The fault is one of reading, not of allocating,
        // so there is memory for a message.
        let maps = MAPS.try_lock().ok();
        let found = maps.as_ref().and_then(|maps| maps.iter().find(|(range, _)| range.contains(&at)));
        let name = found.map_or("a file that llama.cpp reads".into(), |(_, path)| path.display().to_string());
        if let Some(handler) = ON_FAULT.get() {
            handler(&name);
        }
        // SAFETY: ends the process, whatever other threads do.
        unsafe { libc::_exit(1) }
    }
    if ON_FAULT.set(handler).is_ok() {
        // SAFETY: a handler that lives as long as the process and does not return, with an empty signal mask.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_fault as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
        }
    }
}

/// Does nothing: this system has no such signals.
#[cfg(not(unix))]
pub fn install_fault_handler(_: fn(&str)) {}

/// Maps `n_bytes` zero bytes of a nameless temporary file in `folder`, which vanishes with the map.
///
/// # Errors
/// Returns the system's error; this call notices a disk without enough room.
pub fn map_scratch(folder: &Path, n_bytes: usize) -> std::io::Result<memmap2::MmapMut> {
    const ZEROS: &[u8] = &[0; 1 << 20];
    let mut file = tempfile::tempfile_in(folder)?;
    // The file is filled, not just extended: on a disk that is full later, a write to the map would raise
    // SIGBUS.
    for start in (0..n_bytes).step_by(ZEROS.len()) {
        std::io::Write::write_all(&mut file, &ZEROS[..ZEROS.len().min(n_bytes - start)])?;
    }
    // SAFETY: nobody else knows the file, so nobody changes or shortens it.
    unsafe { memmap2::MmapMut::map_mut(&file) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::Level::{Info, Warn};

    #[test]
    fn lines_of_the_log_are_joined() {
        let mut line = LogLine { target: "ggml", level: Info, text: String::new() };
        assert!(line.take("llama", Some(Info), "loading ").is_empty());
        assert!(line.take("llama", None, ".").is_empty());
        assert_eq!(line.take("llama", None, ".\n"), [("llama", Info, "loading ..".to_string())]);
        // Blank lines are dropped, and an unfinished line ends where the next message begins.
        assert_eq!(line.take("ggml", Some(Warn), "\n one\ntwo"), [("ggml", Warn, " one".to_string())]);
        let next = line.take("llama", Some(Info), "three\n");
        assert_eq!(next, [("ggml", Warn, "two".to_string()), ("llama", Info, "three".to_string())]);
    }

    /// Runs itself once more in a process where an assertion of ggml's fails.
    #[test]
    fn a_failed_assertion_ends_in_our_message_and_exit_code() {
        const CHILD: &str = "PUTRI_TEST_ABORTS";
        if std::env::var_os(CHILD).is_some() {
            install_abort_handler(|message, logged| {
                eprintln!("error: {message} ({logged})");
                std::process::exit(7);
            });
            silence_logs();
            // SAFETY: C strings, and a format that takes one; a file that cannot be opened is logged as an
            // error, and null is returned.
            unsafe {
                let params = sys::gguf_init_params { no_alloc: true, ctx: std::ptr::null_mut() };
                sys::gguf_init_from_file(c"/nowhere/at.all".as_ptr(), params);
                sys::ggml_abort(c"there.c".as_ptr(), 12, c"%s".as_ptr(), c"ne[0] is odd".as_ptr());
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
