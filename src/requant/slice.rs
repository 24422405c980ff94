//! Byte-exact slices of quantised tensors.

use crate::ggml::Type;

/// Selects the rows `rows` of a tensor with `n_per_row` elements per row, byte for byte.
pub fn select_rows(bytes: &[u8], ty: Type, n_per_row: usize, rows: &[usize]) -> Vec<u8> {
    let size = ty.row_bytes(n_per_row);
    rows.iter().flat_map(|&r| &bytes[r * size..(r + 1) * size]).copied().collect()
}

/// Selects the columns in the runs `runs` of `run` elements each, byte for byte.
/// Returns `None` if a run is not made of whole blocks of the type.
pub fn select_columns(
    bytes: &[u8],
    ty: Type,
    n_per_row: usize,
    run: usize,
    runs: &[usize],
) -> Option<Vec<u8>> {
    if !run.is_multiple_of(ty.block_size()) {
        return None;
    }
    let (row_size, run_size) = (ty.row_bytes(n_per_row), ty.row_bytes(run));
    let slice = bytes
        .chunks_exact(row_size)
        .flat_map(|row| runs.iter().flat_map(move |&r| &row[r * run_size..(r + 1) * run_size]));
    Some(slice.copied().collect())
}
