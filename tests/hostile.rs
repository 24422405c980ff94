//! Damaged and malicious files give one line that names the fault, or a usable model. There is no panic, no
//! abort, and no memory use beyond the size of the file.
//!
//! `PUTRI_MUTATIONS=100000 cargo test --release --test hostile -- --nocapture` is the long run. With
//! `PUTRI_CORPUS=DIR`, it writes the sound files there, for the fuzzer in `fuzz/`.

mod common;

use common::cli::Cli;
use common::test_model::{Rng, TestModel};
use putri_gguf::forward::Forward;
use putri_gguf::ggml::{RawGguf, install_abort_handler, silence_logs};
use putri_gguf::gguf::{GgufFile, OutTensor, Value, write_gguf};
use putri_gguf::model::Model;
use putri_gguf::report::peak_memory;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Number of damaged headers in an ordinary run of the tests.
const MUTATIONS: usize = 4000;

/// Number of still readable files that are pruned as a whole.
const PRUNED: usize = 24;

/// Largest number of bytes for reading damaged headers, whatever sizes they claim.
const MEMORY: u64 = 64 << 20;

/// File that is being read, for the message of an abort.
static AT: AtomicUsize = AtomicUsize::new(0);

/// Tiny models of several families, so that a damaged file is about as long as its header.
fn models() -> Vec<TestModel> {
    let tiny = TestModel { n_embd: 32, blocks: vec![(2, 1, 32); 2], n_vocab: 264, ..TestModel::default() };
    let of = |arch| TestModel { arch, ..tiny.clone() };
    vec![
        tiny.clone(),
        TestModel { biases: true, rope_freqs: true, tied: false, ..tiny.clone() },
        TestModel { arch: "deci", blocks: vec![(2, 1, 32), (0, 0, 64), (4, 2, 32)], ..tiny.clone() },
        TestModel {
            extra: vec![("attention.sliding_window", Value::U32(8))],
            blocks: vec![(2, 1, 32); 7],
            ..of("gemma3")
        },
        TestModel { fused_qkv: true, ..of("phi3") },
        TestModel { experts: Some([4, 2, 32]), tied: false, ..of("qwen2moe") },
        TestModel { biases: true, fused_qkv: true, blocks: vec![(2, 2, 32); 2], ..of("gpt2") },
    ]
}

fn below(rng: &mut Rng, n: usize) -> usize {
    (rng.next_u64() % n.max(1) as u64) as usize
}

/// File, the end of its header, and the positions of the values of its metadata and the sizes of its tensors.
struct Whole {
    bytes: Vec<u8>,
    header: usize,
    values: Vec<usize>,
}

impl Whole {
    fn new(bytes: Vec<u8>) -> Whole {
        let raw = RawGguf::parse(&bytes).unwrap();
        let keys = raw.metadata(&bytes).unwrap().into_iter().map(|(key, _)| key);
        let names = (0..raw.n_tensors()).map(|i| raw.tensor(i).0);
        let behind = |name: String| {
            let found = bytes.windows(name.len()).position(|part| part == name.as_bytes());
            found.unwrap() + name.len()
        };
        let values = keys.chain(names).map(behind).collect();
        Whole { header: raw.data_offset(), values, bytes }
    }

    /// Copy of the file with damage in one place or a few.
    fn damaged(&self, rng: &mut Rng) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        if below(rng, 2) == 0 {
            // Offsets of the type, length and value of one key or tensor.
            let at = self.values[below(rng, self.values.len())] + below(rng, 12);
            bytes[at] = [0, 1, 2, 3, 4, 8, 15, 16, 33, 0x7f, 0x80, 0xff][below(rng, 12)];
        } else {
            damage(rng, &mut bytes, self.header);
        }
        bytes
    }
}

