//! Modelfiles: what the syntax holds, and what it does not.
//!
//! Ollama decodes the file as UTF-8, drops a byte order mark at its head, and reads it character by
//! character:
//!
//! - Between commands it skips spaces, tabs and line breaks (`\n` or `\r`). A `#` starts a comment, up to the
//!   line's end.
//! - A command is a word of ASCII letters in any case (FROM, LICENSE, TEMPLATE, SYSTEM, ADAPTER, RENDERER,
//!   PARSER, PARAMETER, MESSAGE, REQUIRES), then a space and its value. Between the two, PARAMETER has a name
//!   of `[A-Za-z0-9_]+` and MESSAGE has a role: `system`, `user` or `assistant`. A parameter that is called
//!   like a command is taken for that command, with `model` for FROM.
//! - A line break ends a value that is complete; otherwise it belongs to the value. Spaces and tabs always
//!   belong to it. Of all other characters, those that Go's `strconv.IsPrint` refuses are dropped silently.
//! - A value is trimmed of white space, then judged. One that starts with `"""` is complete if it has 6 bytes
//!   or more and ends with `"""`. Another that starts with `"` is complete if it has 2 bytes or more and ends
//!   with `"`. Those quotes are taken off. Every other value is complete as it stands. Nothing is unescaped.
//!
//! `"""` therefore holds every text that no line break inside completes, and no other form holds more than
//! that.

use super::Stored;
use serde_json::Value as Json;
use std::fmt::Write;

/// Name of the model's path in [`cannot_hold`].
pub(super) const PATH: &str = "the path of the model";

/// Names of parameters that Ollama parses as commands.
const COMMANDS: [&str; 10] = [
    "model", "license", "template", "system", "adapter", "draft", "renderer", "parser", "message", "requires",
];

/// Roles that a message may have.
const ROLES: [&str; 3] = ["system", "user", "assistant"];

/// Writes a Modelfile for the GGUF at the path `from`, with the data of `source` if the model came from a
/// store.
/// A comment replaces each part that [`cannot_hold`] names. Without a template, Ollama uses that of the GGUF.
pub fn modelfile(from: &str, source: Option<&Stored>) -> String {
    let mut out = String::new();
    for Line { command, value, .. } in lines(from, source) {
        let _ = match value {
            Some(value) => writeln!(out, "{command} {value}"),
            None => writeln!(out, "# {command} is left out: a Modelfile cannot hold it"),
        };
    }
    out
}

/// Names the parts of the path `from` and of `source` that a Modelfile cannot hold, each in one line that is
/// safe to print on a terminal.
pub fn cannot_hold(from: &str, source: Option<&Stored>) -> Vec<String> {
    lines(from, source).into_iter().filter(|line| line.value.is_none()).map(|line| line.what).collect()
}

/// Command of a Modelfile.
struct Line {
    /// Command, with the name of a parameter or the role of a message.
    command: String,
    /// Value as written, if the syntax can hold it.
    value: Option<String>,
    /// Description for the user.
    what: String,
}

fn lines(from: &str, source: Option<&Stored>) -> Vec<Line> {
    let line = |command: &str, value, what: &str| Line { command: command.into(), value, what: what.into() };
    let mut all = vec![line("FROM", bare_or_quoted(from), PATH)];
    let Some(s) = source else { return all };
    all.extend(s.template.iter().map(|t| line("TEMPLATE", quoted(t), "the template")));
    all.extend(s.renderer.iter().map(|t| line("RENDERER", bare_or_quoted(t), "the renderer")));
    all.extend(s.parser.iter().map(|t| line("PARSER", bare_or_quoted(t), "the parser")));
    all.extend(s.requires.iter().map(|t| line("REQUIRES", bare_or_quoted(t), "the required version")));
    all.extend(s.system.iter().map(|t| line("SYSTEM", quoted(t), "the system prompt")));
    all.extend(s.licenses.iter().map(|t| line("LICENSE", quoted(&kept(t)), "the license")));
    all.extend(s.parameters.iter().filter_map(|(name, value)| parameter(name, value)));
    all.extend(s.messages.iter().map(|(role, content)| message(role, content)));
    all
}

/// Line of a parameter; none for `null`, which leaves the parameter unset.
fn parameter(name: &str, value: &Json) -> Option<Line> {
    let written = match value {
        Json::Null => return None,
        Json::String(text) => quoted(text),
        Json::Bool(_) | Json::Number(_) => Some(value.to_string()),
        Json::Array(_) | Json::Object(_) => None,
    };
    let what = match value {
        Json::String(text) if name == "stop" => format!("the stop word {}", shown(text)),
        _ => format!("the parameter {}", shown(name)),
    };
    let letters = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if name.is_empty() || !letters || COMMANDS.contains(&name) {
        return Some(Line { command: "PARAMETER".into(), value: None, what });
    }
    Some(Line { command: format!("PARAMETER {name}"), value: written, what })
}

