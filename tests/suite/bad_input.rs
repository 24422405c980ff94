//! Bad input gives one clear line and leaves no files behind.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use putri_gguf::gguf::{Value, write_gguf};

const IN: &str = "in.gguf";

fn with_model() -> Cli {
    let cli = Cli::new();
    TestModel::default().write(&cli.path(IN));
    cli
}

fn prune(cli: &Cli, more: &[&str], code: i32, parts: &[&str]) {
    cli.fails(&[&[IN, "out.gguf", "--sparsity", "0.25", "--quiet"][..], more].concat(), code, parts);
}

#[test]
fn no_such_file() {
    prune(&Cli::new(), &[], 1, &[IN, "No such file"]);
}

#[test]
fn not_a_gguf() {
    let cli = Cli::new();
    std::fs::write(cli.path(IN), "PK\u{3}\u{4} certainly a zip").unwrap();
    prune(&cli, &[], 1, &[IN, "not a GGUF file"]);
    std::fs::write(cli.path(IN), "").unwrap();
    prune(&cli, &[], 1, &[IN]);
}

#[test]
fn a_folder() {
    let cli = Cli::new();
    std::fs::create_dir(cli.path(IN)).unwrap();
    prune(&cli, &[], 1, &[IN, "directory"]);
}

#[test]
fn cut_short() {
    let cli = with_model();
    let whole = std::fs::read(cli.path(IN)).unwrap();
    for n in [4, 20, 200, 3000, whole.len() / 2, whole.len() - 1] {
        std::fs::write(cli.path(IN), &whole[..n]).unwrap();
        prune(&cli, &[], 1, &[IN, "cut short"]);
    }
}

#[test]
fn unsupported_architecture() {
    let cli = Cli::new();
    TestModel { arch: "mamba", ..TestModel::default() }.write(&cli.path(IN));
    prune(&cli, &[], 1, &["mamba", "llama", "deci"]);
}

#[test]
fn what_goes_with_a_model_and_is_none() {
    for (kind, arch, part) in [
        ("adapter", "llama", "LoRA adapter"),
        ("mmproj", "clip", "prune its language model"),
        ("imatrix", "none", "importance matrix"),
    ] {
        let cli = Cli::new();
        let metadata = [("general.type", kind), ("general.architecture", arch)]
            .map(|(k, v)| (k.to_string(), Value::Str(v.into())));
        let path = cli.path(IN);
        write_gguf(&mut std::fs::File::create(&path).unwrap(), &path, &metadata, &[]).unwrap();
        prune(&cli, &[], 1, &[IN, part]);
    }
    let heads = vec![("nextn_predict_layers", Value::U32(1))];
    let cli = Cli::new();
    TestModel { arch: "glm4", extra: heads, ..TestModel::default() }.write(&cli.path(IN));
    prune(&cli, &[], 1, &[IN, "multi-token prediction"]);
}

#[test]
fn experts_that_cannot_be() {
    let cli = Cli::new();
    let with = |extra: Vec<(&'static str, Value)>, small: TestModel| {
        TestModel { extra, ..small }.write(&cli.path(IN));
    };
    let of = |n: u32| ("expert_count", Value::U32(n));
    with(vec![of(8)], TestModel { arch: "gemma3", ..TestModel::default() });
    prune(&cli, &[], 1, &["8 experts", "gemma3"]);
    with(vec![of(8)], TestModel::default());
    prune(&cli, &[], 1, &["expert_used_count", "0 of 8"]);
    let mixture = TestModel { experts: Some([8, 2, 0]), ..TestModel::default() };
    with(vec![("expert_used_count", Value::U32(9))], mixture.clone());
    prune(&cli, &[], 1, &["expert_used_count", "9 of 8"]);
    with(vec![("expert_group_count", Value::U32(2))], mixture.clone());
    prune(&cli, &[], 1, &["expert_group_count"]);
    with(vec![of(4)], mixture);
    prune(&cli, &[], 1, &["expert_count", "is 4", "ffn_gate_inp.weight", "[64, 8]"]);
}

