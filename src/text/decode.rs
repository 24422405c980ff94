//! Decoding of bytes to characters.

use super::encoding::{Kind, Order};
use super::{TextError, TextFile};

/// Smallest number of bytes per invalid sequence that passes for damage, such as a stray byte of a text
/// pasted together.
const BYTES_PER_STRAY: usize = 4096;

/// Share of NULs, in percent, from which bytes without a mark look like 16-bit or 32-bit units.
const NUL_PERCENT: usize = 20;

/// Reason why bytes are not text.
pub(super) enum Fault {
    Nul { at: usize, looks_like: Option<&'static str> },
    Invalid { at: usize, n_invalid: usize, n_bytes: usize },
}

impl Fault {
    /// Error for a fault in bytes that begin at byte `from` of `text`; it counts from the beginning of the
    /// file.
    pub(super) fn at(self, text: &TextFile, from: u64) -> TextError {
        let (path, from) = (text.path.clone(), text.n_mark + from);
        match self {
            Fault::Nul { at, looks_like } => TextError::Nul { path, at: from + at as u64, looks_like },
            Fault::Invalid { at, n_invalid, n_bytes } => TextError::Invalid {
                path,
                encoding: text.kind.name(),
                at: from + at as u64,
                n_invalid,
                n_bytes,
            },
        }
    }
}

/// Decodes `bytes`, with U+FFFD for each stray invalid sequence.
pub(super) fn decode(kind: Kind, bytes: &[u8]) -> Result<String, Fault> {
    let mut out = Decoded { text: String::with_capacity(bytes.len() + 16), n_invalid: 0, first: 0 };
    if kind.unit() == 1
        && let Some(at) = bytes.iter().position(|b| *b == 0)
    {
        return Err(Fault::Nul { at, looks_like: wide(bytes) });
    }
    match kind {
        Kind::Utf8 => out.utf8(bytes),
        Kind::Utf16(order) => out.utf16(bytes, order),
        Kind::Utf32(order) => out.utf32(bytes, order),
        Kind::Legacy(encoding) => out.legacy(bytes, encoding),
    }
    if kind.unit() > 1 && out.text.contains('\0') {
        let unit = kind.unit();
        let at = bytes.chunks_exact(unit).position(|part| part.iter().all(|b| *b == 0)).unwrap_or(0) * unit;
        return Err(Fault::Nul { at, looks_like: None });
    }
    if out.n_invalid > (bytes.len() / BYTES_PER_STRAY).max(1) {
        return Err(Fault::Invalid { at: out.first, n_invalid: out.n_invalid, n_bytes: bytes.len() });
    }
    Ok(out.text)
}

/// Decoded text so far.
struct Decoded {
    text: String,
    n_invalid: usize,
    /// Index of the first byte of the first invalid sequence.
    first: usize,
}

impl Decoded {
    fn invalid(&mut self, at: usize) {
        if self.n_invalid == 0 {
            self.first = at;
        }
        self.n_invalid += 1;
        self.text.push(char::REPLACEMENT_CHARACTER);
    }

    fn utf8(&mut self, bytes: &[u8]) {
        let mut at = 0;
        for chunk in bytes.utf8_chunks() {
            self.text.push_str(chunk.valid());
            at += chunk.valid().len();
            if !chunk.invalid().is_empty() {
                self.invalid(at);
                at += chunk.invalid().len();
            }
        }
    }

    fn utf16(&mut self, bytes: &[u8], order: Order) {
        let (pairs, rest) = bytes.as_chunks::<2>();
        let units = pairs.iter().map(|pair| match order {
            Order::Little => u16::from_le_bytes(*pair),
            Order::Big => u16::from_be_bytes(*pair),
        });
        let mut at = 0;
        for c in char::decode_utf16(units) {
            match c {
                Ok(c) => {
                    self.text.push(c);
                    at += 2 * c.len_utf16();
                }
                Err(_) => {
                    self.invalid(at);
                    at += 2;
                }
            }
        }
        if !rest.is_empty() {
            self.invalid(at);
        }
    }