/// Damages a file whose header ends at `header`, in one place or a few.
fn damage(rng: &mut Rng, bytes: &mut Vec<u8>, header: usize) {
    const EXTREMES: [u64; 14] = [
        0,
        1,
        2,
        0x7f,
        0xff,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 32,
        1 << 40,
        i64::MAX as u64,
        1 << 63,
        u64::MAX,
    ];
    for _ in 0..=below(rng, 3) {
        let header = header.min(bytes.len());
        if header < 16 {
            return;
        }
        let at = below(rng, header - 8);
        let n = 1 + below(rng, 48.min(header - at));
        match below(rng, 9) {
            0 => bytes.truncate(if below(rng, 2) == 0 { at } else { below(rng, bytes.len()) }),
            1 => (0..=below(rng, 8)).for_each(|_| bytes[below(rng, header)] ^= 1 << below(rng, 8)),
            2 => {
                let value = EXTREMES[below(rng, EXTREMES.len())];
                bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
            3 => {
                let value = EXTREMES[below(rng, EXTREMES.len())] as u32;
                bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            4 => drop(bytes.drain(at..at + n)),
            5 => {
                let again = bytes[at..at + n].to_vec();
                bytes.splice(at..at, again);
            }
            6 => {
                let from = below(rng, header - n);
                bytes.copy_within(from..from + n, at);
            }
            // A small number, like sizes and types.
            7 => bytes[at] = below(rng, 20) as u8,
            // A position near the beginning, where the counts are.
            _ => bytes[4 + below(rng, 20)] = rng.next_u64() as u8,
        }
    }
}

/// Returns whether the file is usable; if not, the error is one line.
fn reads(path: &Path) -> bool {
    let model = match Model::open(path) {
        Ok(model) => model,
        Err(e) => {
            let text = e.to_string();
            assert!(!text.is_empty() && !text.trim().contains('\n'), "{text}");
            return false;
        }
    };
    let blocks: Result<Vec<_>, _> = (0..model.hparams.n_layer()).map(|il| model.block(il)).collect();
    let Ok(blocks) = blocks else { return false };
    let n_ctx = model.hparams.n_ctx_train.min(8);
    let tokens: Vec<i32> = (0..n_ctx as i32).collect();
    let Ok(forward) = Forward::new(&model, n_ctx, 1) else { return false };
    let Ok(mut x) = forward.embed(&model, &tokens) else { return false };
    for w in &blocks {
        let block = forward.upload(w).unwrap();
        let mut y = vec![0.0; x.len()];
        forward.block(&block, &x, None, &mut y).unwrap();
        x = y;
    }
    true
}

#[test]
fn damaged_headers_are_refused_or_read() {
    silence_logs();
    install_abort_handler(|message, logged| {
        eprintln!("mutation {}: abort: {message} {logged}", AT.load(Ordering::Relaxed));
        std::process::abort();
    });
    let n: usize = std::env::var("PUTRI_MUTATIONS").map_or(MUTATIONS, |n| n.parse().unwrap());
    let cli = Cli::new();
    let path = cli.path("in.gguf");
    let whole: Vec<Whole> = models()
        .iter()
        .enumerate()
        .map(|(i, small)| {
            small.write(&path);
            assert!(reads(&path));
            let bytes = std::fs::read(&path).unwrap();
            if let Some(corpus) = std::env::var_os("PUTRI_CORPUS") {
                std::fs::create_dir_all(&corpus).unwrap();
                std::fs::write(Path::new(&corpus).join(format!("{i}-{}", small.arch)), &bytes).unwrap();
            }
            Whole::new(bytes)
        })
        .collect();
    let before = peak_memory();
    let (mut n_read, mut n_pruned) = (0, 0);
    for seed in 0..n {
        AT.store(seed, Ordering::Relaxed);
        let whole = &whole[seed % whole.len()];
        let bytes = whole.damaged(&mut Rng(seed as u64));
        std::fs::write(&path, &bytes).unwrap();
        let read = std::panic::catch_unwind(|| reads(&path));
        let read = read.unwrap_or_else(|_| panic!("mutation {seed} panicked"));
        n_read += usize::from(read);
        // Some of the readable files go all the way, also through llama.cpp.
        if read && n_pruned < PRUNED.max(n / 200) && bytes != whole.bytes {
            n_pruned += 1;
            prunes_or_says_why(&cli, seed);
        }
    }
    let grown = peak_memory().zip(before).map_or(0, |(now, before)| now - before);
    println!(
        "{n} damaged headers: {n_read} could still be read, {n_pruned} of them were pruned; {grown} bytes more"
    );
    assert!(n_read > n / 20, "only {n_read} of {n} could be read: nothing behind the parser is tested");
    assert!(grown < MEMORY, "{grown} bytes for damaged headers");
}

/// Prunes `in.gguf` with the command: either success, or one line and no files left behind.
fn prunes_or_says_why(cli: &Cli, seed: usize) {
    let args = ["in.gguf", "out.gguf", "--sparsity", "0.2", "-c", "16", "--chunks", "1", "-t", "1", "-q"];
    let out = cli.run(&args);
    let stderr = String::from_utf8_lossy(&out.stderr);
    let errors = stderr.lines().filter(|l| l.starts_with("error:")).count();
    let written = cli.path("out.gguf").exists();
    match out.status.code() {
        Some(0) => assert!(errors == 0 && written, "mutation {seed}: {stderr}"),
        Some(1) => assert!(errors == 1 && !written, "mutation {seed}: {stderr}"),
        code => panic!("mutation {seed}: {code:?}: {stderr}"),
    }
    let _ = std::fs::remove_file(cli.path("out.gguf"));
    assert_eq!(cli.listing().len(), 1, "mutation {seed} left something behind");
}

/// Header written by hand, for content that no writer would write. Values are a type number and bytes.
#[derive(Clone)]
struct Header {
    version: u32,
    n_tensors: Option<u64>,
    n_kv: Option<u64>,
    kv: Vec<(String, u32, Vec<u8>)>,
    /// Tensor by name, sizes, type number and offset.
    tensors: Vec<(String, Vec<u64>, u32, u64)>,
    data: usize,
}

const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl Header {
    fn sound() -> Header {
        let kv = vec![("general.architecture".to_string(), STRING, string("llama"))];
        let tensors = vec![
            ("token_embd.weight".to_string(), vec![32, 4], 0, 0),
            ("output_norm.weight".to_string(), vec![32], 0, 512),
        ];
        Header { version: 3, n_tensors: None, n_kv: None, kv, tensors, data: 640 }
    }

    fn with(mut self, key: &str, ty: u32, value: &[u8]) -> Header {
        self.kv.push((key.into(), ty, value.to_vec()));
        self
    }

    fn tensor(mut self, i: usize, change: impl Fn(&mut (String, Vec<u64>, u32, u64))) -> Header {
        change(&mut self.tensors[i]);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.n_kv.unwrap_or(self.kv.len() as u64).to_le_bytes());
        for (key, ty, value) in &self.kv {
            out.extend(string(key));
            out.extend(ty.to_le_bytes());
            out.extend(value);
        }
        for (name, ne, ty, offset) in &self.tensors {
            out.extend(string(name));
            out.extend((ne.len() as u32).to_le_bytes());
            ne.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(ty.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32) + self.data, 0);
        out
    }
}

#[test]
fn headers_that_no_writer_writes() {
    let array = |ty: u32, n: u64| [&ty.to_le_bytes()[..], &n.to_le_bytes()].concat();
    let ok = Header::sound;
    let big_endian = {
        let mut bytes = ok().bytes();
        bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
        bytes[8..16].copy_from_slice(&2u64.to_be_bytes());
        bytes
    };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        // The rest is missing, but the header is sound.
        ("sound", ok().bytes(), "block_count"),
        ("big-endian", big_endian, "endian"),
        ("version 0", Header { version: 0, ..ok() }.bytes(), "version"),
        ("version 1", Header { version: 1, ..ok() }.bytes(), "version"),
        ("version of the future", Header { version: 9, ..ok() }.bytes(), "version"),
        ("2⁶⁴ − 1 tensors", Header { n_tensors: Some(u64::MAX), ..ok() }.bytes(), ""),
        ("2⁶³ tensors", Header { n_tensors: Some(1 << 63), ..ok() }.bytes(), ""),
        ("a million tensors", Header { n_tensors: Some(1 << 20), ..ok() }.bytes(), ""),
        ("2⁶⁴ − 1 keys", Header { n_kv: Some(u64::MAX), ..ok() }.bytes(), ""),
        ("a million keys", Header { n_kv: Some(1 << 20), ..ok() }.bytes(), ""),
        ("a string of 2⁶⁴ − 1 bytes", ok().with("k", STRING, &u64::MAX.to_le_bytes()).bytes(), ""),
        ("a string of 2⁴⁰ bytes", ok().with("k", STRING, &(1u64 << 40).to_le_bytes()).bytes(), ""),
        ("an array of 2⁶⁴ − 1 numbers", ok().with("k", ARRAY, &array(U32, u64::MAX)).bytes(), ""),
        ("an array of 2⁶² numbers", ok().with("k", ARRAY, &array(U32, 1 << 62)).bytes(), ""),
        ("an array of 2⁴⁰ strings", ok().with("k", ARRAY, &array(STRING, 1 << 40)).bytes(), ""),
        ("an array of arrays", ok().with("k", ARRAY, &array(ARRAY, 1)).bytes(), ""),
        ("an array of an unknown type", ok().with("k", ARRAY, &array(77, 1)).bytes(), ""),
        ("a value of an unknown type", ok().with("k", 77, &[0; 8]).bytes(), ""),
        ("a truth value of 7", ok().with("k", 7, &[7]).bytes(), ""),
        ("an empty key", ok().with("", U32, &[0; 4]).bytes(), "key"),
        (
            "a key that is no UTF-8",
            {
                let mut bytes = ok().with("zzzz", U32, &[0; 4]).bytes();
                let at = bytes.windows(4).position(|w| w == b"zzzz").unwrap();
                bytes[at] = 0xff;
                bytes
            },
            "UTF-8",
        ),
        ("a key of several lines", ok().with("a\nb", U32, &[0; 4]).bytes(), "control"),
        ("a key twice", ok().with("k", U32, &[0; 4]).with("k", U32, &[0; 4]).bytes(), "k"),
        ("alignment 0", ok().with("general.alignment", U32, &[0; 4]).bytes(), "alignment"),
        ("alignment 3", ok().with("general.alignment", U32, &3u32.to_le_bytes()).bytes(), "alignment"),
        ("alignment 2³¹", ok().with("general.alignment", U32, &(1u32 << 31).to_le_bytes()).bytes(), ""),
        ("alignment 8", ok().with("general.alignment", U32, &8u32.to_le_bytes()).bytes(), ""),
        ("alignment as a string", ok().with("general.alignment", STRING, &string("32")).bytes(), "alignment"),
        ("a tensor twice", ok().tensor(1, |t| t.0 = "token_embd.weight".into()).bytes(), "token_embd.weight"),
        ("a tensor without a name", ok().tensor(0, |t| t.0.clear()).bytes(), ""),
        ("a name of 64 bytes", ok().tensor(0, |t| t.0 = "n".repeat(64)).bytes(), ""),
        ("a name of several lines", ok().tensor(0, |t| t.0 = "a\rb".into()).bytes(), "control"),
        ("overlapping tensors", ok().tensor(1, |t| t.3 = 0).bytes(), "output_norm.weight"),
        ("a tensor out of the file", ok().tensor(1, |t| t.3 = 1 << 40).bytes(), "output_norm.weight"),
        ("a tensor at 2⁶⁴ − 1", ok().tensor(1, |t| t.3 = u64::MAX).bytes(), "output_norm.weight"),
        ("a tensor of width 0", ok().tensor(0, |t| t.1 = vec![0, 4]).bytes(), ""),
        ("a tensor of no rows", ok().tensor(0, |t| t.1 = vec![32, 0]).bytes(), ""),
        ("a tensor of 2⁶³ by 2", ok().tensor(0, |t| t.1 = vec![1 << 63, 2]).bytes(), "token_embd.weight"),
        (
            "a tensor of 2³² by 2³²",
            ok().tensor(0, |t| t.1 = vec![1 << 32, 1 << 32]).bytes(),
            "token_embd.weight",
        ),
        ("a tensor of 2⁶⁴ − 1", ok().tensor(0, |t| t.1 = vec![u64::MAX]).bytes(), "token_embd.weight"),
        ("a tensor of five dimensions", ok().tensor(0, |t| t.1 = vec![1; 5]).bytes(), "token_embd.weight"),
        ("a tensor of no dimension", ok().tensor(0, |t| t.1 = vec![]).bytes(), ""),
        ("type 999", ok().tensor(0, |t| t.2 = 999).bytes(), "token_embd.weight"),
        ("a type that is retired", ok().tensor(0, |t| t.2 = 4).bytes(), "token_embd.weight"),
        (
            "rows that are no whole blocks",
            ok().tensor(0, |t| (t.1, t.2) = (vec![33, 4], 2)).bytes(),
            "token_embd.weight",
        ),
    ];
    let cli = Cli::new();
    for (name, bytes, part) in &cases {
        std::fs::write(cli.path("in.gguf"), bytes).unwrap();
        let before = cli.listing();
        let out = std::process::Command::new("sh")
            .current_dir(cli.dir.path())
            // A gigabyte of address space is enough for the program, but not for the sizes that these files
            // claim.
            .args(["-c", "ulimit -v ${PUTRI_TEST_ADDRESS_SPACE:-1500000}; exec \"$0\" in.gguf out.gguf --sparsity 0.25 -q -t 1"])
            .arg(env!("CARGO_BIN_EXE_putri-gguf"))
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        println!("{name}: {}", stderr.trim());
        assert_eq!(out.status.code(), Some(1), "{name}: {stderr}");
        assert!(stderr.lines().count() == 1 && stderr.starts_with("error: "), "{name}: {stderr}");
        assert!(stderr.contains(part) && stderr.contains("in.gguf"), "{name}: {stderr}");
        assert!(cli.listing() == before, "{name}");
    }
}

