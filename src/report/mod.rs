//! What the user sees: progress while it runs, and a summary at the end.

mod progress;
mod table;

pub use progress::Progress;
pub use table::summary;