#[test]
fn keys_that_cannot_be() {
    for (key, value, part) in [
        ("rope.dimension_count", Value::U32(8), "rope.dimension_count"),
        ("attention.value_length", Value::U32(64), "value_length"),
        ("rope.scaling.type", Value::Str("spiral".into()), "spiral"),
        ("rope.freq_base", Value::Str("ten".into()), "float32"),
        ("feed_forward_length", Value::u32_array(&[96, 96]), "2 elements for 3 blocks"),
        ("block_count", Value::U32(0), "block_count"),
        ("attention.head_count", Value::U32(3), "not a multiple"),
        ("attention.layer_norm_rms_epsilon", Value::F32(f32::NAN), "NaN"),
        ("attention.causal", Value::Bool(false), "not causal"),
        ("nextn_predict_layers", Value::U32(1), "multi-token"),
    ] {
        let cli = Cli::new();
        TestModel { extra: vec![(key, value)], ..TestModel::default() }.write(&cli.path(IN));
        prune(&cli, &[], 1, &[IN, part]);
    }
}

#[test]
fn gemma3_that_cannot_be() {
    let gemma = TestModel::gemma3();
    for (key, value, part) in [
        ("attention.sliding_window_pattern", Value::u32_array(&[1, 0]), "2 elements for 7 blocks"),
        ("attention.key_length_swa", Value::U32(32), "attention.key_length_swa"),
        ("rope.freq_base_swa", Value::Str("ten".into()), "float32"),
        ("feed_forward_length", Value::u32_array(&[96, 96, 96, 96, 96, 96, 64]), "differs in block 6"),
    ] {
        let cli = Cli::new();
        let extra = [gemma.extra.clone(), vec![(key, value)]].concat();
        TestModel { extra, ..gemma.clone() }.write(&cli.path(IN));
        prune(&cli, &[], 1, &[IN, part]);
    }
    // The graph of this architecture has no frequency factors, so its loader refuses them.
    let cli = Cli::new();
    TestModel { rope_freqs: true, ..gemma }.write(&cli.path(IN));
    prune(&cli, &[], 1, &["rope_freqs.weight", "not known in architecture gemma3"]);
}

#[test]
fn tensors_that_do_not_fit() {
    let cli = Cli::new();
    // The metadata claims wider blocks than there are.
    TestModel { extra: vec![("feed_forward_length", Value::U32(128))], ..TestModel::default() }
        .write(&cli.path(IN));
    prune(&cli, &[], 1, &["blk.0.ffn_gate.weight", "[64, 96]", "[64, 128]"]);
    TestModel { extra: vec![("block_count", Value::U32(4))], ..TestModel::default() }.write(&cli.path(IN));
    prune(&cli, &[], 1, &["blk.3."]);
    TestModel { extra: vec![("block_count", Value::U32(2))], ..TestModel::default() }.write(&cli.path(IN));
    prune(&cli, &[], 1, &["blk.2.", "not known"]);
}

#[test]
fn resampled_copies_where_there_are_none() {
    prune(
        &with_model(),
        &["--method", "paper", "--resample-copies", "1"],
        2,
        &["--resample-copies", "--method putri"],
    );
    prune(&with_model(), &["--resample-copies", "101"], 2, &["101"]);
    with_model().fails(
        &[IN, "out.gguf", "--sparsity", "0", "--resample-copies", "1"],
        2,
        &["--resample-copies", "only copies"],
    );
}

#[test]
fn tuning_where_there_is_none() {
    prune(&with_model(), &["--method", "paper", "--tune", "1"], 2, &["--tune", "--method putri"]);
    prune(&with_model(), &["--tune", "1001"], 2, &["1001"]);
    with_model().fails(&[IN, "out.gguf", "--sparsity", "0", "--tune", "1"], 2, &["--tune", "only copies"]);
}

#[test]
fn sparsity_out_of_reach() {
    let cli = with_model();
    cli.fails(&[IN, "out.gguf", "--sparsity", "0.99"], 1, &["0.99", "at most"]);
    for bad in ["1", "1.5", "-1", "many"] {
        let out = cli.run(&[IN, "out.gguf", &format!("--sparsity={bad}")]);
        assert_eq!(out.status.code(), Some(2), "{bad}");
        assert!(!cli.path("out.gguf").exists());
    }
}

#[test]
fn output_is_the_input() {
    let cli = with_model();
    cli.fails(&[IN, IN, "--sparsity", "0.25", "--force"], 1, &["is the input itself"]);
    std::os::unix::fs::symlink(cli.path(IN), cli.path("link.gguf")).unwrap();
    cli.fails(&[IN, "link.gguf", "--sparsity", "0.25", "--force"], 1, &["is the input itself"]);
    std::fs::hard_link(cli.path(IN), cli.path("hard.gguf")).unwrap();
    cli.fails(&[IN, "hard.gguf", "--sparsity", "0.25", "--force"], 1, &["is the input itself"]);
}

