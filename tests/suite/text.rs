//! Text files: every encoding, files that are not text, pipes, and texts much larger than memory should be.

use crate::common::cli::Cli;
use crate::common::test_model::{Rng, TestModel};
use crate::common::{TEXT, rewrite};
use putri_gguf::calibrate::{Recipe, collect, text_windows};
use putri_gguf::evaluate::{Protocol, windows};
use putri_gguf::ggml::{LlamaModel, Token, silence_logs};
use putri_gguf::gguf::GgufFile;
use putri_gguf::text::{Encoding, PIECE, TextError, TextFile};
use std::path::Path;
use std::process::{Command, Stdio};

const QUICK: [&str; 7] = ["-c", "64", "--chunks", "4", "-t", "1", "-q"];

fn cli() -> Cli {
    silence_logs();
    let cli = Cli::new();
    TestModel::default().write(&cli.path("a.gguf"));
    cli
}

fn model(cli: &Cli) -> LlamaModel {
    LlamaModel::load(&cli.path("a.gguf")).unwrap()
}

/// Lines of several scripts, with characters of one to four bytes.
fn lines() -> String {
    format!(
        "{TEXT}\nFüße, größer; naïve café.\n人工智能是研究、开发用于模拟人的智能的理论。\n😀 and 𝄞, too\n"
    )
}

/// `text` in all encodings with a byte-order mark, including the mark.
fn marked(text: &str) -> Vec<(&'static str, Vec<u8>)> {
    let text = format!("\u{feff}{text}");
    let wide = |f: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(f).collect::<Vec<u8>>();
    let wider = |f: fn(u32) -> [u8; 4]| text.chars().map(u32::from).flat_map(f).collect::<Vec<u8>>();
    vec![
        ("utf-8", text.clone().into_bytes()),
        ("utf-16le", wide(u16::to_le_bytes)),
        ("utf-16be", wide(u16::to_be_bytes)),
        ("utf-32le", wider(u32::to_le_bytes)),
        ("utf-32be", wider(u32::to_be_bytes)),
    ]
}

fn latin1(text: &str) -> Vec<u8> {
    text.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect()
}

fn named(label: &str) -> Option<Encoding> {
    Some(Encoding::for_label(label).unwrap())
}

fn calibrated(model: &LlamaModel, path: &Path, encoding: Option<Encoding>) -> Vec<Token> {
    let recipe = Recipe {
        files: vec![path.into()],
        encoding,
        n_ctx: 32,
        n_windows: 6,
        self_share: 0.0,
        n_threads: 1,
        ..Recipe::default()
    };
    collect(model, &recipe, &mut Vec::new(), |_, _, _| true).unwrap().tokens
}

#[test]
fn every_encoding_gives_the_same_windows() {
    let cli = cli();
    let (model, path) = (model(&cli), cli.path("t.txt"));
    let text = lines();
    std::fs::write(&path, &text).unwrap();
    let expected = calibrated(&model, &path, None);
    let read = |encoding| TextFile::open(&path, encoding).unwrap().read().unwrap();
    for (label, bytes) in marked(&text) {
        std::fs::write(&path, &bytes).unwrap();
        // The mark is preferred to a named encoding.
        for encoding in [None, named("windows-1252")] {
            assert_eq!(read(encoding), text, "{label}");
            assert_eq!(calibrated(&model, &path, encoding), expected, "{label}");
        }
        let n_mark = match label {
            "utf-8" => 3,
            "utf-16le" | "utf-16be" => 2,
            _ => 4,
        };
        std::fs::write(&path, &bytes[n_mark..]).unwrap();
        assert_eq!(calibrated(&model, &path, named(label)), expected, "{label} without a mark");
    }
    std::fs::write(&path, encoding_rs::GB18030.encode(&text).0).unwrap();
    assert_eq!(calibrated(&model, &path, named("gb18030")), expected);
}

