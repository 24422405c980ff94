//! File formats that are mistaken for text, by their first bytes.

/// First bytes and name of each format. First bytes that are letters count only before binary data.
const FORMATS: &[(&[u8], &str)] = &[
    (b"GGUF", "a GGUF model"),
    (b"PK\x03\x04", "a zip archive, as .docx, .odt and .epub are too"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\x04\x22\x4d\x18", "an lz4 archive"),
    (b"BZh", "a bzip2 archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (PDF, "a PDF document"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"RIFF", "a RIFF file (audio, video or WebP)"),
    (b"OggS", "an Ogg file"),
    (b"fLaC", "a FLAC file"),
    (b"ID3", "an MP3 file"),
    (b"\x7fELF", "an ELF program"),
    (b"MZ", "a Windows program"),
    (b"\xcf\xfa\xed\xfe", "a macOS program"),
    (b"\0asm", "a WebAssembly program"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"PAR1", "a Parquet table"),
    (b"ARROW1", "an Arrow table"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
];

/// First bytes of a PDF, which may hold only letters and still is not text.
const PDF: &[u8] = b"%PDF-";

/// Offset and bytes of the magic of a tar archive.
const TAR: (usize, &[u8]) = (257, b"ustar");

/// Format of a file with this beginning, if it is one of the known formats.
pub(super) fn format(head: &[u8]) -> Option<&'static str> {
    let binary = head.iter().any(|b| is_binary(*b));
    if binary && head.get(TAR.0..).is_some_and(|rest| rest.starts_with(TAR.1)) {
        return Some("a tar archive");
    }
    let found = FORMATS.iter().find(|(magic, _)| head.starts_with(magic));
    found.filter(|(magic, _)| binary || *magic == PDF).map(|(_, what)| *what)
}

/// Returns whether text never contains this byte. Texts contain tabs, line and page ends, and the escape of
/// terminals and ISO-2022.
fn is_binary(byte: u8) -> bool {
    byte < b' ' && !matches!(byte, b'\t' | b'\n' | b'\r' | 0x0c | 0x1b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_known_and_texts_about_them_are_not() {
        assert_eq!(format(b"GGUF\x03\0\0\0"), Some("a GGUF model"));
        assert_eq!(format(b"%PDF-1.7\n%text"), Some("a PDF document"));
        assert_eq!(format(&[&[b'a'; 257][..], b"ustar\0"].concat()), Some("a tar archive"));
        for text in ["GGUF is a format", "MZ stands for Mark Zbikowski", "RIFF\n", "PAR1", "a"] {
            assert_eq!(format(text.as_bytes()), None, "{text}");
        }
    }
}
