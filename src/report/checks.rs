//! Output of `verify`.

use super::plain;
use crate::Check;
use serde_json::{Value, json};
use std::fmt::Write;

/// Checks as text for a terminal.
pub fn checks_table(checks: &[Check]) -> String {
    let mut out = String::new();
    for c in checks {
        let (mark, text) = match &c.found {
            Ok(text) => ("ok", text),
            Err(text) => ("WRONG", text),
        };
        let _ = writeln!(out, "{:<12} {mark:<6} {}", c.name, plain(text));
    }
    out
}

/// Checks as a JSON object.
pub fn checks_json(checks: &[Check]) -> String {
    let check = |c: &Check| {
        let text = match &c.found {
            Ok(text) | Err(text) => text,
        };
        json!({ "name": c.name, "ok": c.found.is_ok(), "found": text })
    };
    let checks: Vec<Value> = checks.iter().map(check).collect();
    format!("{:#}", json!({ "checks": checks }))
}