#[test]
fn excerpts_have_whole_characters_each_once() {
    let cli = cli();
    let path = cli.path("t.txt");
    let text = lines();
    let ascii_free: String = text.chars().filter(|c| !c.is_ascii()).collect();
    for text in [&text, &ascii_free] {
        for (label, bytes) in marked(text) {
            std::fs::write(&path, &bytes).unwrap();
            let file = TextFile::open(&path, None).unwrap();
            for n in [1, 2, 3, 5, 8, 100, 100_000] {
                let starts = (0..file.n_bytes()).step_by(n);
                let parts: Vec<String> = starts.map(|from| file.excerpt(from, n).unwrap()).collect();
                assert_eq!(&parts.concat(), text, "{label} by {n}");
            }
        }
    }
    // If bytes do not show where characters begin, excerpts are of whole lines.
    let line = "日本語の文章です。\n";
    std::fs::write(&path, encoding_rs::SHIFT_JIS.encode(&line.repeat(50)).0).unwrap();
    let file = TextFile::open(&path, named("shift_jis")).unwrap();
    for from in 0..40 {
        let found = file.excerpt(from, 100).unwrap();
        assert!(found.starts_with('日') && found.replace(line, "").is_empty(), "{from}: {found}");
    }
}

#[test]
fn pieces_are_all_of_a_text() {
    let cli = cli();
    let path = cli.path("t.txt");
    let long = lines().repeat(3 * PIECE / lines().len());
    let one_line = long.replace('\n', " ");
    for text in [&long, &one_line] {
        for (label, bytes) in marked(text) {
            std::fs::write(&path, &bytes).unwrap();
            let file = TextFile::open(&path, None).unwrap();
            let pieces: Vec<String> = file.pieces(PIECE).map(Result::unwrap).collect();
            assert!(pieces.len() >= 3 && pieces.concat() == *text, "{label}");
            let (last, others) = pieces.split_last().unwrap();
            assert!(!last.is_empty());
            assert!(text == &one_line || others.iter().all(|p| p.ends_with('\n')), "{label}");
        }
    }
    std::fs::write(&path, encoding_rs::GB18030.encode(&long).0).unwrap();
    assert!(TextFile::open(&path, named("gb18030")).unwrap().read().unwrap() == long);
}

#[test]
fn what_is_no_text_is_refused_by_name() {
    let cli = cli();
    let mut rng = Rng(5);
    let random: Vec<u8> = (0..200_000).map(|_| rng.next_u64() as u8).collect();
    let without_nul: Vec<u8> = random.iter().map(|b| (*b).max(1)).collect();
    let german = latin1(&"Über größere Flüsse führen schöne Brücken, und so weiter. ".repeat(100));
    let wide: Vec<u8> = TEXT.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let model = std::fs::read(cli.path("a.gguf")).unwrap();
    let late = [(TEXT.to_owned() + "\n").repeat(200).as_bytes(), b"\0"].concat();
    let at = format!("NUL at byte {}", late.len() - 1);
    let cases: [(&str, &[u8], &str); 20] = [
        ("gguf", &model, "is a GGUF model"),
        ("zip", b"PK\x03\x04\x14\0\0\0\x08\0", "is a zip archive"),
        ("gzip", b"\x1f\x8b\x08\0\0\0\0\0", "is a gzip archive"),
        ("xz", b"\xfd7zXZ\0\0\x04", "is an xz archive"),
        ("zstd", b"\x28\xb5\x2f\xfd\x04\0\0\0", "is a zstd archive"),
        ("bzip2", b"BZh91AY&SY\0\0", "is a bzip2 archive"),
        ("pdf", b"%PDF-1.7\n1 0 obj\n", "is a PDF document"),
        ("png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a PNG image"),
        ("jpeg", b"\xff\xd8\xff\xe0\0\x10JFIF\0", "is a JPEG image"),
        ("elf", b"\x7fELF\x02\x01\x01\0", "is an ELF program"),
        ("sqlite", b"SQLite format 3\0\x10\0", "is an SQLite database"),
        ("parquet", b"PAR1\x15\x04\x15\x10", "is a Parquet table"),
        ("nul", b"some text\0some more", "NUL at byte 9"),
        ("late", &late, &at),
        ("wide", &wide, "looks like UTF-16LE without a byte-order mark"),
        ("random", &random, "NUL at byte"),
        ("binary", &without_nul, "is not UTF-8"),
        ("latin1", &german, "the first at byte 0"),
        ("empty", b"", "is empty"),
        ("mark", b"\xef\xbb\xbf", "is empty"),
    ];
    for (name, bytes, part) in cases {
        std::fs::write(cli.path(name), bytes).unwrap();
        cli.fails(&["eval", "a.gguf", "-f", name, "-c", "64", "-q"], 1, &[name, part]);
    }
    std::fs::create_dir(cli.path("folder")).unwrap();
    cli.fails(&["eval", "a.gguf", "-f", "folder", "-q"], 1, &["folder", "is a directory"]);
    cli.fails(&["eval", "a.gguf", "--hellaswag", "zip", "-q"], 1, &["zip", "is a zip archive"]);
    for (name, part) in [("zip", "is a zip archive"), ("late", "NUL at byte"), ("folder", "directory")] {
        let args = ["a.gguf", "out.gguf", "--sparsity", "0.3", "-f", name];
        cli.fails(&[&args[..], &QUICK].concat(), 1, &["calibration", name, part]);
    }
}

