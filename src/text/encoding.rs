//! Text encodings, and the search for the beginnings of characters.

use std::fmt;

/// Text encoding named by the user.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Encoding(Kind);

impl Encoding {
    /// Encoding for a label of the WHATWG Encoding Standard, such as `windows-1252`, `latin1`, `shift_jis` or
    /// `gb18030`; also UTF-32, which the standard omits.
    pub fn for_label(label: &str) -> Option<Encoding> {
        let kind = match label.trim().to_ascii_lowercase().as_str() {
            "utf-32" | "utf32" | "utf-32le" | "utf32le" => Kind::Utf32(Order::Little),
            "utf-32be" | "utf32be" => Kind::Utf32(Order::Big),
            label => {
                let found = encoding_rs::Encoding::for_label_no_replacement(label.as_bytes())?;
                if found == encoding_rs::UTF_8 {
                    Kind::Utf8
                } else if found == encoding_rs::UTF_16LE {
                    Kind::Utf16(Order::Little)
                } else if found == encoding_rs::UTF_16BE {
                    Kind::Utf16(Order::Big)
                } else {
                    Kind::Legacy(found)
                }
            }
        };
        Some(Encoding(kind))
    }

    /// Name of the encoding.
    pub fn name(self) -> &'static str {
        self.0.name()
    }
}

impl fmt::Debug for Encoding {
    /// Writes the name: a checkpoint folder compares settings by this text and shows it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Little,
    Big,
}

/// Rule by which bytes become characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Utf8,
    Utf16(Order),
    Utf32(Order),
    Legacy(&'static encoding_rs::Encoding),
}

impl From<Encoding> for Kind {
    fn from(encoding: Encoding) -> Kind {
        encoding.0
    }
}

impl Kind {
    /// Encoding of the byte-order mark at the beginning of `head`, and the number of bytes of the mark.
    pub(super) fn of_mark(head: &[u8]) -> Option<(Kind, usize)> {
        // The mark of UTF-32LE begins with that of UTF-16LE.
        let marks: [(&[u8], Kind); 5] = [
            (b"\xff\xfe\0\0", Kind::Utf32(Order::Little)),
            (b"\0\0\xfe\xff", Kind::Utf32(Order::Big)),
            (b"\xef\xbb\xbf", Kind::Utf8),
            (b"\xff\xfe", Kind::Utf16(Order::Little)),
            (b"\xfe\xff", Kind::Utf16(Order::Big)),
        ];
        let found = marks.into_iter().find(|(mark, _)| head.starts_with(mark));
        found.map(|(mark, kind)| (kind, mark.len()))
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Utf8 => "UTF-8",
            Kind::Utf16(Order::Little) => "UTF-16LE",
            Kind::Utf16(Order::Big) => "UTF-16BE",
            Kind::Utf32(Order::Little) => "UTF-32LE",
            Kind::Utf32(Order::Big) => "UTF-32BE",
            Kind::Legacy(encoding) => encoding.name(),
        }
    }

    /// Number of bytes of a code unit.
    pub(super) fn unit(self) -> usize {
        match self {
            Kind::Utf8 | Kind::Legacy(_) => 1,
            Kind::Utf16(_) => 2,
            Kind::Utf32(_) => 4,
        }
    }

    /// Returns whether bytes at any position show where the next character begins.
    pub(super) fn shows_starts(self) -> bool {
        match self {
            Kind::Utf8 | Kind::Utf16(_) | Kind::Utf32(_) => true,
            Kind::Legacy(encoding) => encoding.is_single_byte(),
        }
    }

    /// First index from `i` on at which a character begins in `bytes`, which begin at byte `at` of a text;
    /// the end of `bytes` if there is none.
    pub(super) fn next_start(self, bytes: &[u8], at: u64, i: usize) -> usize {
        let unit = self.unit();
        let aligned = i + (unit - (at as usize % unit + i) % unit) % unit;
        let place = match self {
            Kind::Utf8 => {
                // A character has at most three continuation bytes.
                let rest = bytes.iter().skip(i).take(3).take_while(|b| **b & 0xc0 == 0x80);
                i + rest.count()
            }
            Kind::Utf16(order) => match bytes.get(aligned..aligned + 2) {
                Some(&[a, b]) if is_low_surrogate(order, [a, b]) => aligned + 2,
                _ => aligned,
            },
            Kind::Utf32(_) | Kind::Legacy(_) => aligned,
        };
        place.min(bytes.len())
    }

    /// Index after the last newline in `bytes`, which begin with a character.
    pub(super) fn after_last_newline(self, bytes: &[u8]) -> Option<usize> {
        // In all legacy encodings, a newline is one byte that is part of no other character.
        let unit = self.unit();
        let newline: &[u8] = match self {
            Kind::Utf8 | Kind::Legacy(_) => b"\n",
            Kind::Utf16(Order::Little) => b"\n\0",
            Kind::Utf16(Order::Big) => b"\0\n",
            Kind::Utf32(Order::Little) => b"\n\0\0\0",
            Kind::Utf32(Order::Big) => b"\0\0\0\n",
        };
        bytes.chunks_exact(unit).rposition(|part| part == newline).map(|i| (i + 1) * unit)
    }
}

fn is_low_surrogate(order: Order, bytes: [u8; 2]) -> bool {
    let value = match order {
        Order::Little => u16::from_le_bytes(bytes),
        Order::Big => u16::from_be_bytes(bytes),
    };
    (0xdc00..0xe000).contains(&value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_those_of_the_web() {
        let name = |label| Encoding::for_label(label).map(Encoding::name);
        assert_eq!(name(" Latin1 "), Some("windows-1252"));
        assert_eq!(name("utf-8"), Some("UTF-8"));
        assert_eq!(name("UTF-16"), Some("UTF-16LE"));
        assert_eq!(name("utf-32be"), Some("UTF-32BE"));
        assert_eq!(name("sjis"), Some("Shift_JIS"));
        assert_eq!(name("klingon"), None);
        // The standard lists it as an encoding that is not decoded.
        assert_eq!(name("iso-2022-kr"), None);
    }

    #[test]
    fn the_longer_mark_counts() {
        assert_eq!(Kind::of_mark(b"\xff\xfe\0\0a\0\0\0"), Some((Kind::Utf32(Order::Little), 4)));
        assert_eq!(Kind::of_mark(b"\xff\xfea\0"), Some((Kind::Utf16(Order::Little), 2)));
        assert_eq!(Kind::of_mark(b"text"), None);
    }
}