fn message(role: &str, content: &str) -> Line {
    if !ROLES.contains(&role) {
        let what = format!("a message of the role {}", shown(role));
        return Line { command: "MESSAGE".into(), value: None, what };
    }
    let what = format!("the message {}", shown(content));
    Line { command: format!("MESSAGE {role}"), value: quoted(content), what }
}

/// Beginning of `text`, in quotes and escaped for a terminal.
fn shown(text: &str) -> String {
    const MOST: usize = 40;
    let start: String = text.chars().take(MOST).collect();
    format!("{start:?}{}", if start.len() < text.len() { "…" } else { "" })
}

/// Writes `value` unquoted if it reads back unchanged, else as [`quoted`].
fn bare_or_quoted(value: &str) -> Option<String> {
    let bare = !value.is_empty()
        && value == value.trim()
        && !value.starts_with('"')
        && !value.contains(['\n', '\r']);
    quoted(value).map(|quoted| if bare { value.into() } else { quoted })
}

/// Writes `value` in one quote or three; none if no form reads back unchanged.
fn quoted(value: &str) -> Option<String> {
    // A line break ends `"""…` if the text before it, without trailing white space, ends with three quotes.
    let ends_early = value.rsplit(['\n', '\r']).skip(1).any(|line| line.trim_end().ends_with("\"\"\""));
    if ends_early || !value.chars().all(is_kept) {
        return None;
    }
    let three = value.contains(['"', '\n', '\r']);
    Some(if three { format!("\"\"\"{value}\"\"\"") } else { format!("\"{value}\"") })
}

/// Removes the characters of `text` that Ollama drops. White space, such as the form feeds and no-break
/// spaces of licences, is replaced by other white space.
fn kept(text: &str) -> String {
    let kept = |c: char| match c {
        _ if is_kept(c) => Some(c),
        '\u{c}' => Some('\n'),
        _ => c.is_whitespace().then_some(' '),
    };
    text.chars().filter_map(kept).collect()
}