#[test]
fn a_stray_byte_is_no_reason_to_refuse() {
    let cli = cli();
    let path = cli.path("t.txt");
    let line = [TEXT.as_bytes(), b"caf\xe9\n"].concat();
    // One invalid sequence in 4096 bytes is damage; one in every line is another encoding.
    let rest = (TEXT.to_owned() + "\n").repeat(5);
    std::fs::write(&path, [&line[..], rest.as_bytes()].concat()).unwrap();
    let text = TextFile::open(&path, None).unwrap().read().unwrap();
    assert!(text.contains("caf\u{fffd}\n"));
    std::fs::write(&path, line.repeat(20)).unwrap();
    match TextFile::open(&path, None) {
        Err(TextError::Invalid { n_invalid: 20, at, .. }) => assert_eq!(at as usize, TEXT.len() + 3),
        other => panic!("{other:?}"),
    }
}

/// The part of `eval` that reads the text.
fn eval(cli: &Cli, args: &[&str]) -> serde_json::Value {
    let common = ["eval", "a.gguf", "-c", "64", "-t", "1", "-q", "--json", "--no-speed"];
    let found: serde_json::Value = serde_json::from_str(&cli.ok(&[&common[..], args].concat())).unwrap();
    found["text"].clone()
}

#[test]
fn encodings_are_named_as_in_the_web() {
    let cli = cli();
    let text = (TEXT.to_owned() + "Über größere Flüsse führen schöne Brücken.\n").repeat(2);
    std::fs::write(cli.path("utf8.txt"), &text).unwrap();
    std::fs::write(cli.path("latin1.txt"), latin1(&text)).unwrap();
    let expected = eval(&cli, &["-f", "utf8.txt"]);
    assert_eq!(eval(&cli, &["-f", "latin1.txt", "--encoding", "latin1"]), expected);
    let prune = ["a.gguf", "out.gguf", "--sparsity", "0.3", "-f", "latin1.txt"];
    cli.fails(&[&prune[..], &QUICK].concat(), 1, &["latin1.txt", "is not UTF-8", "name its encoding"]);
    cli.ok(&[&prune[..], &["--encoding", "Windows-1252"], &QUICK].concat());
    for args in [&["eval", "a.gguf", "-f", "utf8.txt"][..], &prune] {
        cli.fails(&[args, &["--encoding", "klingon"]].concat(), 2, &["--encoding klingon", "windows-1252"]);
    }
}

#[test]
#[cfg(unix)]
fn pipes_are_read_like_files() {
    let cli = cli();
    // The text is longer than the part checked before the copy.
    let text = (TEXT.to_owned() + "\n").repeat(200);
    std::fs::write(cli.path("t.txt"), &text).unwrap();
    let expected = eval(&cli, &["-f", "t.txt", "--chunks", "3"]);
    let fifo = cli.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let writer = std::thread::spawn(move || std::fs::write(fifo, text).unwrap());
    assert_eq!(eval(&cli, &["-f", "fifo", "--chunks", "3"]), expected);
    writer.join().unwrap();
    for given in ["-f <(cat t.txt)", "-f /dev/stdin < t.txt", "-f /dev/stdin < <(cat t.txt)"] {
        let line = format!("\"$0\" eval a.gguf -c 64 -t 1 -q --json --no-speed --chunks 3 {given}");
        let out = Command::new("bash")
            .current_dir(cli.dir.path())
            .args(["-c", &line])
            .arg(env!("CARGO_BIN_EXE_putri-gguf"))
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{given}: {stderr}");
        let found: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(found["text"], expected, "{given}");
    }
    let line = "\"$0\" a.gguf out.gguf --sparsity 0.3 -c 64 --chunks 4 -t 1 -q -f <(cat t.txt)";
    let out = Command::new("bash")
        .current_dir(cli.dir.path())
        .args(["-c", line])
        .arg(env!("CARGO_BIN_EXE_putri-gguf"))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    // Endless input is rejected before the copy.
    cli.fails(&["eval", "a.gguf", "-f", "/dev/zero", "-q"], 1, &["/dev/zero", "NUL at byte 0"]);
}

