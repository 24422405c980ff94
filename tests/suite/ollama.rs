//! Models of a local Ollama: found by name and digest, rejected with a reason, and carried over into a
//! Modelfile.
//! The store has Ollama's layout.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use putri_gguf::gguf::GgufFile;
use putri_gguf::ollama::{self, OllamaError, Stored, find};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::Path;

/// Puts a model without a config into the store in the folder `store`; layers are given by kind and content.
fn add(cli: &Cli, place: &str, layers: &[(&str, &[u8])]) {
    put(cli, place, None, layers);
}

/// Puts a model into that store, with the config as far as given.
fn put(cli: &Cli, place: &str, config: Option<&[u8]>, layers: &[(&str, &[u8])]) {
    let store = cli.path("store");
    std::fs::create_dir_all(store.join("blobs")).unwrap();
    let blob = |media_type: String, bytes: &[u8]| {
        let path = blob_of(cli, bytes);
        std::fs::write(&path, bytes).unwrap();
        let digest = path.file_name().unwrap().to_str().unwrap().replace('-', ":");
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    };
    let layers: Vec<Value> = layers
        .iter()
        .map(|(kind, bytes)| blob(format!("application/vnd.ollama.image.{kind}"), bytes))
        .collect();
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "layers": layers,
    });
    if let Some(config) = config {
        manifest["config"] = blob("application/vnd.docker.container.image.v1+json".into(), config);
    }
    let path = store.join("manifests").join(place);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, manifest.to_string()).unwrap();
}

/// Runs the command with that store.
fn run(cli: &Cli, args: &[&str]) -> (Option<i32>, String, String) {
    // The test's programs come first on the path.
    let path = format!("{}:{}", cli.path("bin").display(), std::env::var("PATH").unwrap());
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_putri-gguf"))
        .current_dir(cli.dir.path())
        .env("OLLAMA_MODELS", "store")
        .env("PATH", path)
        .args(args)
        .output()
        .unwrap();
    let [stdout, stderr] = [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned());
    (out.status.code(), stdout, stderr)
}

fn blob_of(cli: &Cli, bytes: &[u8]) -> std::path::PathBuf {
    let hex: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    cli.path("store/blobs").join(format!("sha256-{hex}"))
}

const QUICK: [&str; 9] = ["--sparsity", "0.3", "-c", "64", "--chunks", "8", "-t", "1", "-q"];