#[test]
fn strings_of_any_bytes_are_carried_over() {
    let cli = Cli::new();
    let words = [&b"caf\xe9"[..], b"a\0b", b"", b"\xff\xfe\0", "größe".as_bytes()];
    let extra = vec![
        ("list", Value::StrArray(words.iter().map(|w| w.to_vec()).collect())),
        ("one", Value::Str(b"before\0after".to_vec())),
        ("latin", Value::Str(b"M\xfcller".to_vec())),
        ("behind", Value::U32(7)),
    ];
    TestModel { extra: extra.clone(), blocks: vec![(4, 2, 256); 3], ..TestModel::default() }
        .write(&cli.path("in.gguf"));
    let source = GgufFile::open(&cli.path("in.gguf")).unwrap();
    let read = |file: &GgufFile, key: &str| file.get(key).cloned();
    for (key, value) in &extra {
        assert_eq!(read(&source, &format!("llama.{key}")).as_ref(), Some(value), "{key}");
    }
    cli.ok(&["in.gguf", "out.gguf", "--sparsity", "0.3", "-c", "64", "--chunks", "4", "-t", "1", "-q"]);
    let out = GgufFile::open(&cli.path("out.gguf")).unwrap();
    let arch = out.get_str("general.architecture").unwrap().unwrap();
    for (key, value) in &extra {
        assert_eq!(read(&out, &format!("{arch}.{key}")).as_ref(), Some(value), "{key}");
    }
    // Another parser reads the same lengths.
    cli.ok(&["verify", "out.gguf", "--source", "in.gguf", "-q", "-t", "1"]);
}

