//! Output of `devices`.

use super::table::megabytes;
use crate::ggml::DeviceInfo;
use std::fmt::Write;

/// Devices as llama.cpp's `--list-devices` prints them; if there are none, the reason for which a backend
/// gave up.
pub fn devices_table(devices: &[DeviceInfo], gave_up: Option<&str>) -> String {
    let mut out = String::from("Available devices:\n");
    for d in devices {
        let (total, free) = (megabytes(d.total), megabytes(d.free));
        let _ = writeln!(out, "  {}: {} ({total}, {free} free)", d.name, d.description);
    }
    if devices.is_empty() {
        let why = gave_up.map(|why| format!(" ({why})")).unwrap_or_default();
        let _ = writeln!(out, "  none but the CPU{why}");
    }
    out
}