#[test]
fn paths_that_collide() {
    let cli = with_model();
    std::fs::write(cli.path("notes.txt"), "my notes").unwrap();
    std::fs::hard_link(cli.path("notes.txt"), cli.path("again.txt")).unwrap();
    let fails = |args: &[&str], parts: &[&str]| {
        cli.fails(&[&[IN], args, &["--sparsity", "0.25", "--force", "-q"]].concat(), 1, parts);
    };
    let twice = "is two outputs of this run";
    fails(&["x.Modelfile", "--modelfile"], &["x.Modelfile", twice]);
    fails(&["o.json", "--report", "./o.json"], &["o.json", twice]);
    fails(&["o.gguf", "--report", "r.json", "--imatrix-out", "r.json"], &["r.json", twice]);
    fails(&["o.gguf", "--imatrix-out", "o.gguf"], &["o.gguf", twice]);
    fails(&["o.gguf", "--state-dir", "o.gguf"], &["o.gguf", twice]);
    fails(&["o.gguf", "--imatrix-out", IN], &["is the input itself"]);
    fails(&["notes.txt", "-f", "notes.txt"], &["notes.txt", "is read by this run"]);
    fails(
        &["o.gguf", "-f", "notes.txt", "--imatrix-out", "again.txt"],
        &["again.txt", "is read by this run"],
    );
    let nested = ["o.gguf", "--nested", "0.2,0.3", "--imatrix-out", "o.gguf", "--force", "-q"];
    cli.fails(&[&[IN][..], &nested].concat(), 1, &["o-20.gguf", twice]);
    assert_eq!(std::fs::read(cli.path("notes.txt")).unwrap(), b"my notes");
}