#[test]
fn names_move_no_cursor_and_are_no_markup() {
    let cli = Cli::new();
    let small = TestModel { blocks: vec![(4, 2, 256); 3], ..TestModel::default() };
    small.write(&cli.path("plain.gguf"));
    let file = GgufFile::open(&cli.path("plain.gguf")).unwrap();
    let name = "\u{1b}]0;PWNED\u{7}\u{1b}[31mRed\n<script>x</script> `y` | \u{202e}z";
    let metadata: Vec<(String, Value)> = file
        .metadata()
        .iter()
        .map(|(k, v)| (k.clone(), if k == "general.name" { Value::Str(name.into()) } else { v.clone() }))
        .collect();
    let tensors: Vec<OutTensor> = file.tensors().iter().map(|t| OutTensor::copy(&file, t)).collect();
    let path = cli.path("in put.gguf");
    write_gguf(&mut std::fs::File::create(&path).unwrap(), &path, &metadata, &tensors).unwrap();
    let said = cli.ok(&["inspect", "in put.gguf"]);
    assert!(said.contains(r"\u{1b}[31mRed\u{a}<script>") && !said.contains('\u{1b}'), "{said}");
    let quick = ["--sparsity", "0.3", "-c", "64", "--chunks", "4", "-t", "1", "-q"];
    cli.ok(&[&["in put.gguf", "o $(id).gguf", "--package", "p"][..], &quick].concat());
    let read = |name: &str| std::fs::read_to_string(cli.path("p").join(name)).unwrap();
    for file in ["README.md", "NOTICE.txt"] {
        assert!(!read(file).contains(['\u{1b}', '\u{7}', '\u{202e}']), "{}", read(file));
    }
    let readme = read("README.md");
    assert!(readme.contains(r"\<script\>") && !readme.contains("<script>"), "{readme}");
    assert!(readme.contains("llama-cli -m 'o $(id).gguf'"), "{readme}");
    assert!(!read("NOTICE.txt").contains("pruned 3"), "the makers did not call it so");
    // The fault of a file is reported in one line, whatever its name is.
    let odd = "odd\u{1b}[2J\nname.gguf";
    std::fs::write(cli.path(odd), "no model").unwrap();
    let out = cli.run(&["inspect", odd]);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(stderr.lines().count() == 1 && !stderr.contains('\u{1b}'), "{stderr:?}");
}