/// Numbered lines of 51 bytes in ASCII.
fn numbered(n: usize) -> String {
    (0..n).map(|i| format!("Line {i:06} of a text that is numbered throughout.\n")).collect()
}

#[test]
fn windows_of_a_long_text_are_from_all_over_it_and_begin_with_lines() {
    const LINES: usize = 100_000;
    let cli = cli();
    let (model, path) = (model(&cli), cli.path("t.txt"));
    let text = numbered(LINES);
    let parts = [0, 30_000, 30_001, LINES].map(|line| line * text.len() / LINES);
    let of = |files: &[TextFile]| text_windows(&model, files, false, 64, 20, &mut |_| true).unwrap();
    let check = |windows: &[Vec<Token>], what: &str| {
        assert_eq!(windows.len(), 20, "{what}");
        for (i, w) in windows.iter().enumerate() {
            assert_eq!((w.len(), w[0]), (64, 1), "{what}");
            // The tokenizer adds a leading space, and writes spaces as U+2581.
            let found = model.vocab().detokenize(&w[1..]).replace('\u{2581}', " ");
            let number = found.trim_start().strip_prefix("Line ").map(|rest| rest[..6].parse::<usize>());
            let Some(Ok(number)) = number else { panic!("{what}: {found}") };
            assert!(number.abs_diff(i * LINES / 20) <= 3, "{what}: {number} in window {i}");
        }
    };
    for (label, bytes) in marked(&text) {
        std::fs::write(&path, bytes).unwrap();
        check(&of(&[TextFile::open(&path, None).unwrap()]), label);
    }
    std::fs::write(&path, &text).unwrap();
    check(&of(&[TextFile::open(&path, named("shift_jis")).unwrap()]), "shift_jis");
    // Several files are concatenated.
    let whole = of(&[TextFile::open(&path, None).unwrap()]);
    let files: Vec<TextFile> = parts
        .windows(2)
        .enumerate()
        .map(|(i, part)| {
            let path = cli.path(&format!("{i}.txt"));
            std::fs::write(&path, &text[part[0]..part[1]]).unwrap();
            TextFile::open(&path, None).unwrap()
        })
        .collect();
    assert_eq!(of(&files), whole);
}

#[test]
fn texts_are_scored_from_the_beginning_on() {
    let cli = cli();
    let model = model(&cli);
    let open = |name: &str, text: &str| {
        std::fs::write(cli.path(name), text).unwrap();
        TextFile::open(&cli.path(name), None).unwrap()
    };
    let of =
        |files: &[TextFile], protocol, n| windows(&model, files, protocol, 64, n, &mut |_, _| true).unwrap();
    // Short files are tokenised as one text, without the last newline for llama.cpp.
    let texts = [numbered(30), numbered(20)];
    let files = [open("a.txt", &texts[0]), open("b.txt", &texts[1])];
    let whole = texts.concat();
    for (protocol, text) in [(Protocol::Llama, whole.trim_end()), (Protocol::Hf, whole.as_str())] {
        let bos = (protocol == Protocol::Llama).then_some(1);
        let tokens: Vec<Token> =
            bos.into_iter().chain(model.vocab().tokenize(text, false).unwrap()).collect();
        let mut expected: Vec<Vec<Token>> = tokens.chunks_exact(64).map(<[Token]>::to_vec).collect();
        expected.iter_mut().for_each(|w| w[0] = bos.unwrap_or(w[0]));
        assert_eq!(of(&files, protocol, usize::MAX), expected);
    }
    // A long file is read only as far as needed.
    let long = [open("long.txt", &numbered(50_000))];
    let all = of(&long, Protocol::Llama, usize::MAX);
    // A space is three tokens of this tokenizer.
    assert!(all.len() * 64 > 50_000 * 60, "{}", all.len());
    assert_eq!(of(&long, Protocol::Llama, 5), all[..5]);
    let mut told = Vec::new();
    let some = windows(&model, &long, Protocol::Llama, 64, usize::MAX, &mut |done, total| {
        told.push((done, total));
        false
    });
    let some = some.unwrap();
    assert!(told.len() == 1 && told[0].0 <= PIECE as u64 && told[0].1 == long[0].n_bytes(), "{told:?}");
    assert!(some.len() < all.len() && some[..] == all[..some.len()]);
}

