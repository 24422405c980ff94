//! Signals and out-of-memory handling of the process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::OnceLock;

/// Signals that end a run early, and that the parent process may have set to be ignored.
/// `nohup` does so with SIGHUP, and a shell without job control with SIGINT of background processes.
#[cfg(unix)]
const ENDING: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Runs `install`, which installs handlers of signals that end the process; signals that were ignored
/// before stay ignored.
#[cfg(unix)]
pub fn keeping_ignored<R>(install: impl FnOnce() -> R) -> R {
    // SAFETY: a null action only queries the old one, which is plain data.
    let is_ignored = |signal: &libc::c_int| unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        libc::sigaction(*signal, std::ptr::null(), &mut old) == 0 && old.sa_sigaction == libc::SIG_IGN
    };
    let ignored: Vec<libc::c_int> = ENDING.into_iter().filter(is_ignored).collect();
    let done = install();
    for signal in ignored {
        // SAFETY: ignoring a signal takes no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    done
}

/// Runs `install`; such signals cannot be ignored on this system.
#[cfg(not(unix))]
pub fn keeping_ignored<R>(install: impl FnOnce() -> R) -> R {
    install()
}

/// Ends the process at once without exit handlers, which would free memory that other threads still use.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: ends the process, whatever other threads do.
    #[cfg(unix)]
    unsafe {
        libc::_exit(code.into())
    }
    #[cfg(not(unix))]
    std::process::exit(code.into())
}

/// Makes a write beyond the file size limit fail, instead of ending the process (SIGXFSZ).
pub fn let_large_writes_fail() {
    #[cfg(unix)]
    // SAFETY: ignoring a signal takes no handler.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// Processor time of all threads of this process so far, if the system can tell.
pub fn cpu_time() -> Option<std::time::Duration> {
    #[cfg(unix)]
    {
        // SAFETY: plain data, which the call fills.
        let used = unsafe {
            let mut used: libc::rusage = std::mem::zeroed();
            (libc::getrusage(libc::RUSAGE_SELF, &mut used) == 0).then_some(used)?
        };
        let time = |t: libc::timeval| std::time::Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
        Some(time(used.ru_utime) + time(used.ru_stime))
    }
    #[cfg(not(unix))]
    None
}

static ON_OUT_OF_MEMORY: OnceLock<fn(usize) -> !> = OnceLock::new();

/// Installs `handler`, which is called with the requested number of bytes if the system has no memory left,
/// instead of aborting.
/// Only the first handler is kept. The binary has to make [`Allocator`] its global allocator.
pub fn install_out_of_memory_handler(handler: fn(usize) -> !) {
    let _ = ON_OUT_OF_MEMORY.set(handler);
    // C++ aborts as well when it runs out of memory; users do not need the backtrace that ggml prints
    // first.
    #[cfg(unix)]
    // SAFETY: C strings; called before there are other threads.
    unsafe {
        libc::setenv(c"GGML_NO_BACKTRACE".as_ptr(), c"1".as_ptr(), 1);
    }
}

/// Global allocator of the system that calls the handler of [`install_out_of_memory_handler`] when no
/// memory is left.
pub struct Allocator;

fn given(pointer: *mut u8, n_bytes: usize) -> *mut u8 {
    if pointer.is_null()
        && let Some(handler) = ON_OUT_OF_MEMORY.get()
    {
        handler(n_bytes);
    }
    pointer
}

// SAFETY: every call goes to the system's allocator with the same arguments.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that the system's allocator requires.
        given(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        given(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, n_bytes: usize) -> *mut u8 {
        // SAFETY: as above.
        given(unsafe { System.realloc(pointer, layout, n_bytes) }, n_bytes)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}