#[test]
fn weights_that_are_no_numbers() {
    let cli = Cli::new();
    let small = TestModel { tied: false, ..TestModel::default() };
    for (tensor, value) in [
        ("blk.1.ffn_up.weight", f32::NAN),
        ("blk.0.attn_q.weight", f32::INFINITY),
        ("blk.2.ffn_norm.weight", f32::NEG_INFINITY),
        ("output.weight", f32::NAN),
        ("output_norm.weight", f32::NAN),
        // No calibration uses this row, but a user may.
        ("token_embd.weight", f32::NAN),
    ] {
        small.write(&cli.path("in.gguf"));
        let (start, len) = {
            let file = putri_gguf::gguf::GgufFile::open(&cli.path("in.gguf")).unwrap();
            let data = file.data(file.find(tensor).unwrap());
            (data.as_ptr() as usize - file.bytes().next().unwrap().as_ptr() as usize, data.len())
        };
        let mut bytes = std::fs::read(cli.path("in.gguf")).unwrap();
        // The damage is in the last row.
        bytes[start + len - 4..start + len].copy_from_slice(&value.to_le_bytes());
        std::fs::write(cli.path("in.gguf"), bytes).unwrap();
        let args =
            ["in.gguf", "out.gguf", "--sparsity", "0.25", "-q", "-c", "32", "--chunks", "2", "-t", "1"];
        cli.fails(&args, 1, &[tensor, "damaged"]);
    }
}

