//! Models of a local Ollama: found by name and digest, refused with a reason, and carried over into a Modelfile. The store
//! is laid out as Ollama lays it out.

mod common;

use common::cli::Cli;
use common::small::Small;
use putri_gguf::gguf::GgufFile;
use sha2::{Digest, Sha256};
use std::path::Path;

/// A store in the folder `store`; layers of a model are given by kind and content.
fn add(cli: &Cli, place: &str, layers: &[(&str, &[u8])]) {
    let store = cli.path("store");
    std::fs::create_dir_all(store.join("blobs")).unwrap();
    let layers: Vec<serde_json::Value> = layers
        .iter()
        .map(|(kind, bytes)| {
            let hex: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
            std::fs::write(store.join("blobs").join(format!("sha256-{hex}")), bytes).unwrap();
            serde_json::json!({
                "mediaType": format!("application/vnd.ollama.image.{kind}"),
                "digest": format!("sha256:{hex}"),
                "size": bytes.len(),
            })
        })
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "layers": layers,
    });
    let path = store.join("manifests").join(place);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, manifest.to_string()).unwrap();
}

/// Runs the command with that store.
fn run(cli: &Cli, args: &[&str]) -> (Option<i32>, String, String) {
    // What the test put there comes first.
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
    Small { blocks: vec![(4, 2, 256); 3], ..Small::default() }.write(&cli.path("plain.gguf"));
    let gguf = std::fs::read(cli.path("plain.gguf")).unwrap();
    let template = "{{ if .System }}<|system|>\n{{ .System }}{{ end }}\n{{ .Prompt }}";
    add(
        &cli,
        "registry.example/library/small/1b",
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
    // The same as from the file itself, and the store as it was.
    let one = [&["plain.gguf", "same.gguf", "--modelfile"][..], &QUICK].concat();
    cli.ok(&one);
    let read = |name: &str| std::fs::read(cli.path(name)).unwrap();
    assert!(read("out.gguf") == read("same.gguf"));
    assert!(std::fs::read(blob_of(&cli, &gguf)).unwrap() == gguf);
    let modelfile = String::from_utf8(read("out.Modelfile")).unwrap();
    let expected = [
        "FROM ./out.gguf\n",
        &format!("TEMPLATE \"\"\"{template}\"\"\"\n"),
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
    // There already.
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
    Small::default().write(&cli.path("plain.gguf"));
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
    std::fs::write(cli.path("store/manifests/registry.example/user/b/q4"), "{").unwrap();
    refused("user/b:q4", "is no manifest");
    // A blob that is not what its name says.
    let blob = blob_of(&cli, &gguf);
    let mut damaged = gguf.clone();
    damaged[gguf.len() / 2] ^= 1;
    std::fs::write(&blob, damaged).unwrap();
    refused("user/repo:Q4_K_M", "does not have the digest");
    std::fs::remove_file(&blob).unwrap();
    refused("user/repo:Q4_K_M", "No such file");
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
    Small { blocks: vec![(4, 2, 256); 3], ..Small::default() }.write(&cli.path("plain.gguf"));
    let gguf = std::fs::read(cli.path("plain.gguf")).unwrap();
    add(&cli, "registry.example/library/small/latest", &[("model", &gguf), ("system", b"You are terse.")]);
    install(&cli, CREATES);
    let args = ["ollama:small", "a name.gguf", "--ollama-create", "smaller"];
    let (code, said, stderr) = run(&cli, &[&args[..], &QUICK].concat());
    assert_eq!(code, Some(0), "{stderr}");
    // What is to be read by a program stays as it is without.
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
    Small { blocks: vec![(4, 2, 256); 3], ..Small::default() }.write(&cli.path("in.gguf"));
    let refused = |name: &str, part: &str| {
        let (code, _, stderr) =
            run(&cli, &[&["in.gguf", "out.gguf", "--ollama-create", name][..], &QUICK].concat());
        let one = stderr.lines().count() == 1 && stderr.starts_with("error: ");
        assert!(code == Some(1) && one && stderr.contains(part), "{stderr}");
    };
    // Nothing on the path that is called so, if this machine has none.
    if std::process::Command::new("ollama").arg("--version").output().is_err() {
        refused("m", "cannot run `ollama`");
    }
    install(&cli, CREATES);
    for bad in ["a/b/c/d", "a b", "x:y z", "m/-f"] {
        refused(bad, "is not the name of an Ollama model");
    }
    install(&cli, "echo 'could not connect' >&2\nexit 1\n");
    refused("m", "`ollama list` said: could not connect");
    assert!(!cli.path("out.gguf").exists(), "refused after the work");
    install(&cli, "[ \"$1\" = list ] && exit 0\necho working >&2\necho 'Error: no server' >&2\nexit 1\n");
    refused("m", "the model is written, but `ollama create m` failed: Error: no server");
    assert!(cli.path("out.gguf").exists());
}
