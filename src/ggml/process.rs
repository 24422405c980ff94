//! What the process does about signals and where there is no memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::OnceLock;

/// Signals that end a run early, and that whoever started it may have told the system to ignore: `nohup` does so with
/// SIGHUP, a shell without job control with SIGINT of what runs in the background.
#[cfg(unix)]
const ENDING: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Runs `install`, which installs handlers of signals that end the process; those that were ignored before stay ignored.
#[cfg(unix)]
pub fn keeping_ignored<R>(install: impl FnOnce() -> R) -> R {
    // SAFETY: a null action only asks for the old one, which is plain data.
    let is_ignored = |signal: &libc::c_int| unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        libc::sigaction(*signal, std::ptr::null(), &mut old) == 0 && old.sa_sigaction == libc::SIG_IGN
    };
    let ignored: Vec<libc::c_int> = ENDING.into_iter().filter(is_ignored).collect();
    let done = install();
    for signal in ignored {
        // SAFETY: to ignore a signal takes no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    done
}

/// Runs `install`; such signals cannot be ignored here.
#[cfg(not(unix))]
pub fn keeping_ignored<R>(install: impl FnOnce() -> R) -> R {
    install()
}

/// Ends the process at once, and runs nothing of what is done at an exit: other threads may be at work on what that would
/// take from under them.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: ends the process; what other threads do does not matter any more.
    #[cfg(unix)]
    unsafe {
        libc::_exit(code.into())
    }
    #[cfg(not(unix))]
    std::process::exit(code.into())
}

/// Lets a write beyond the limit for file sizes fail, instead of ending the process (SIGXFSZ).
pub fn let_large_writes_fail() {
    #[cfg(unix)]
    // SAFETY: to ignore a signal takes no handler.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

static ON_OUT_OF_MEMORY: OnceLock<fn(usize) -> !> = OnceLock::new();

/// Calls `handler` with a number of bytes where the system does not give that many, instead of aborting. The first handler
/// stays. The binary has to make [`Allocator`] its global allocator.
pub fn install_out_of_memory_handler(handler: fn(usize) -> !) {
    let _ = ON_OUT_OF_MEMORY.set(handler);
    // C++ that runs out of memory aborts, too; the trace that ggml would print first is not for our users.
    #[cfg(unix)]
    // SAFETY: C strings; called before there are other threads.
    unsafe {
        libc::setenv(c"GGML_NO_BACKTRACE".as_ptr(), c"1".as_ptr(), 1);
    }
}

/// The system's allocator, which tells the handler of [`install_out_of_memory_handler`] when it has nothing left.
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
        // SAFETY: the caller's promises are those that the system's allocator asks for.
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
