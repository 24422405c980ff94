//! What `devices` prints.

use super::table::megabytes;
use crate::ggml::DeviceInfo;
use std::fmt::Write;

/// Devices as llama.cpp's `--list-devices` prints them.
pub fn devices_table(devices: &[DeviceInfo]) -> String {
    let mut out = String::from("Available devices:\n");
    for d in devices {
        let (total, free) = (megabytes(d.total), megabytes(d.free));
        let _ = writeln!(out, "  {}: {} ({total}, {free} free)", d.name, d.description);
    }
    if devices.is_empty() {
        out += "  none but the CPU\n";
    }
    out
}
