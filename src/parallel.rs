//! Work on independent items, on all threads of rayon's pool.

use rayon::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Runs `work` on every item and returns the results in the order of the items.
///
/// Each thread takes the next item when it is done with one. At most `at_once` items are worked on at a time,
/// so that their memory can be foreseen; threads without one help with products inside the others.
///
/// # Errors
/// Returns the error of the first item that failed; items that nobody began are left out.
pub(crate) fn each<I: Send, T: Send, E: Send>(
    items: Vec<I>,
    at_once: usize,
    work: impl Fn(I) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let n_workers = at_once.min(items.len()).min(rayon::current_num_threads()).max(1);
    let next = Mutex::new(items.into_iter().enumerate());
    let failed = Mutex::new(false);
    let take = || {
        let failed = *failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed { None } else { next.lock().unwrap_or_else(PoisonError::into_inner).next() }
    };
    let worker = || {
        let mut done = Vec::new();
        while let Some((i, item)) = take() {
            let result = work(item);
            if result.is_err() {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = true;
            }
            done.push((i, result));
        }
        done
    };
    let mut done: Vec<_> =
        (0..n_workers).into_par_iter().with_max_len(1).flat_map_iter(|_| worker()).collect();
    done.sort_unstable_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, result)| result).collect()
}

/// Things that threads use one at a time and that are made when none is idle.
pub(crate) struct Idle<T>(Mutex<Vec<T>>);

impl<T> Default for Idle<T> {
    fn default() -> Idle<T> {
        Idle(Mutex::default())
    }
}

impl<T> Idle<T> {
    /// Takes one, or the one that `make` makes.
    ///
    /// # Errors
    /// Returns the error of `make`.
    pub(crate) fn take<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let idle = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.map_or_else(make, Ok)
    }

    /// Gives one back.
    pub(crate) fn put(&self, thing: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(thing);
    }
}

/// Does the same as [`each`], while `hear` receives on this thread what `work` tells, and returns whether to go on.
/// `work` learns that from the function by which it tells; items that nobody has begun are left out then.
///
/// # Errors
/// As [`each`].
pub(crate) fn each_telling<I: Send, T: Send, E: Send, M: Send>(
    items: Vec<I>,
    at_once: usize,
    work: impl Fn(I, &dyn Fn(M) -> bool) -> Result<T, E> + Sync,
    mut hear: impl FnMut(M) -> bool,
) -> Result<Vec<T>, E> {
    let stop = AtomicBool::new(false);
    let (told, heard) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let (work, stop) = (&work, &stop);
        let all = scope.spawn(move || {
            let tell = |message| told.send(message).is_ok() && !stop.load(Ordering::Relaxed);
            let unless_stopped = |item| match stop.load(Ordering::Relaxed) {
                true => Ok(None),
                false => work(item, &tell).map(Some),
            };
            Ok(each(items, at_once, unless_stopped)?.into_iter().flatten().collect())
        });
        for message in heard {
            if !hear(message) {
                stop.store(true, Ordering::Relaxed);
            }
        }
        all.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    #[test]
    fn results_come_in_the_order_of_the_items() {
        for (n, at_once) in [(0usize, 3), (1, 1), (7, 2), (100, 64)] {
            let (running, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let found: Result<Vec<usize>, ()> = each((0..n).collect(), at_once, |i| {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_micros((n - i) as u64 * 10));
                running.fetch_sub(1, Ordering::SeqCst);
                Ok(i * i)
            });
            assert_eq!(found.unwrap(), (0..n).map(|i| i * i).collect::<Vec<_>>());
            assert!(most.into_inner() <= at_once);
        }
    }

    #[test]
    fn the_first_failure_ends_the_work() {
        let begun = AtomicUsize::new(0);
        let found: Result<Vec<()>, usize> = each((0..10_000).collect(), 4, |i| {
            begun.fetch_add(1, Ordering::SeqCst);
            if i >= 5 { Err(i) } else { Ok(()) }
        });
        assert_eq!(found, Err(5));
        assert!(begun.into_inner() < 100);
    }

    #[test]
    fn who_hears_can_stop_the_work() {
        for enough in [3usize, 1000] {
            let mut heard = Vec::new();
            let work = |i: usize, tell: &dyn Fn(usize) -> bool| {
                std::thread::sleep(Duration::from_millis(1));
                Ok::<_, ()>(tell(i))
            };
            let hear = |i| {
                heard.push(i);
                heard.len() < enough
            };
            let found = each_telling((0..100).collect(), 3, work, hear).unwrap();
            heard.sort_unstable();
            assert_eq!(heard.len(), found.len());
            assert_eq!(found.iter().all(|on| *on), enough > 100);
            assert_eq!(heard == (0..100).collect::<Vec<_>>(), enough > 100);
        }
    }
}
