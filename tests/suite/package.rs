//! Packages: folders for a device.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use putri_gguf::ggml::Type;
use putri_gguf::gguf::{GgufFile, OutTensor, Value, write_gguf};

const QUICK: [&str; 9] = ["--sparsity", "0.3", "--ctx-size", "64", "--chunks", "8", "--threads", "1", "-q"];

/// Model whose metadata names its makers and licence.
fn licensed(cli: &Cli) {
    let small = TestModel { ty: Type::Q8_0, blocks: vec![(4, 2, 256); 3], ..TestModel::default() };
    small.write(&cli.path("plain.gguf"));
    let file = GgufFile::open(&cli.path("plain.gguf")).unwrap();
    let mut metadata = file.metadata().to_vec();
    let said = [("license", "apache-2.0"), ("license.link", "LICENSE"), ("organization", "Makers")];
    metadata.extend(said.map(|(k, v)| (format!("general.{k}"), Value::Str(v.into()))));
    let tensors: Vec<OutTensor> = file.tensors().iter().map(|t| OutTensor::copy(&file, t)).collect();
    let path = cli.path("in.gguf");
    write_gguf(&mut std::fs::File::create(&path).unwrap(), &path, &metadata, &tensors).unwrap();
}

#[test]
fn a_package_is_whole_and_says_what_it_is() {
    let cli = Cli::new();
    licensed(&cli);
    cli.ok(&[&["in.gguf", "out.gguf", "--package", "device/"][..], &QUICK].concat());
    let read = |name: &str| std::fs::read_to_string(cli.path("device").join(name)).unwrap();
    let names: Vec<String> = cli
        .listing_of("device")
        .iter()
        .map(|(path, _)| path.file_name().unwrap().to_str().unwrap().to_string())
        .collect();
    let expected =
        ["Modelfile", "NOTICE.txt", "README.md", "SHA256SUMS", "out.gguf", "report.html", "report.json"];
    assert_eq!(names, expected);
    assert!(
        std::fs::read(cli.path("out.gguf")).unwrap() == std::fs::read(cli.path("device/out.gguf")).unwrap()
    );
    let sums = std::process::Command::new("sha256sum")
        .args(["--check", "--strict", "--quiet", "SHA256SUMS"])
        .current_dir(cli.path("device"))
        .status();
    assert!(sums.unwrap().success());
    assert_eq!(read("SHA256SUMS").lines().count(), names.len() - 1);
    assert_eq!(read("Modelfile"), "FROM ./out.gguf\n");
    let notice = read("NOTICE.txt");
    let source = GgufFile::open(&cli.path("in.gguf")).unwrap().sha256();
    for part in ["general.license: apache-2.0", "general.organization: Makers", &source, "putri-gguf removed"]
    {
        assert!(notice.replace(env!("CARGO_PKG_VERSION"), "").replace("  ", " ").contains(part), "{notice}");
    }
    let readme = read("README.md");
    for line in [
        "llama-cli -m out.gguf -c 256",
        "ollama create out -f Modelfile && ollama run out",
        "sha256sum -c SHA256SUMS",
        "| 256 | 0.1 MiB | 0.1 MiB |",
    ] {
        assert!(readme.contains(line), "{line} is not in\n{readme}");
    }
    assert!(!readme.contains("| 512 |"), "it was trained for 256 tokens:\n{readme}");
    assert!(notice.contains("general.name: Small Random\n"), "the makers did not prune it:\n{notice}");
}

#[test]
fn the_same_job_gives_the_same_bytes_elsewhere() {
    let (one, other) = (Cli::new(), Cli::new());
    licensed(&one);
    std::fs::copy(one.path("in.gguf"), other.path("in.gguf")).unwrap();
    one.ok(&[&["in.gguf", "out.gguf", "--package", "p"][..], &QUICK].concat());
    let input = other.path("in.gguf");
    let more = ["--max-memory", "2G", "--report", "r.html"];
    let args = [input.to_str().unwrap(), "out.gguf", "--package", "p"];
    other.ok(&[&args[..], &more, &QUICK].concat());
    for ((path, a), (_, b)) in one.listing_of("p").into_iter().zip(other.listing_of("p")) {
        assert!(a == b, "{} differs: {}", path.display(), String::from_utf8_lossy(&b));
    }
}

#[test]
fn only_a_package_makes_way_for_another() {
    let cli = Cli::new();
    licensed(&cli);
    let args =
        |extra: &[&'static str]| [&["in.gguf", "out.gguf", "--package", "p"][..], extra, &QUICK].concat();
    // An empty folder is accepted.
    std::fs::create_dir(cli.path("p")).unwrap();
    cli.ok(&args(&[]));
    cli.fails(
        &[&["in.gguf", "new.gguf", "--package", "p"][..], &QUICK].concat(),
        1,
        &["p exists", "--force"],
    );
    cli.ok(&args(&["--force"]));
    std::fs::write(cli.path("p/mine.txt"), "notes").unwrap();
    cli.fails(&args(&["--force"]), 1, &["no package"]);
    assert_eq!(std::fs::read(cli.path("p/mine.txt")).unwrap(), b"notes");
    cli.fails(&[&["in.gguf", "new.gguf", "--package", "no/p"][..], &QUICK].concat(), 1, &["No such file"]);
    // These files would be replaced, or lost, with the folder.
    let inside = |args: &[&str], part: &str| {
        cli.fails(&[args, &QUICK].concat(), 1, &[part, "no place in the package"]);
    };
    std::fs::remove_file(cli.path("p/mine.txt")).unwrap();
    inside(&["p/out.gguf", "new.gguf", "--package", "p", "--force"], "p/out.gguf");
    inside(&["in.gguf", "new/out.gguf", "--package", "new"], "new/out.gguf");
    inside(&["in.gguf", "new.gguf", "--package", "q", "--report", "q/r.json"], "q/r.json");
    inside(&["in.gguf", "README.md", "--package", "q"], "README.md");
    // A list of checksums alone does not make a folder a package.
    std::fs::create_dir(cli.path("models")).unwrap();
    std::fs::write(cli.path("models/a.gguf"), "weights").unwrap();
    std::fs::write(cli.path("models/SHA256SUMS"), "00  a.gguf\n").unwrap();
    let args = ["in.gguf", "new.gguf", "--package", "models", "--force"];
    cli.fails(&[&args[..], &QUICK].concat(), 1, &["no package"]);
    assert!(cli.path("models/a.gguf").exists());
    // Each of several results has its own folder.
    let several =
        ["in.gguf", "n.gguf", "--nested", "0.2,0.4", "--package", "q", "-q", "-c", "64", "--chunks", "8"];
    cli.ok(&several);
    assert!(cli.path("q-20/n-20.gguf").is_file() && cli.path("q-40/n-40.gguf").is_file());
    let left: Vec<_> =
        cli.listing().into_iter().filter(|(p, _)| p.to_string_lossy().contains(".part")).collect();
    assert!(left.is_empty(), "{left:?}");
}
