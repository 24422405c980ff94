//! Sanitising of untrusted strings (names, keys, paths) in output.

use std::fmt::Write;

/// Converts `text` to one line for a terminal.
/// Characters that move the cursor, change colours, end lines, reorder letters or are invisible become
/// `\u{…}`.
pub fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || is_invisible(c) {
            let _ = write!(out, "{}", c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    out
}

/// Returns whether `c` is a zero-width character, a mark of direction, a separator of lines or paragraphs, or
/// a tag.
fn is_invisible(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Converts `text` to one line of plain words in Markdown, with all markup escaped.
pub(crate) fn markdown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in plain(text).chars() {
        // A backslash may precede every punctuation character of ASCII (CommonMark, 2.4).
        if c.is_ascii_punctuation() && !".,-:/()%_'".contains(c) || c == '_' {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// Converts `text` to one word for a POSIX shell: in single quotes unless it is plain.
pub fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./=:@%+,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.into();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_are_left_alone() {
        assert_eq!(plain("\u{1b}[31mRed\n\u{202e}x"), "\\u{1b}[31mRed\\u{a}\\u{202e}x");
        assert_eq!(plain("größe 模型 🙂"), "größe 模型 🙂");
    }

    #[test]
    fn nothing_is_markup() {
        assert_eq!(markdown("<b>a_b</b> `x` | #1 [y](z)"), r"\<b\>a\_b\</b\> \`x\` \| \#1 \[y\](z)");
        assert_eq!(markdown("SmolLM2-135M (25%)"), "SmolLM2-135M (25%)");
    }

    #[test]
    fn shells_read_one_word() {
        for text in ["plain-1.gguf", "a b", "it's", "$(id)", "", "a\nb", "-x", "日本"] {
            let out = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", shell_word(text))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8_lossy(&out.stdout), text);
        }
    }
}
