//! Generator of the reference page, docs/cli.md, from the definitions of the arguments.

use super::{BESIDE, INTERRUPTED, MISSED};
use clap::builder::StyledStr;
use clap::{Arg, Command};

/// Markdown page of the commands below `root`, their options, and the exit codes.
pub fn reference(mut root: Command) -> String {
    // Fills in names, usages, defaults and global options.
    root.build();
    let mut page = vec!["# Command line".to_string(), NOTE.to_string()];
    command(&mut page, &mut root);
    root.get_subcommands_mut().filter(|c| !c.is_hide_set()).for_each(|c| command(&mut page, c));
    page.push("## Options of every command".into());
    root.get_arguments().filter(|arg| arg.is_global_set()).for_each(|arg| option(&mut page, arg));
    page.extend(HELP.map(String::from));
    page.push("## Exit codes".into());
    page.push(exit_codes());
    page.join("\n\n") + "\n"
}

const NOTE: &str = "<!-- Made by `putri-gguf reference > docs/cli.md` from src/cli/args. Do not edit. -->";

/// Options that clap adds to every command, and to the first one.
const HELP: [&str; 4] = [
    "#### `-h, --help`",
    "`-h` prints a short help, `--help` prints all that this page says of the command.",
    "#### `-V, --version`",
    "Prints the version, the engine's version, its backends and the CPU features it was built for. \
     Goes with no command.",
];

/// Writes the section of one command.
fn command(page: &mut Vec<String>, command: &mut Command) {
    let usage = command.render_usage().to_string();
    let usage: Vec<&str> = usage.trim_start_matches("Usage:").lines().map(str::trim).collect();
    page.push(format!("## {}", command.get_bin_name().unwrap_or(command.get_name())));
    page.extend(paragraphs(command.get_long_about().or(command.get_about())));
    page.push(format!("```text\n{}\n```", usage.join("\n")));
    if let Some(examples) = command.get_after_help() {
        let examples = examples.to_string();
        let lines: Vec<&str> = examples.lines().skip(1).map(str::trim).collect();
        page.push(format!("```sh\n{}\n```", lines.join("\n")));
    }
    let commands: Vec<String> = command.get_subcommands().filter(|c| !c.is_hide_set()).map(row).collect();
    if !commands.is_empty() {
        page.push("### Commands".into());
        page.push(format!("| Command | What it does |\n|---|---|\n{}", commands.join("\n")));
    }
    let args: Vec<&Arg> = command.get_arguments().filter(|arg| is_its_own(arg)).collect();
    let mut headings: Vec<&str> = Vec::new();
    for arg in &args {
        if !headings.contains(&heading(arg)) {
            headings.push(heading(arg));
        }
    }
    for name in headings {
        page.push(format!("### {name}"));
        args.iter().filter(|arg| heading(arg) == name).for_each(|arg| option(page, arg));
    }
}

/// Row of a command in the table of commands.
fn row(command: &Command) -> String {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let anchor = command.get_bin_name().unwrap_or_default().replace(' ', "-");
    format!("| [`{}`](#{anchor}) | {} |", command.get_name(), markdown(&about))
}

/// Returns whether an argument is listed with its command, and not with all commands.
fn is_its_own(arg: &Arg) -> bool {
    let by_clap = ["help", "version"].contains(&arg.get_id().as_str());
    !arg.is_hide_set() && !arg.is_global_set() && !by_clap
}

/// Heading of an argument.
fn heading(arg: &Arg) -> &str {
    if arg.is_positional() { "Arguments" } else { arg.get_help_heading().unwrap_or("Options") }
}

/// Writes the entry of one option or argument.
fn option(page: &mut Vec<String>, arg: &Arg) {
    page.push(format!("#### `{}`", signature(arg)));
    page.extend(paragraphs(arg.get_long_help().or(arg.get_help())));
    let values = arg.get_possible_values().into_iter().filter(|value| !value.is_hide_set());
    let values: Vec<String> = values
        .map(|value| match value.get_help() {
            Some(help) => format!("- `{}`: {}", value.get_name(), sentence(&help.to_string())),
            None => format!("- `{}`", value.get_name()),
        })
        .collect();
    if !values.is_empty() {
        page.push(values.join("\n"));
    }
    let defaults: Vec<String> =
        arg.get_default_values().iter().map(|value| format!("`{}`", value.to_string_lossy())).collect();
    if arg.get_action().takes_values() && !defaults.is_empty() {
        page.push(format!("Default: {}.", defaults.join(", ")));
    }
}

/// Names and values of an argument, as in `-t, --threads <N>`.
fn signature(arg: &Arg) -> String {
    let names =
        [arg.get_short().map(|name| format!("-{name}")), arg.get_long().map(|name| format!("--{name}"))];
    let names = names.into_iter().flatten().collect::<Vec<_>>().join(", ");
    let values = arg.get_value_names().filter(|_| arg.get_action().takes_values()).unwrap_or_default();
    let values: Vec<String> = values.iter().map(|name| format!("<{name}>")).collect();
    [names, values.join(" ")].join(" ").trim().to_string()
}

/// Paragraphs of a help text, each made of whole sentences.
fn paragraphs(text: Option<&StyledStr>) -> Vec<String> {
    let text = text.map(ToString::to_string).unwrap_or_default();
    text.split("\n\n").filter(|part| !part.is_empty()).map(sentence).collect()
}

/// Markdown of a text, with a full stop if it lacks one.
fn sentence(text: &str) -> String {
    let text = text.trim();
    markdown(text) + if text.ends_with('.') { "" } else { "." }
}

/// Markdown of a text: options become code, and all other markup is escaped.
fn markdown(text: &str) -> String {
    let word = |word: &str| {
        let (before, rest) = word.split_at(word.find(|c: char| c != '(').unwrap_or(0));
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '-').unwrap_or(rest.len());
        if rest.starts_with('-') && end > 1 {
            format!("{before}`{}`{}", &rest[..end], &rest[end..])
        } else {
            word.replace('<', "\\<")
        }
    };
    text.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

/// Table of exit codes.
fn exit_codes() -> String {
    let rows = [
        (0, "Done: the model is written and verified (with --no-verify: written)"),
        (
            1,
            "Failed: one line on stderr says why; nothing is written, but for what --nested had finished. Of \
             verify: something is wrong with the file",
        ),
        (2, "Usage error: the arguments make no sense"),
        (MISSED, "No sparsity meets --max-kld or --max-ppl-ratio; nothing is written"),
        (
            BESIDE,
            "The model is written and verified, but something else that was asked for is missing: report, \
             Modelfile, package, Ollama model or summary",
        ),
        (
            INTERRUPTED,
            "Interrupted by Ctrl-C, SIGTERM or SIGHUP: the first one stops after the current step, the second at \
             once; nothing is written, but the --state-dir is kept. A signal that was ignored at the start, as by \
             nohup, stays ignored",
        ),
    ];
    let rows = rows.map(|(code, meaning)| format!("| {code} | {} |", markdown(meaning)));
    format!("| Code | Meaning |\n|---|---|\n{}", rows.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_code_and_nothing_else_is_markup() {
        assert_eq!(
            markdown("see (--file), -ngl or <|im_end|> - not x-y"),
            "see (`--file`), `-ngl` or \\<|im_end|> - not x-y"
        );
        assert_eq!(sentence("Number of threads"), "Number of threads.");
    }
}
