//! Output for the user: progress during a run, and a summary at its end.

mod checks;
mod devices;
pub mod document;
mod eval;
mod forecast;
mod inspect;
mod page;
mod progress;
mod remaining;
mod table;
mod text;
mod timings;

pub use checks::{checks_json, checks_table};
pub use devices::devices_table;
pub use document::Report;
pub use eval::{eval_json, eval_table};
pub use forecast::dry_run_table;
pub use inspect::{inspection_json, inspection_table};
pub use page::page;
pub use progress::{Progress, event, tell};
pub use table::{peak_memory, summary};
pub(crate) use text::markdown;
pub use text::{plain, shell_word};
pub use timings::{Stage, StageTimes, Timings};