/// Runs the command and returns its peak memory.
#[cfg(target_os = "linux")]
fn peak_of(cli: &Cli, args: &[&str]) -> u64 {
    let mut child = Command::new(env!("CARGO_BIN_EXE_putri-gguf"))
        .current_dir(cli.dir.path())
        .args(args)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        if let Some(kib) = line.and_then(|l| l.trim().strip_suffix(" kB")) {
            peak = kib.trim().parse::<u64>().unwrap() << 10;
        }
        if let Some(ended) = child.try_wait().unwrap() {
            assert!(ended.success(), "{args:?}");
            return peak;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

#[test]
#[cfg(target_os = "linux")]
fn memory_does_not_grow_with_the_text() {
    let cli = cli();
    // As a whole, it takes over a gigabyte to tokenise.
    std::fs::write(cli.path("big.txt"), numbered(800_000)).unwrap();
    let eval =
        ["eval", "a.gguf", "-f", "big.txt", "-c", "64", "--chunks", "4", "-t", "1", "-q", "--no-speed"];
    let prune = ["a.gguf", "out.gguf", "--sparsity", "0.3", "-f", "big.txt", "--self-share", "0"];
    for args in [&eval[..], &[&prune[..], &QUICK].concat()] {
        let peak = peak_of(&cli, args);
        println!("{} MiB: {args:?}", peak >> 20);
        assert!(peak > 0 && peak < 400 << 20, "{} MiB: {args:?}", peak >> 20);
    }
}

#[test]
fn special_tokens_are_parsed_where_that_is_asked_for() {
    let cli = cli();
    let (model, path) = (model(&cli), cli.path("t.txt"));
    std::fs::write(&path, "somebody says this, and that was all.</s>\n".repeat(60)).unwrap();
    for parse_special in [false, true] {
        let recipe = Recipe {
            files: vec![path.clone()],
            parse_special,
            n_ctx: 64,
            n_windows: 6,
            self_share: 0.0,
            n_threads: 1,
            ..Recipe::default()
        };
        let mut notes = Vec::new();
        let found = collect(&model, &recipe, &mut notes, |_, _, _| true).unwrap();
        assert_eq!(found.tokens.contains(&2), parse_special);
        let noted = notes.len() == 1 && notes[0].contains("such as </s>,");
        assert!(if parse_special { notes.is_empty() } else { noted }, "{notes:?}");
    }
    let args = ["a.gguf", "out.gguf", "--sparsity", "0.3", "-f", "t.txt", "--parse-special"];
    cli.ok(&[&args[..], &QUICK].concat());
    // Ordinary text gets no note.
    std::fs::write(&path, TEXT.repeat(3)).unwrap();
    let recipe = Recipe { files: vec![path], n_ctx: 64, n_windows: 4, self_share: 0.0, ..Recipe::default() };
    let mut notes = Vec::new();
    collect(&model, &recipe, &mut notes, |_, _, _| true).unwrap();
    assert!(notes.is_empty(), "{notes:?}");
}

#[test]
fn a_model_without_a_start_token_writes_no_text() {
    let cli = cli();
    let file = GgufFile::open(&cli.path("a.gguf")).unwrap();
    let without = |names: &[&str]| {
        let kept = |key: &str| !names.iter().any(|n| key.ends_with(*n));
        rewrite(&file, &cli.path("in.gguf"), kept, None);
    };
    std::fs::write(cli.path("t.txt"), TEXT.repeat(3)).unwrap();
    let args = [&["in.gguf", "out.gguf", "--sparsity", "0.3", "--force"][..], &QUICK].concat();
    without(&["bos_token_id", "eos_token_id"]);
    cli.fails(&args, 1, &["names no start token"]);
    cli.fails(&[&args[..], &["-f", "t.txt"]].concat(), 1, &["names no start token"]);
    cli.ok(&[&args[..], &["-f", "t.txt", "--self-share", "0"]].concat());
    for one in ["bos_token_id", "eos_token_id"] {
        without(&[one]);
        cli.ok(&args);
    }
}