#[test]
fn a_model_of_the_store_is_pruned_and_its_words_carried_over() {
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 3], ..TestModel::default() }.write(&cli.path("plain.gguf"));
    let gguf = std::fs::read(cli.path("plain.gguf")).unwrap();
    let template = "{{ if .System }}<|system|>\n{{ .System }}{{ end }}\n{{ .Prompt }}";
    put(
        &cli,
        "registry.example/library/small/1b",
        Some(br#"{"model_format":"gguf","renderer":"qwen3-coder","parser":"qwen3-coder"}"#),
        &[
            ("model", &gguf),
            ("template", template.as_bytes()),
            ("system", b"You are terse."),
            ("license", b"Do as you like.\nKeep this."),
            ("params", br#"{"stop":["<|end|>","<|user|>"],"temperature":0.7,"num_ctx":64}"#),
        ],
    );
    let (code, said, stderr) =
        run(&cli, &[&["ollama:small:1b", "out.gguf", "--modelfile"][..], &QUICK].concat());
    assert_eq!(code, Some(0), "{said}{stderr}");
    // The result is the same as from the file itself, and the store is unchanged.
    let one = [&["plain.gguf", "same.gguf", "--modelfile"][..], &QUICK].concat();
    cli.ok(&one);
    let read = |name: &str| std::fs::read(cli.path(name)).unwrap();
    assert!(read("out.gguf") == read("same.gguf"));
    assert!(std::fs::read(blob_of(&cli, &gguf)).unwrap() == gguf);
    let modelfile = String::from_utf8(read("out.Modelfile")).unwrap();
    let expected = [
        "FROM ./out.gguf\n",
        &format!("TEMPLATE \"\"\"{template}\"\"\"\n"),
        "RENDERER qwen3-coder\nPARSER qwen3-coder\n",
        "SYSTEM \"You are terse.\"\n",
        "LICENSE \"\"\"Do as you like.\nKeep this.\"\"\"\n",
        "PARAMETER stop \"<|end|>\"\n",
        "PARAMETER stop \"<|user|>\"\n",
        "PARAMETER temperature 0.7\n",
        "PARAMETER num_ctx 64\n",
    ];
    for line in expected {
        assert!(modelfile.contains(line), "{line} is not in\n{modelfile}");
    }
    assert_eq!(read("same.Modelfile"), b"FROM ./same.gguf\n");
    let (code, said, _) = run(&cli, &["inspect", "ollama:small:1b"]);
    assert!(code == Some(0) && said.contains("Small Random"), "{said}");
    let verify = ["verify", "out.gguf", "--source", "ollama:small:1b", "-q", "-t", "1"];
    assert_eq!(run(&cli, &verify).0, Some(0));
    // The output exists already.
    let (code, _, stderr) =
        run(&cli, &[&["ollama:small:1b", "new.gguf", "--modelfile"][..], &QUICK].concat());
    assert_eq!(code, Some(0), "{stderr}");
    std::fs::remove_file(cli.path("new.gguf")).unwrap();
    let (code, _, stderr) =
        run(&cli, &[&["ollama:small:1b", "new.gguf", "--modelfile"][..], &QUICK].concat());
    assert!(code == Some(1) && stderr.contains("new.Modelfile exists"), "{stderr}");
    GgufFile::open(&cli.path("out.gguf")).unwrap();
}

#[test]
fn names_are_those_of_ollama() {
    let cli = Cli::new();
    TestModel::default().write(&cli.path("plain.gguf"));
    let gguf = std::fs::read(cli.path("plain.gguf")).unwrap();
    for place in
        ["registry.example/library/a/latest", "registry.example/user/b/q4", "hub.example/user/repo/Q4_K_M"]
    {
        add(&cli, place, &[("model", &gguf)]);
    }
    for name in ["a", "a:latest", "library/a", "user/b:q4", "registry.example/user/b:q4", "user/repo:Q4_K_M"]
    {
        let (code, _, stderr) = run(&cli, &["inspect", &format!("ollama:{name}")]);
        assert_eq!(code, Some(0), "{name}: {stderr}");
    }
    let refused = |name: &str, part: &str| {
        let (code, _, stderr) = run(&cli, &["inspect", &format!("ollama:{name}")]);
        let one = stderr.lines().count() == 1 && stderr.starts_with("error: ");
        assert!(code == Some(1) && one && stderr.contains(part), "{name}: {stderr}");
    };
    refused("b", "`ollama pull b`");
    refused("a:other", "is not in store");
    for bad in ["", "..", "a/../../b", "x/y/z/w", "/etc", "a:../../b", ".hidden"] {
        refused(bad, "is not the name of an Ollama model");
    }
    add(&cli, "other.example/library/a/latest", &[("model", &gguf)]);
    refused("a", "other.example, registry.example");
    add(&cli, "registry.example/library/cloud/latest", &[("license", b"none")]);
    refused("cloud", "runs in the cloud");
    add(&cli, "registry.example/library/tuned/latest", &[("model", &gguf), ("adapter", b"lora")]);
    refused("tuned", "a LoRA adapter");
    add(&cli, "registry.example/library/sees/latest", &[("model", &gguf), ("projector", b"clip")]);
    refused("sees", "a projector of images");
    let config = br#"{"model_format":"safetensors"}"#;
    put(&cli, "registry.example/library/tensors/latest", Some(config), &[("tensor", b"1"), ("json", b"{}")]);
    refused("tensors", "tensors is stored as safetensors, not GGUF; pull a GGUF of it");
    std::fs::write(cli.path("store/manifests/registry.example/user/b/q4"), "{").unwrap();
    refused("user/b:q4", "is no manifest");
    // The blob does not match its name.
    let blob = blob_of(&cli, &gguf);
    let mut damaged = gguf.clone();
    damaged[gguf.len() / 2] ^= 1;
    std::fs::write(&blob, damaged).unwrap();
    refused("user/repo:Q4_K_M", "does not have the digest");
    std::fs::remove_file(&blob).unwrap();
    refused("user/repo:Q4_K_M", "No such file");
    let (_, _, stderr) = run(&cli, &["inspect", "ollama:user/repo:Q4_K_M"]);
    assert_eq!(stderr.matches("No such file").count(), 1, "{stderr}");
    let nowhere = std::process::Command::new(env!("CARGO_BIN_EXE_putri-gguf"))
        .env("OLLAMA_MODELS", cli.path("nowhere"))
        .args(["inspect", "ollama:a"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("is not in"));
    assert!(!Path::new("nowhere").exists());
}

/// Puts a program `ollama` on the path of [`run`].
fn install(cli: &Cli, script: &str) {
    use std::os::unix::fs::PermissionsExt;
    let path = cli.path("bin/ollama");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, format!("#!/bin/sh\nset -e\n{script}")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// Does what `ollama create NAME -f MODELFILE` does to the store.
const CREATES: &str = r#"
[ "$1" = list ] && exit 0
[ "$1" = create ] && [ "$3" = -f ]
from=$(sed -n 's/^FROM //p' "$4")
sum=$(sha256sum "$from" | cut -d ' ' -f 1)
cp "$from" "store/blobs/sha256-$sum"
mkdir -p "store/manifests/registry.example/library/$2"
printf '{"layers":[{"mediaType":"application/vnd.ollama.image.model","digest":"sha256:%s"}]}' "$sum" \
    > "store/manifests/registry.example/library/$2/latest"
cp "$4" given.Modelfile
echo "success"
"#;

#[test]
fn a_model_is_made_in_ollama() {
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 3], ..TestModel::default() }.write(&cli.path("plain.gguf"));
    let gguf = std::fs::read(cli.path("plain.gguf")).unwrap();
    add(&cli, "registry.example/library/small/latest", &[("model", &gguf), ("system", b"You are terse.")]);
    install(&cli, CREATES);
    let args = ["ollama:small", "a name.gguf", "--ollama-create", "smaller"];
    let (code, said, stderr) = run(&cli, &[&args[..], &QUICK].concat());
    assert_eq!(code, Some(0), "{stderr}");
    // Output for programs is the same as without it.
    assert_eq!(said.lines().last(), Some("a name.gguf"));
    let given = std::fs::read_to_string(cli.path("given.Modelfile")).unwrap();
    assert!(given.contains("SYSTEM \"You are terse.\"\n"), "{given}");
    assert!(!cli.path("a name.Modelfile").exists());
    let verify = ["verify", "a name.gguf", "--source", "ollama:small", "-q", "-t", "1"];
    assert_eq!(run(&cli, &verify).0, Some(0));
    let pruned = std::fs::read(cli.path("a name.gguf")).unwrap();
    assert!(std::fs::read(blob_of(&cli, &pruned)).unwrap() == pruned);
    assert_eq!(run(&cli, &["inspect", "ollama:smaller"]).0, Some(0));
}

#[test]
fn what_ollama_cannot_do_is_said() {
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 3], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let refused_with = |expected: i32, input: &str, name: &str, part: &str| {
        let (code, _, stderr) =
            run(&cli, &[&[input, "out.gguf", "--ollama-create", name][..], &QUICK].concat());
        let errors = stderr.lines().filter(|line| line.starts_with("error: ")).count();
        assert!(code == Some(expected) && errors == 1 && stderr.contains(part), "{code:?} {stderr}");
    };
    let refused = |name: &str, part: &str| refused_with(1, "in.gguf", name, part);
    // The path contains no program of this name, if this machine has none.
    if std::process::Command::new("ollama").arg("--version").output().is_err() {
        refused("m", "cannot run `ollama`");
    }
    install(&cli, CREATES);
    for bad in ["a/b/c/d", "a b", "x:y z", "m/-f"] {
        refused(bad, "is not the name of an Ollama model");
    }
    let gguf = std::fs::read(cli.path("in.gguf")).unwrap();
    let layers: [(&str, &[u8]); 2] = [("model", &gguf), ("params", br#"{"stop":["a","\u0007"]}"#)];
    add(&cli, "registry.example/library/odd/latest", &layers);
    refused_with(1, "ollama:odd", "m", r#"a Modelfile cannot hold the stop word "\u{7}": it has no escapes"#);
    assert!(!cli.path("out.gguf").exists(), "refused after the work");
    install(&cli, "echo 'could not connect' >&2\nexit 1\n");
    refused("m", "`ollama list` said: could not connect");
    assert!(!cli.path("out.gguf").exists(), "refused after the work");
    install(&cli, "[ \"$1\" = list ] && exit 0\necho working >&2\necho 'Error: no server' >&2\nexit 1\n");
    refused_with(4, "in.gguf", "m", "the model is written, but `ollama create m` failed: Error: no server");
    assert!(cli.path("out.gguf").exists());
}

/// Model `name` of the store.
fn found(cli: &Cli, name: &str) -> Result<Stored, OllamaError> {
    find(&cli.path("store"), name)
}

const GGUF: (&str, &[u8]) = ("model", b"GGUF");

#[test]
fn all_that_a_model_says_is_carried_over() {
    let cli = Cli::new();
    let add = |name: &str, config: Value, layers: &[(&str, &[u8])]| {
        let place = format!("registry.ollama.ai/library/{name}/latest");
        put(&cli, &place, Some(config.to_string().as_bytes()), &[&[GGUF][..], layers].concat());
        found(&cli, name).unwrap()
    };
    let carried = |stored: &Stored| {
        assert_eq!(ollama::cannot_hold("./m", Some(stored)), [""; 0]);
        ollama::modelfile("./m", Some(stored)).strip_prefix("FROM ./m\n").unwrap().to_string()
    };
    let config = json!({ "renderer": "qwen3-coder", "parser": "qwen3", "requires": "0.14.0", "os": "linux" });
    let stored = add("renderer", config, &[("template", b"{{ .Prompt }}")]);
    let lines = "TEMPLATE \"{{ .Prompt }}\"\nRENDERER qwen3-coder\nPARSER qwen3\nREQUIRES 0.14.0\n";
    assert_eq!((carried(&stored).as_str(), &stored.notes[..]), (lines, &[][..]));

    let said = json!([
        { "role": "user", "content": "hi" },
        { "role": "assistant", "content": "hello \"you\"\nagain" },
    ]);
    let stored = add("messages", json!({}), &[("messages", said.to_string().as_bytes())]);
    let lines = "MESSAGE user \"hi\"\nMESSAGE assistant \"\"\"hello \"you\"\nagain\"\"\"\n";
    assert_eq!((carried(&stored).as_str(), &stored.notes[..]), (lines, &[][..]));
    let said = json!([{ "role": "user", "content": "see", "images": ["AA=="] }]).to_string();
    let stored = add("images", json!({}), &[("messages", said.as_bytes())]);
    assert!(stored.notes.len() == 1 && stored.notes[0].contains("not images"), "{:?}", stored.notes);

    let stored = add("prompt", json!({}), &[("prompt", b"{{ .System }} {{ .Prompt }}")]);
    assert_eq!(carried(&stored), "TEMPLATE \"{{ .System }} {{ .Prompt }}\"\n");
    let stored = add("latin1lic", json!({}), &[("license", b"Copyright \xa9 2023 M\xfcller\x92s")]);
    assert_eq!(carried(&stored), "LICENSE \"Copyright © 2023 Müller’s\"\n");
    let stored = add("emptysys", json!({}), &[("system", b""), ("template", b"")]);
    assert_eq!(carried(&stored), "TEMPLATE \"\"\nSYSTEM \"\"\n");

    let params =
        br#"{"mirostat":2,"num_gpu":null,"rope_frequency_base":1000000.0,"seed":12345678901234567890,
        "stop":"single","temperature":0,"top_p":1e-07,"use_mmap":true}"#;
    let stored = add("oddparams", json!({}), &[("params", params)]);
    // Tests are built with a serde_json that keeps numbers as they are written.
    let mut lines: Vec<String> = carried(&stored).lines().map(|l| l.replace("1e-07", "1e-7")).collect();
    lines.sort();
    let expected = [
        "PARAMETER mirostat 2",
        "PARAMETER rope_frequency_base 1000000.0",
        "PARAMETER seed 12345678901234567890",
        "PARAMETER stop \"single\"",
        "PARAMETER temperature 0",
        "PARAMETER top_p 1e-7",
        "PARAMETER use_mmap true",
    ];
    assert_eq!(lines, expected);

    // Unknown kinds of layers are reported once each.
    let stored = add("draft", json!({}), &[("draft", b"GGUF2"), ("draft", b"GGUF3"), ("n\u{1b}ew", b"")]);
    let kinds = stored.notes.iter().map(|note| note.contains("of the kind \"draft\" is not carried over"));
    assert_eq!(kinds.collect::<Vec<_>>(), [true, false]);
    assert!(stored.notes[1].contains(r#""n\u{1b}ew""#), "{:?}", stored.notes);
}

#[test]
fn what_of_a_model_cannot_be_read_is_said() {
    let cli = Cli::new();
    let refused = |config: Option<&[u8]>, layers: &[(&str, &[u8])], part: &str| {
        put(&cli, "registry.ollama.ai/library/m/latest", config, layers);
        let said = found(&cli, "m").unwrap_err().to_string();
        assert!(said.contains(part) && !said.contains('\n'), "{said}");
    };
    refused(Some(b"{"), &[GGUF], "is the model's config, but no JSON");
    refused(Some(b"[]"), &[GGUF], "is the model's config, but no JSON object");
    refused(Some(br#"{"renderer":1}"#), &[GGUF], "its renderer is no text");
    refused(Some(br#"{"model_format":"gguf"}"#), &[], "lists no GGUF");
    refused(Some(br#"{"remote_host":"https://ollama.com:443","remote_model":"x"}"#), &[], "in the cloud");
    refused(None, &[("tensor", b"1")], "is stored as safetensors");
    refused(Some(br#"{"model_format":"safetensors"}"#), &[GGUF], "is stored as safetensors");
    refused(None, &[GGUF, ("model", b"GGUFxxxx")], "a second GGUF");
    refused(None, &[GGUF, ("system", b"\xff")], "is no text");
    refused(None, &[GGUF, ("params", b"not json")], "is no JSON object of parameters");
    refused(None, &[GGUF, ("messages", b"{}")], "is no JSON list of messages");
    refused(None, &[GGUF, ("messages", br#"[{"content":"x"}]"#)], "is no JSON list of messages");
    put(&cli, "registry.ollama.ai/library/m/latest", Some(b"{\"a\":0}"), &[GGUF]);
    found(&cli, "m").unwrap();
    std::fs::remove_file(blob_of(&cli, b"{\"a\":0}")).unwrap();
    let said = found(&cli, "m").unwrap_err().to_string();
    assert!(
        said.contains("but is the model's config") && said.matches("No such file").count() == 1,
        "{said}"
    );
}

#[test]
fn names_match_without_regard_to_case() {
    let cli = Cli::new();
    // Each name includes its host.
    let add = |place: &str| add(&cli, place, &[GGUF, ("system", place.as_bytes())]);
    let is_at = |name: &str, place: &str| {
        let system = found(&cli, name).unwrap_or_else(|e| panic!("{name}: {e}")).system;
        assert_eq!(system.as_deref(), Some(place), "{name}");
    };
    let repo = "hf.co/bartowski/SmolLM2-135M-Instruct-GGUF/Q4_K_M";
    add(repo);
    is_at("hf.co/bartowski/SmolLM2-135M-Instruct-GGUF:Q4_K_M", repo);
    is_at("HF.co/Bartowski/smollm2-135m-instruct-gguf:q4_k_m", repo);
    is_at("bartowski/smollm2-135m-instruct-gguf:Q4_k_m", repo);
    // Ollama's registry is preferred to other hosts.
    for host in ["hf.co", "other.example"] {
        add(&format!("{host}/library/both/latest"));
    }
    let said = found(&cli, "both").unwrap_err().to_string();
    assert!(said.ends_with("name one of them: hf.co, other.example"), "{said}");
    add("registry.ollama.ai/library/both/latest");
    is_at("both", "registry.ollama.ai/library/both/latest");
    is_at("Library/BOTH:Latest", "registry.ollama.ai/library/both/latest");
    is_at("hf.co/library/both", "hf.co/library/both/latest");
    // The exact name is preferred, if the file system distinguishes both.
    for model in ["Twice", "twice"] {
        add(&format!("hf.co/library/{model}/latest"));
    }
    if std::fs::read_dir(cli.path("store/manifests/hf.co/library")).unwrap().count() == 3 {
        is_at("twice", "hf.co/library/twice/latest");
        is_at("hf.co/library/Twice", "hf.co/library/Twice/latest");
        let said = found(&cli, "TWICE").unwrap_err().to_string();
        assert!(said.ends_with("them: hf.co/library/Twice:latest, hf.co/library/twice:latest"), "{said}");
    }
}

#[test]
fn what_a_modelfile_cannot_hold_is_refused_before_any_work() {
    let odd =
        Stored { template: Some("\"\"\"\n".into()), system: Some("\u{200d}".into()), ..Stored::default() };
    let refused = |model: &Path, source: Option<&Stored>| match ollama::can_create("m", model, source) {
        Err(e @ OllamaError::Unholdable { .. }) => e.to_string(),
        other => panic!("{other:?}"),
    };
    let said = refused(Path::new("out.gguf"), Some(&odd));
    assert!(said.starts_with("a Modelfile cannot hold the template, the system prompt: "), "{said}");
    assert!(said.ends_with("set it with Ollama's API (POST /api/create)"), "{said}");
    let bell = refused(Path::new("a\u{7}b.gguf"), None);
    assert!(bell.contains("the path of the model") && bell.ends_with("choose another output path"), "{bell}");
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        assert_eq!(refused(Path::new(std::ffi::OsStr::from_bytes(b"a\xff.gguf")), None), bell);
    }
    let bad = ollama::can_create("a b", Path::new("out.gguf"), Some(&odd));
    assert!(matches!(bad, Err(OllamaError::Name(_))), "{bad:?}");
}
