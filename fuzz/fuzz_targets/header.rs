//! Any bytes as a GGUF: an error, or a model whose blocks can be read. Begin from small models:
//! `tests/hostile.rs` writes some, and `PUTRI_CORPUS=fuzz/corpus/header cargo test --test hostile` keeps them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use putri_gguf::ggml::silence_logs;
use putri_gguf::model::Model;

fuzz_target!(|bytes: &[u8]| {
    silence_logs();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, bytes).unwrap();
    let Ok(model) = Model::open(file.path()) else { return };
    for il in 0..model.hparams.n_layer() {
        let _ = model.block(il);
    }
});