/// Prunes `in.gguf`, and calls `at` once the stage is announced. Returns the exit code and the lines on
/// stderr.
fn disturbed(cli: &Cli, stage: &str, at: impl Fn(&Path)) -> (Option<i32>, Vec<String>) {
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_putri-gguf"))
        .current_dir(cli.dir.path())
        .args(["in.gguf", "out.gguf", "--sparsity", "0.3", "-c", "64", "--chunks", "16", "-t", "1"])
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut said = Vec::new();
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        if line == stage {
            at(&cli.path("in.gguf"));
        }
        said.push(line);
    }
    (child.wait().unwrap().code(), said)
}

#[test]
#[cfg(unix)]
fn a_file_that_shrinks_while_it_is_read() {
    let cli = Cli::new();
    TestModel { n_embd: 256, blocks: vec![(8, 4, 1024); 12], ..TestModel::default() }
        .write(&cli.path("in.gguf"));
    for stage in ["widths", "sensitivity", "blocks"] {
        let whole = std::fs::read(cli.path("in.gguf")).unwrap();
        // No page of the file is left, not even those in memory.
        let (code, said) = disturbed(&cli, stage, |path| {
            std::fs::File::options().write(true).open(path).unwrap().set_len(0).unwrap();
        });
        assert_eq!(code, Some(1), "{said:?}");
        let errors: Vec<&String> = said.iter().filter(|l| l.starts_with("error:")).collect();
        assert!(errors.len() == 1 && errors[0].contains("in.gguf: became shorter"), "{stage}: {said:?}");
        std::fs::write(cli.path("in.gguf"), whole).unwrap();
        assert_eq!(cli.listing().len(), 1, "{stage} left something behind");
    }
}

#[test]
#[cfg(unix)]
fn a_file_that_vanishes_while_it_is_read() {
    let cli = Cli::new();
    TestModel { n_embd: 128, blocks: vec![(8, 4, 512); 6], ..TestModel::default() }
        .write(&cli.path("in.gguf"));
    let whole = std::fs::read(cli.path("in.gguf")).unwrap();
    let (code, said) = disturbed(&cli, "", |_| {});
    assert_eq!(code, Some(0), "{said:?}");
    let expected = std::fs::read(cli.path("out.gguf")).unwrap();
    for stage in ["widths", "blocks", "write"] {
        std::fs::remove_file(cli.path("out.gguf")).unwrap();
        std::fs::write(cli.path("in.gguf"), &whole).unwrap();
        // The mapped file stays readable. Another file of that name is not touched.
        let (code, said) = disturbed(&cli, stage, |path| {
            std::fs::remove_file(path).unwrap();
            std::fs::write(path, "another").unwrap();
        });
        assert_eq!(code, Some(0), "{stage}: {said:?}");
        assert!(std::fs::read(cli.path("out.gguf")).unwrap() == expected, "{stage}");
        assert_eq!(std::fs::read(cli.path("in.gguf")).unwrap(), b"another");
    }
}
