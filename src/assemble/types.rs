//! Tensors that cannot keep their type, and the effect on the file type.
//!
//! A row is a whole number of blocks of its type. Where it cannot be, llama-quantize and we fall back to
//! another type ([`crate::requant::output_type`]).

use crate::ggml::{FileType, Type};
use crate::gguf::OutTensor;
use crate::model::Model;
use std::collections::BTreeMap;

/// Names of tensors without their block, by type and row length.
type Kinds = BTreeMap<(Type, usize), Vec<String>>;

/// Describes the matrices among `tensors` whose rows are not whole blocks of the main type of `mix`.
pub(super) fn misfits_of(mix: FileType, tensors: &[OutTensor]) -> Vec<String> {
    let mut kinds = Kinds::new();
    for t in tensors.iter().filter(|t| falls_back(t, mix.main_type())) {
        add(&mut kinds, t);
    }
    let said = |((ty, n), names): (&(Type, usize), &Vec<String>)| {
        format!(
            "{} is in {ty}, not in a type of {}: its rows of {n} values are no whole blocks of {}",
            names.join(", "),
            mix.name(),
            mix.main_type().block_size()
        )
    };
    kinds.iter().map(said).collect()
}

/// Describes the matrices among `tensors` whose type differs from that in `model`, because it cannot hold
/// their rows.
pub(super) fn changed(model: &Model, tensors: &[OutTensor]) -> Vec<String> {
    let mut kinds: BTreeMap<Type, Kinds> = BTreeMap::new();
    for t in tensors {
        let before = model.file.find(&t.name).map(|t| t.ty);
        if let Some(before) = before.filter(|before| *before != t.ty && falls_back(t, *before)) {
            add(kinds.entry(before).or_default(), t);
        }
    }
    let said = |(before, kinds): (&Type, &Kinds)| {
        let one = |((ty, n), names): (&(Type, usize), &Vec<String>)| {
            format!(
                "{} is in {ty}, not {before}: its rows of {n} values are no whole blocks of {}",
                names.join(", "),
                before.block_size()
            )
        };
        kinds.iter().map(one).collect::<Vec<_>>()
    };
    kinds.iter().flat_map(said).collect()
}

fn falls_back(t: &OutTensor, wanted: Type) -> bool {
    t.ne.len() > 1 && t.ty != Type::F32 && !t.ne[0].is_multiple_of(wanted.block_size())
}

fn add(kinds: &mut Kinds, t: &OutTensor) {
    let name = match t.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((_, name)) => name,
        None => &t.name,
    };
    let name = name.trim_end_matches(".weight").to_string();
    let names = kinds.entry((t.ty, t.ne[0])).or_default();
    if !names.contains(&name) {
        names.push(name);
    }
}

/// Value of `general.file_type` for a file of `tensors` whose source has the value `said`.
/// It is `said`, unless rows are not whole blocks of its type and most bytes of the blocks are in another
/// type. Then the file is named after that type.
pub(super) fn file_type(said: u32, tensors: &[OutTensor]) -> u32 {
    let Some(main) = FileType::from_raw(said).map(FileType::main_type) else { return said };
    let mut bytes: BTreeMap<Type, usize> = BTreeMap::new();
    for t in tensors.iter().filter(|t| t.name.starts_with("blk.") && t.ne.len() > 1) {
        *bytes.entry(t.ty).or_default() += t.n_bytes();
    }
    let most = bytes.iter().max_by_key(|(_, n)| **n).map(|(ty, _)| *ty);
    match most.filter(|most| *most != main && tensors.iter().any(|t| falls_back(t, main))) {
        Some(most) => FileType::mostly(most).map_or(said, FileType::raw),
        None => said,
    }
}