#[test]
fn only_files_are_replaced() {
    let cli = with_model();
    let path = cli.path("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    let _socket = std::os::unix::net::UnixListener::bind(cli.path("socket")).unwrap();
    std::os::unix::fs::symlink("/dev/null", cli.path("to-null")).unwrap();
    for name in ["pipe", "socket", "/dev/null", "to-null"] {
        let is = "is a device, pipe or socket";
        cli.fails(&[IN, name, "--sparsity", "0.25", "--force"], 1, &[name, is]);
        cli.fails(&[IN, name, "--sparsity", "0"], 1, &[name, is]);
        cli.fails(&[IN, "o.gguf", "--imatrix-out", name, "--sparsity", "0.25", "--force"], 1, &[name, is]);
    }
    std::fs::rename(path, cli.path("r.json")).unwrap();
    prune(&cli, &["--report", "r.json", "--force"], 1, &["r.json", "is a device, pipe or socket"]);
    for (name, part) in [("-", "name a file"), ("ollama:small", "--ollama-create small")] {
        cli.fails(&[IN, name, "--sparsity", "0.25"], 2, &[name, part]);
    }
}

#[test]
fn long_names_are_names() {
    let cli = with_model();
    let name = format!("{}.gguf", "n".repeat(250));
    cli.ok(&[IN, &name, "--sparsity", "0"]);
    assert_eq!(std::fs::read(cli.path(&name)).unwrap(), std::fs::read(cli.path(IN)).unwrap());
}

#[test]
fn outputs_have_the_permissions_of_new_files() {
    use std::os::unix::fs::PermissionsExt;
    let cli = with_model();
    let mode = |name: &str| cli.path(name).metadata().unwrap().permissions().mode() & 0o777;
    let private =
        |mode| std::fs::set_permissions(cli.path(IN), std::fs::Permissions::from_mode(mode)).unwrap();
    for (umask, source, expected) in
        [("022", 0o644, 0o644), ("077", 0o644, 0o600), ("002", 0o664, 0o664), ("022", 0o600, 0o600)]
    {
        private(source);
        let line = format!(
            "umask {umask}; $P {IN} out.gguf --sparsity 0.25 -c 64 --chunks 4 --resample-copies 0 -t 1 -q --force --report r.json --package p"
        );
        let status = std::process::Command::new("bash")
            .current_dir(cli.dir.path())
            .args(["-c", &line])
            .env("P", env!("CARGO_BIN_EXE_putri-gguf"))
            .stdout(std::process::Stdio::null())
            .status();
        assert!(status.unwrap().success());
        assert_eq!(mode("out.gguf"), expected, "{umask} {source:o}");
        let umask = u32::from_str_radix(umask, 8).unwrap();
        assert_eq!(
            [mode("r.json"), mode("p/README.md"), mode("p")],
            [0o666, 0o666, 0o777].map(|m| m & !umask)
        );
    }
}

#[test]
fn what_is_no_model_is_named() {
    let cli = with_model();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98000000\n";
    std::fs::write(cli.path(IN), pointer).unwrap();
    prune(&cli, &[], 1, &[IN, "Git LFS pointer", "git lfs pull"]);
}

#[test]
fn alignments_that_llama_cpp_stops_on() {
    // Headers of four lengths, each 8 bytes longer than the one before. After three of them, no tensor starts
    // at a multiple of 32.
    let cli = Cli::new();
    let refused = (0..4).filter(|i| {
        let word = "w".repeat(8 * i + 1);
        let extra = vec![("word", Value::Str(word.into()))];
        TestModel { extra, ..TestModel::default() }.write(&cli.path(IN));
        let mut bytes = std::fs::read(cli.path(IN)).unwrap();
        let key = b"general.alignment";
        // The number of the value's type follows the key, in 32 bits.
        let at = bytes.windows(key.len()).position(|part| part == key).unwrap() + key.len() + 4;
        bytes[at..at + 4].copy_from_slice(&8u32.to_le_bytes());
        std::fs::write(cli.path(IN), bytes).unwrap();
        let out = cli.run(&["inspect", IN]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            out.status.success() || said.contains("general.alignment is 8") && said.lines().count() == 1,
            "{said}"
        );
        !out.status.success()
    });
    assert_eq!(refused.count(), 3);
}

#[test]
fn output_exists() {
    let cli = with_model();
    std::fs::write(cli.path("out.gguf"), "precious").unwrap();
    cli.fails(&[IN, "out.gguf", "--sparsity", "0.25"], 1, &["out.gguf", "--force"]);
    cli.ok(&[IN, "out.gguf", "--sparsity", "0", "--force"]);
    assert_eq!(std::fs::read(cli.path("out.gguf")).unwrap(), std::fs::read(cli.path(IN)).unwrap());
}

#[test]
fn nowhere_to_write() {
    let cli = with_model();
    std::fs::create_dir(cli.path("folder")).unwrap();
    cli.fails(&[IN, "folder", "--sparsity", "0.25"], 1, &["folder", "name a file"]);
    cli.fails(&[IN, "new/", "--sparsity", "0.25"], 1, &["new/", "name a file"]);
    cli.fails(&[IN, &"x".repeat(300), "--sparsity", "0.25"], 1, &["too long"]);
    std::os::unix::fs::symlink("gone", cli.path("dangling")).unwrap();
    cli.fails(&[IN, "dangling", "--sparsity", "0.25"], 1, &["dangling", "--force"]);
    cli.fails(&[IN, "no/such/folder/out.gguf", "--sparsity", "0.25"], 1, &["no/such/folder"]);
}

#[test]
fn no_space() {
    // A limit on file sizes simulates a full disk: the write of the output fails half-way. The shell ignores
    // the signal for it, and its child processes inherit that.
    let cli = with_model();
    let out = std::process::Command::new("sh")
        .current_dir(cli.dir.path())
        .args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" in.gguf out.gguf --sparsity 0.25 --quiet --ctx-size 32 --chunks 2 -t 1"])
        .arg(env!("CARGO_BIN_EXE_putri-gguf"))
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("out.gguf") && stderr.contains("too large"), "{stderr}");
    assert_eq!(cli.listing().len(), 1, "something was left behind");
}

#[test]
fn windows_longer_than_the_model_knows() {
    prune(&with_model(), &["--ctx-size", "512"], 1, &["256 tokens", "windows of 512", "--ctx-size 256"]);
}

#[test]
fn no_tokenizer() {
    let cli = with_model();
    let file = putri_gguf::gguf::GgufFile::open(&cli.path(IN)).unwrap();
    crate::common::rewrite(&file, &cli.path("bare.gguf"), |k| !k.starts_with("tokenizer."), None);
    cli.fails(&["bare.gguf", "out.gguf", "--sparsity", "0.25", "--quiet", "-c", "64"], 1, &["tokenizer"]);
}

#[test]
fn calibration_text_that_is_missing_or_short() {
    let cli = with_model();
    prune(&cli, &["-c", "64", "-f", "nowhere.txt"], 1, &["nowhere.txt"]);
    std::fs::write(cli.path("short.txt"), "too short").unwrap();
    prune(&cli, &["-c", "64", "-f", "short.txt"], 1, &["tokens", "--ctx-size"]);
}
