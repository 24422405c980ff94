//! Statements of the README, of the reference page and of the help texts.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use putri_gguf::ggml::Type;
use std::collections::BTreeSet;

const README: &str = include_str!("../../README.md");
const GUIDE: &str = include_str!("../../docs/guide.md");
const REFERENCE: &str = include_str!("../../docs/cli.md");

/// Long options in a text.
fn options(text: &str) -> BTreeSet<String> {
    let starts = text.match_indices("--").map(|(i, _)| &text[i + 2..]);
    let names =
        starts.map(|s| s.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect::<String>());
    names.filter(|n| n.len() > 1 && n.starts_with(|c: char| c.is_ascii_lowercase())).collect()
}

#[test]
fn commands_in_the_readme_run() {
    let cli = Cli::new();
    let small = TestModel { blocks: vec![(4, 2, 256); 3], ..TestModel::default() };
    TestModel { ty: Type::Q8_0, ..small.clone() }.write(&cli.path("in.gguf"));
    // The model is wide enough for types in blocks of 256.
    let blocks = vec![(4, 2, 1024); 3];
    TestModel { ty: Type::F16, n_embd: 256, head_dim: 64, blocks, ..small }.write(&cli.path("f16.gguf"));
    crate::common::mixture_models::MixtureModel::of("qwen3moe").write(&cli.path("moe.gguf"));
    for name in ["notes.txt", "other.txt", "code.txt"] {
        std::fs::write(cli.path(name), crate::common::TEXT.repeat(3)).unwrap();
    }
    let blocks = README.split("```sh\n").skip(1).map(|b| b.split("```").next().unwrap());
    let commands: Vec<&str> = blocks.flat_map(str::lines).filter(|l| l.starts_with("putri-gguf ")).collect();
    assert!(commands.len() >= 4, "{commands:?}");
    for command in commands {
        let args: Vec<&str> = command.split_whitespace().skip(1).take_while(|a| *a != "#").collect();
        // A small model has only 256 tokens of context.
        let more = match args[0] {
            "inspect" => &[][..],
            "eval" => &["-c", "64", "-q"],
            "verify" => &["-t", "1", "-q"],
            _ => &["-c", "64", "--chunks", "8", "-t", "1", "-q", "--force"],
        };
        // The figures are scaled to a model of several hundred MB.
        let size = if args.contains(&"--target-ram") { "1400K" } else { "200K" };
        let args: Vec<&str> = args.into_iter().map(|a| if a == "3.8G" { size } else { a }).collect();
        cli.ok(&[&args[..], more].concat());
    }
}

/// Long options that a command's help defines, without those that its paragraphs mention.
fn defined(cli: &Cli, command: &[&str]) -> BTreeSet<String> {
    let help = cli.ok(&[command, &["--help"]].concat());
    let lines = help.lines().filter(|l| l.starts_with("  -") || l.starts_with("      --"));
    lines.flat_map(options).collect()
}

#[test]
fn options_in_the_readme_and_the_guide_exist() {
    let cli = Cli::new();
    let commands: [&[&str]; 6] = [&[], &["inspect"], &["eval"], &["recover"], &["verify"], &["rpc-server"]];
    let known: BTreeSet<String> = commands.iter().flat_map(|command| defined(&cli, command)).collect();
    // Code that begins with an option shows an option of putri-gguf; options of other programs follow their
    // names.
    let spans = [README, GUIDE].into_iter().flat_map(|text| text.split('`')).filter(|s| s.starts_with('-'));
    let told: BTreeSet<String> = spans.flat_map(options).collect();
    assert!(!told.is_empty());
    assert!(told.is_subset(&known), "{:?}", told.difference(&known));
}

#[test]
fn the_reference_page_is_what_the_definitions_say() {
    let page = Cli::new().ok(&["reference"]);
    let differs = page.lines().zip(REFERENCE.lines()).find(|(new, old)| new != old);
    assert!(
        page == REFERENCE,
        "docs/cli.md is stale ({differs:?}); make it anew: putri-gguf reference > docs/cli.md"
    );
}

#[test]
fn the_reference_page_has_every_option_of_every_command() {
    let cli = Cli::new();
    let commands = ["inspect", "eval", "recover", "verify", "devices", "rpc-server", "completions", "man"];
    let section = |command: &str| {
        let start = format!("\n## {command}\n");
        let rest = REFERENCE.split_once(&start).unwrap_or_else(|| panic!("no {start}")).1;
        rest.split("\n## ").next().unwrap_or_default().to_string()
    };
    let everywhere = section("Options of every command");
    let none: &[&str] = &[];
    for command in std::iter::once(none).chain(commands.iter().map(std::slice::from_ref)) {
        let name = [&["putri-gguf"][..], command].concat().join(" ");
        let told = options(&(section(&name) + &everywhere));
        let untold: Vec<String> = defined(&cli, command).difference(&told).cloned().collect();
        assert!(untold.is_empty(), "{name}: {untold:?}");
    }
}

#[test]
fn the_short_help_is_one_screen_and_as_it_was() {
    let help = Cli::new().ok(&["-h"]);
    assert!(help.lines().count() <= 48 && help.lines().all(|l| l.len() <= 100), "{help}");
    assert_eq!(
        help,
        include_str!("../snapshots/help.txt"),
        "if it should differ, write it to tests/snapshots"
    );
}

#[test]
fn manual_and_completions_know_every_option() {
    let cli = Cli::new();
    let known = defined(&cli, &[]);
    let man = cli.ok(&["man"]).replace("\\-", "-");
    assert!(man.starts_with(".") || man.contains(".TH putri-gguf 1"), "{man}");
    let missing: Vec<&String> = known.iter().filter(|o| !man.contains(&format!("--{o}"))).collect();
    assert!(missing.is_empty(), "{missing:?}");
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let text = cli.ok(&["completions", shell]);
        let missing: Vec<&String> = known.iter().filter(|o| !text.contains(o.as_str())).collect();
        assert!(missing.is_empty(), "{shell}: {missing:?}");
    }
}