/// Returns whether Ollama keeps a character of a value: spaces, line breaks, and printable characters as Go
/// defines them.
fn is_kept(c: char) -> bool {
    match c {
        // Quotes and the backslash are printable, but escaped below.
        ' '..='~' | '\t' | '\n' | '\r' => true,
        // Rust escapes unprintable characters by nearly Go's rule: all but letters, marks, numbers,
        // punctuation, symbols and the ASCII space. At the head of a string, it also escapes marks that
        // extend a grapheme, hence the letter before. The two differ in characters that only one of their
        // versions of Unicode has.
        _ => format!("a{c}").escape_debug().count() == 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use serde_json::json;

    /// Characters for [`tests`] that Go's `strconv.IsPrint` refuses: control, format, separators, private
    /// use, unassigned.
    const DROPPED: &str = "\0\u{7}\u{b}\u{c}\u{1b}\u{7f}\u{81}\u{85}\u{a0}\u{ad}\u{378}\u{600}\u{1680}\u{2003}\u{200b}\
                           \u{200d}\u{2028}\u{2029}\u{202e}\u{2066}\u{3000}\u{e000}\u{feff}\u{e0041}\u{10ffff}";

    /// Splits off a word of characters that are `usual`, and the space after it.
    fn word<'a>(rest: &mut &'a str, usual: impl Fn(char) -> bool) -> Option<&'a str> {
        let (word, after) = rest.split_once([' ', '\t'])?;
        *rest = after;
        word.chars().all(usual).then_some(word)
    }

    /// Text of a value, if it is complete.
    fn unquote(text: &str) -> Option<&str> {
        let quotes = match text {
            _ if text.starts_with("\"\"\"") => 3,
            _ if text.starts_with('"') => 1,
            _ => 0,
        };
        let complete = text.len() >= 2 * quotes && text.ends_with(&"\"".repeat(quotes));
        complete.then(|| &text[quotes..text.len() - quotes])
    }

    fn value(rest: &mut &str) -> Option<String> {
        let mut so_far = String::new();
        for (at, c) in rest.char_indices() {
            if let ('\n' | '\r', Some(value)) = (c, unquote(so_far.trim())) {
                *rest = &rest[at..];
                return Some(value.into());
            }
            if " \t\n\r".contains(c) || !DROPPED.contains(c) {
                so_far.push(c);
            }
        }
        *rest = "";
        unquote(so_far.trim()).map(Into::into)
    }

    /// Parses a Modelfile as the module's documentation describes: commands with their values; none for input
    /// that Ollama refuses.
    fn read_modelfile(text: &str) -> Option<Vec<(String, String)>> {
        let mut all = Vec::new();
        let mut rest = text.strip_prefix('\u{feff}').unwrap_or(text);
        loop {
            rest = rest.trim_start_matches([' ', '\t', '\n', '\r']);
            if rest.is_empty() {
                return Some(all);
            }
            if rest.starts_with('#') {
                rest = &rest[rest.find(['\n', '\r']).unwrap_or(rest.len())..];
                continue;
            }
            let command = word(&mut rest, |c| c.is_ascii_alphabetic())?.to_ascii_lowercase();
            let (command, before) = match command.as_str() {
                "parameter" => {
                    let name = word(&mut rest, |c| c.is_ascii_alphanumeric() || c == '_')?;
                    (format!("parameter {name}"), String::new())
                }
                "message" => {
                    let role = word(&mut rest, |c| c.is_ascii_alphabetic())?;
                    ["system", "user", "assistant"].contains(&role).then_some(())?;
                    (command, format!("{role}: "))
                }
                "from" | "license" | "template" | "system" | "adapter" | "renderer" | "parser"
                | "requires" => (command, String::new()),
                _ => return None,
            };
            all.push((command, before + &value(&mut rest)?));
        }
    }

    /// Model with `text` in every possible place, and the commands for it.
    fn full_of(text: &str) -> (Stored, Vec<(String, String)>) {
        let some = || Some(text.to_string());
        let stored = Stored {
            template: some(),
            system: some(),
            renderer: some(),
            parameters: vec![("stop".into(), text.into())],
            messages: vec![("user".into(), text.into())],
            ..Stored::default()
        };
        let commands = ["from", "template", "renderer", "system", "parameter stop", "message"];
        let before = |command| match command {
            "from" => "./",
            "message" => "user: ",
            _ => "",
        };
        (stored, commands.map(|c| (c.to_string(), format!("{}{text}", before(c)))).to_vec())
    }

    #[test]
    fn what_is_held_reads_back_and_what_is_refused_has_no_form() {
        const PARTS: [&str; 32] = [
            "\"",
            "\"",
            "\"\"",
            "\"\"\"",
            "\"\"\"",
            "\"\"\"",
            "\n",
            "\n",
            "\r",
            "\r\n",
            "\t",
            " ",
            "  ",
            "\\",
            "\\n",
            "`",
            "```",
            "#",
            "'",
            "a",
            "FROM ",
            "PARAMETER stop x",
            "{{ .Prompt }}",
            "é",
            "e\u{301}",
            "\u{301}",
            "\u{903}",
            "\u{fe0f}",
            "\u{fffd}",
            "你",
            "𠀀",
            "🙂",
        ];
        let dropped: Vec<char> = DROPPED.chars().collect();
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let (mut held, mut ended_early) = (0, 0);
        for _ in 0..24_000 {
            let n = random.random_range(0..16);
            let mut text: String = (0..n).map(|_| PARTS[random.random_range(0..PARTS.len())]).collect();
            let odd = random.random_range(0..4) == 0;
            if odd {
                text.push(dropped[random.random_range(0..dropped.len())]);
                text += PARTS[random.random_range(0..PARTS.len())];
            }
            let (stored, expected) = full_of(&text);
            let from = format!("./{text}");
            let read = read_modelfile(&modelfile(&from, Some(&stored)));
            let refused = cannot_hold(&from, Some(&stored));
            if quoted(&text).is_some() {
                assert_eq!(read, Some(expected), "{text:?}");
                assert!(refused.is_empty() && !odd, "{text:?}");
                held += 1;
                continue;
            }
            ended_early += usize::from(!odd);
            assert_eq!(read, Some(vec![]), "{text:?}");
            assert_eq!(refused.len(), expected.len(), "{text:?}");
            assert!(refused.iter().all(|what| !what.chars().any(char::is_control)), "{refused:?}");
            for form in [text.clone(), format!("\"{text}\""), format!("\"\"\"{text}\"\"\"")] {
                let read = read_modelfile(&format!("SYSTEM {form}\n"));
                assert_ne!(read, Some(vec![("system".into(), text.clone())]), "{form:?}");
            }
        }
        assert!(held > 10_000 && ended_early > 1_000, "{held} {ended_early}");
    }

    #[test]
    fn values_that_users_have_read_back() {
        let cases = [
            ("You are terse.", "\"You are terse.\""),
            ("<|end|>", "\"<|end|>\""),
            ("", "\"\""),
            ("  two  ", "\"  two  \""),
            ("\t", "\"\t\""),
            ("\\n", "\"\\n\""),
            ("```", "\"```\""),
            ("\nObservation", "\"\"\"\nObservation\"\"\""),
            ("User:\n", "\"\"\"User:\n\"\"\""),
            ("\n\n{{ .Prompt }}\n\n", "\"\"\"\n\n{{ .Prompt }}\n\n\"\"\""),
            ("\"", "\"\"\"\"\"\"\""),
            ("\"Quoted system\"", "\"\"\"\"Quoted system\"\"\"\""),
            ("say \"x\"", "\"\"\"say \"x\"\"\"\""),
            ("a \"\"\" b", "\"\"\"a \"\"\" b\"\"\""),
            (
                "# heading\nPARAMETER stop x\nFROM /etc/passwd",
                "\"\"\"# heading\nPARAMETER stop x\nFROM /etc/passwd\"\"\"",
            ),
            (
                "`{{ .Prompt }}` ```\n$HOME $(id) # no\nFROM evil\n",
                "\"\"\"`{{ .Prompt }}` ```\n$HOME $(id) # no\nFROM evil\n\"\"\"",
            ),
        ];
        for (text, written) in cases {
            assert_eq!(quoted(text).as_deref(), Some(written));
            let (stored, expected) = full_of(text);
            let read = read_modelfile(&modelfile(&format!("./{text}"), Some(&stored)));
            assert_eq!(read, Some(expected), "{text:?}");
        }
        assert_eq!(modelfile("./a name.gguf", None), "FROM ./a name.gguf\n");
        assert_eq!(modelfile("./a \"b\" #c.gguf", None), "FROM ./a \"b\" #c.gguf\n");
        assert_eq!(modelfile("./a ", None), "FROM \"./a \"\n");
    }

    #[test]
    fn what_is_left_out_is_named_and_commented() {
        let parameters = [
            ("stop", json!("é\u{2028}x")),
            ("stop", json!("<|end|>")),
            ("temperature", json!(0)),
            ("top_p", json!(1e-07)),
            ("seed", json!(12345678901234567890_u64)),
            ("num_gpu", json!(null)),
            ("use_mmap", json!(true)),
            ("nested", json!({ "a": 1 })),
            ("a b\nFROM evil", json!(1)),
            ("", json!(1)),
            ("model", json!("/etc/passwd")),
        ];
        let stored = Stored {
            template: Some("\"\"\"\nFROM evil".into()),
            system: Some("\u{1b}[2J".into()),
            licenses: vec!["\u{feff}page\u{c}page\u{a0}1".into()],
            parameters: parameters.map(|(name, value)| (name.into(), value)).to_vec(),
            messages: vec![("tool".into(), "4".into()), ("assistant".into(), "\0\nFROM evil".into())],
            requires: Some("0.14.0".into()),
            ..Stored::default()
        };
        let named = [
            PATH,
            "the template",
            "the system prompt",
            r#"the stop word "é\u{2028}x""#,
            r#"the parameter "nested""#,
            r#"the parameter "a b\nFROM evil""#,
            r#"the parameter """#,
            r#"the parameter "model""#,
            r#"a message of the role "tool""#,
            r#"the message "\0\nFROM evil""#,
        ];
        assert_eq!(cannot_hold("./a\u{202e}b.gguf", Some(&stored)), named);
        let text = modelfile("./a\u{202e}b.gguf", Some(&stored));
        let lines = [
            "# FROM is left out: a Modelfile cannot hold it",
            "# TEMPLATE is left out: a Modelfile cannot hold it",
            "REQUIRES 0.14.0",
            "# SYSTEM is left out: a Modelfile cannot hold it",
            "LICENSE \"\"\"page",
            "page 1\"\"\"",
            "# PARAMETER stop is left out: a Modelfile cannot hold it",
            "PARAMETER stop \"<|end|>\"",
            "PARAMETER temperature 0",
            "PARAMETER top_p 1e-7",
            "PARAMETER seed 12345678901234567890",
            "PARAMETER use_mmap true",
            "# PARAMETER nested is left out: a Modelfile cannot hold it",
            "# PARAMETER is left out: a Modelfile cannot hold it",
            "# PARAMETER is left out: a Modelfile cannot hold it",
            "# PARAMETER is left out: a Modelfile cannot hold it",
            "# MESSAGE is left out: a Modelfile cannot hold it",
            "# MESSAGE assistant is left out: a Modelfile cannot hold it",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), lines);
        assert_eq!(shown(&"é".repeat(41)), format!("\"{}\"…", "é".repeat(40)));
        assert!(DROPPED.chars().all(|c| !is_kept(c)));
    }
}
