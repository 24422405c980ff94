//! What the README and the help promise.

mod common;

use common::cli::Cli;
use common::small::Small;
use putri_gguf::ggml::Type;
use std::collections::BTreeSet;

const README: &str = include_str!("../README.md");

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
    let small = Small { blocks: vec![(4, 2, 256); 3], ..Small::default() };
    Small { ty: Type::Q8_0, ..small.clone() }.write(&cli.path("in.gguf"));
    // Wide enough for types in blocks of 256.
    let blocks = vec![(4, 2, 1024); 3];
    Small { ty: Type::F16, n_embd: 256, head_dim: 64, blocks, ..small }.write(&cli.path("f16.gguf"));
    for name in ["notes.txt", "other.txt"] {
        std::fs::write(cli.path(name), common::TEXT.repeat(3)).unwrap();
    }
    let blocks = README.split("```sh\n").skip(1).map(|b| b.split("```").next().unwrap());
    let commands: Vec<&str> = blocks.flat_map(str::lines).filter(|l| l.starts_with("putri-gguf ")).collect();
    assert!(commands.len() >= 4, "{commands:?}");
    for command in commands {
        let args: Vec<&str> = command.split_whitespace().skip(1).take_while(|a| *a != "#").collect();
        // A small model knows only 256 tokens of context.
        let more = match args[0] {
            "inspect" => &[][..],
            "eval" => &["-c", "64", "-q"],
            "verify" => &["-t", "1", "-q"],
            _ => &["-c", "64", "--chunks", "8", "-t", "1", "-q", "--force"],
        };
        // As if it were a model of several hundred MB.
        let size = if args.contains(&"--target-ram") { "1400K" } else { "200K" };
        let args: Vec<&str> = args.into_iter().map(|a| if a == "3.8G" { size } else { a }).collect();
        cli.ok(&[&args[..], more].concat());
    }
}

#[test]
fn options_in_the_readme_exist_and_all_that_exist_are_there() {
    let cli = Cli::new();
    let help = cli.ok(&["--help"]);
    let known: BTreeSet<String> =
        options(&(help.clone() + &cli.ok(&["eval", "--help"]) + &cli.ok(&["verify", "--help"])));
    let table: String = README.lines().filter(|l| l.starts_with("| `--") || l.starts_with("| `-")).collect();
    let told = options(&table);
    assert!(told.is_subset(&known), "{:?}", told.difference(&known));
    let untold: Vec<&String> = known.iter().filter(|o| !README.contains(&format!("--{o}"))).collect();
    assert!(untold.is_empty(), "{untold:?}");
}

#[test]
fn the_short_help_is_one_screen_and_as_it_was() {
    let help = Cli::new().ok(&["-h"]);
    assert!(help.lines().count() <= 48 && help.lines().all(|l| l.len() <= 100), "{help}");
    assert_eq!(help, include_str!("snapshots/help.txt"), "if it should differ, write it to tests/snapshots");
}

#[test]
fn manual_and_completions_know_every_option() {
    let cli = Cli::new();
    let known = options(&cli.ok(&["--help"]));
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