    fn utf32(&mut self, bytes: &[u8], order: Order) {
        let (units, rest) = bytes.as_chunks::<4>();
        for (i, unit) in units.iter().enumerate() {
            let value = match order {
                Order::Little => u32::from_le_bytes(*unit),
                Order::Big => u32::from_be_bytes(*unit),
            };
            match char::from_u32(value) {
                Some(c) => self.text.push(c),
                None => self.invalid(4 * i),
            }
        }
        if !rest.is_empty() {
            self.invalid(4 * units.len());
        }
    }

    fn legacy(&mut self, bytes: &[u8], encoding: &'static encoding_rs::Encoding) {
        use encoding_rs::DecoderResult;
        let mut decoder = encoding.new_decoder_without_bom_handling();
        let mut read = 0;
        loop {
            let rest = &bytes[read..];
            // An estimate is enough: the next call decodes the rest.
            self.text.reserve(rest.len() + 16);
            let (result, n) = decoder.decode_to_string_without_replacement(rest, &mut self.text, true);
            read += n;
            match result {
                DecoderResult::InputEmpty => return,
                DecoderResult::OutputFull => {}
                DecoderResult::Malformed(len, behind) => {
                    self.invalid(read.saturating_sub(usize::from(len) + usize::from(behind)));
                }
            }
        }
    }
}

/// Encoding of 16-bit or 32-bit units that has its NULs where `bytes` has them, if most are at one position
/// of the units.
fn wide(bytes: &[u8]) -> Option<&'static str> {
    let mut nuls = [0usize; 4];
    bytes.iter().enumerate().filter(|(_, b)| **b == 0).for_each(|(i, _)| nuls[i % 4] += 1);
    let n: usize = nuls.iter().sum();
    if 100 * n < NUL_PERCENT * bytes.len() {
        return None;
    }
    let most_at = |places: &[usize]| 10 * places.iter().map(|i| nuls[*i]).sum::<usize>() >= 9 * n;
    let all_of = |places: &[usize]| places.iter().all(|i| 10 * nuls[*i] >= 9 * (bytes.len() / 4));
    if most_at(&[1, 3]) {
        Some("UTF-16LE")
    } else if most_at(&[0, 2]) {
        Some("UTF-16BE")
    } else if most_at(&[1, 2, 3]) && all_of(&[2, 3]) {
        Some("UTF-32LE")
    } else if most_at(&[0, 1, 2]) && all_of(&[0, 1]) {
        Some("UTF-32BE")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stray_byte_is_replaced_and_many_are_refused() {
        let text = decode(Kind::Utf8, b"caf\xe9 au lait");
        assert_eq!(text.ok().as_deref(), Some("caf\u{fffd} au lait"));
        match decode(Kind::Utf8, b"caf\xe9 au lait, \xe0 la carte") {
            Err(Fault::Invalid { at: 3, n_invalid: 2, n_bytes: 24 }) => {}
            _ => panic!("two in so few bytes are no damage"),
        }
    }

    #[test]
    fn wide_units_without_a_mark_are_seen() {
        let text = "Plain English, and Füße.\n";
        let le: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let be: Vec<u8> = text.encode_utf16().flat_map(u16::to_be_bytes).collect();
        let le32: Vec<u8> = text.chars().flat_map(|c| u32::from(c).to_le_bytes()).collect();
        let be32: Vec<u8> = text.chars().flat_map(|c| u32::from(c).to_be_bytes()).collect();
        let found = [&le, &be, &le32, &be32].map(|bytes| wide(bytes));
        assert_eq!(found, [Some("UTF-16LE"), Some("UTF-16BE"), Some("UTF-32LE"), Some("UTF-32BE")]);
        assert_eq!(wide(b"text\0text"), None);
    }
}
