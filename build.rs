//! Records for `--version` what is linked in, and warns when ggml's kernels would be slow.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=Cargo.lock");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-env=PUTRI_ENGINE_CRATE={}", engine_crate());
    let gpu = ["cuda", "metal", "vulkan"]
        .into_iter()
        .filter(|f| env::var_os(format!("CARGO_FEATURE_{}", f.to_uppercase())).is_some());
    let backends: Vec<_> = std::iter::once("cpu").chain(gpu).collect();
    println!("cargo:rustc-env=PUTRI_BACKENDS={}", backends.join(" "));

    // The engine crate compiles ggml for the same target features as Rust code.
    let features = env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    let has = |f: &str| features.split(',').any(|x| x == f);
    if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|a| a == "x86_64") && !has("avx2") {
        println!(
            "cargo:warning=ggml's kernels are built without AVX2 and will be many times slower; \
             set RUSTFLAGS=\"-C target-cpu=native\" (or x86-64-v3), as .cargo/config.toml does in this repository"
        );
    }
}

/// Version of llama-cpp-sys-2 in Cargo.lock.
fn engine_crate() -> String {
    let lock = std::fs::read_to_string("Cargo.lock").unwrap_or_default();
    let mut lines = lock.lines().skip_while(|l| *l != "name = \"llama-cpp-sys-2\"");
    lines.nth(1).and_then(|l| l.split('"').nth(1)).unwrap_or("unknown").to_string()
}
