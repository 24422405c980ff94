//! Text files in any encoding, read in parts, so that a file of any size takes bounded memory.
//!
//! The encoding is UTF-8, or that of the byte-order mark, or one that the user names. Files that are not text
//! are rejected: calibration on the bytes of an archive would remove the wrong neurons unnoticed.

mod decode;
mod encoding;
mod known;

pub use encoding::Encoding;

use crate::spill::without_path;
use encoding::Kind;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Largest number of bytes of a piece, and of a text that is tokenised as a whole.
pub const PIECE: usize = 2 << 20;

/// Number of bytes at the beginning of a file that are checked when it is opened.
const HEAD: usize = 64 << 10;

/// Largest number of bytes that an excerpt may read beyond its end to complete a character.
const REST: usize = 4;

/// Error of reading a file as text.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The system cannot read the file.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A pipe, which can be read only once, cannot be copied.
    #[error("cannot copy the text of a pipe to {}", folder.display())]
    Copy {
        /// The folder of temporary files.
        folder: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The path is a directory.
    #[error("{}: is a directory; name the text files in it", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
    },
    /// The file is empty.
    #[error("{}: is empty; give a file with text in it", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The file begins like one of another format.
    #[error("{}: is {what}, not text; give its text as a plain file in UTF-8", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format.
        what: &'static str,
    },
    /// A line of a file of conversations is none.
    #[error("{}: line {line} is no conversation ({problem}); each line is {{\"messages\": [{{\"role\": …, \"content\": …}}]}}", path.display())]
    Conversation {
        /// The file.
        path: PathBuf,
        /// Number of the line, counted from 1.
        line: usize,
        /// Fault of the line.
        problem: String,
    },
    /// The file contains a NUL character.
    #[error("{}: is not text: NUL at byte {at}{}; {}", path.display(), seen(*looks_like), remedy(*looks_like))]
    Nul {
        /// The file.
        path: PathBuf,
        /// Index of the byte, counted from 0.
        at: u64,
        /// The encoding of 16 or 32 bits that has its NULs where this file has them.
        looks_like: Option<&'static str>,
    },
    /// More bytes are invalid in the encoding than damage explains.
    #[error(
        "{}: is not {encoding}: {n_invalid} invalid sequences in {n_bytes} bytes, the first at byte {at}; save it as UTF-8, or name its encoding, such as windows-1252",
        path.display()
    )]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The encoding.
        encoding: &'static str,
        /// Index of the first invalid sequence in bytes, counted from 0.
        at: u64,
        /// Number of invalid sequences.
        n_invalid: usize,
        /// Number of checked bytes.
        n_bytes: usize,
    },
}

fn seen(looks_like: Option<&str>) -> String {
    looks_like.map_or(String::new(), |name| format!(" (it looks like {name} without a byte-order mark)"))
}

fn remedy(looks_like: Option<&str>) -> &'static str {
    match looks_like {
        Some(_) => "save it as UTF-8, or name its encoding",
        None => "give a plain text file in UTF-8",
    }
}

/// Text file whose beginning was checked.
#[derive(Debug)]
pub struct TextFile {
    path: PathBuf,
    /// Copy of a source that can be read only once, such as a pipe. A regular file is opened for each read,
    /// so that any number of files can be given.
    copy: Option<File>,
    kind: Kind,
    /// Number of bytes of the byte-order mark.
    n_mark: u64,
    /// Number of bytes of the text, without the mark.
    n_bytes: u64,
}

impl TextFile {
    /// Opens `path` and checks its beginning.
    /// Without a byte-order mark, it is in `encoding`, or else in UTF-8. A pipe is copied into a temporary
    /// file.
    ///
    /// # Errors
    /// [`TextError`] if it cannot be read or is not text.
    pub fn open(path: &Path, encoding: Option<Encoding>) -> Result<TextFile, TextError> {
        let io = |source| TextError::Io { path: path.into(), source };
        if path.is_dir() {
            return Err(TextError::Directory { path: path.into() });
        }
        let mut file = File::open(path).map_err(io)?;
        let status = file.metadata().map_err(io)?;
        let mut head = Vec::new();
        Read::by_ref(&mut file).take(HEAD as u64).read_to_end(&mut head).map_err(io)?;
        if head.is_empty() {
            return Err(TextError::Empty { path: path.into() });
        }
        let (kind, n_mark) = match Kind::of_mark(&head) {
            Some((kind, n_mark)) => (kind, n_mark),
            None => {
                check_format(path, &head)?;
                (encoding.map_or(Kind::Utf8, Kind::from), 0)
            }
        };
        if n_mark == head.len() {
            return Err(TextError::Empty { path: path.into() });
        }
        let mut text = TextFile {
            path: path.into(),
            copy: None,
            kind,
            n_mark: n_mark as u64,
            n_bytes: status.len().saturating_sub(n_mark as u64),
        };
        // The format is checked before any copy, because binary data may be endless. Files of /proc are
        // regular and report no bytes.
        let from_pipe = !status.is_file() || status.len() < head.len() as u64;
        let whole = head.len() < HEAD;
        text.decode(&head[n_mark..text.head_end(&head, whole)], 0)?;
        if from_pipe {
            let (copy, n_bytes) = copied(&head, &mut file)?;
            text.copy = Some(copy);
            text.n_bytes = n_bytes.saturating_sub(n_mark as u64);
        }
        Ok(text)
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of bytes of the text as stored, without a byte-order mark.
    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Characters that begin in the `n_bytes` bytes from byte `from` on.
    /// Adjacent excerpts have no character in common and omit none. If the encoding does not show where
    /// characters begin, the excerpt consists of whole lines if more than one line begins in it, else of the
    /// bytes as they are.
    ///
    /// # Errors
    /// [`TextError`] if the file cannot be read or this part of it is not text.
    pub fn excerpt(&self, from: u64, n_bytes: usize) -> Result<String, TextError> {
        let bytes = self.bytes(from, n_bytes + REST)?;
        let ends = from + bytes.len() as u64 >= self.n_bytes;
        let (start, end) = if self.kind.shows_starts() {
            let start = if from == 0 { 0 } else { self.kind.next_start(&bytes, from, 0) };
            let end = n_bytes.min(bytes.len());
            (start, self.kind.next_start(&bytes, from, end).max(start))
        } else {
            let end = n_bytes.min(bytes.len());
            let lines = &bytes[..end];
            let newline = |b: &u8| *b == b'\n';
            let start = if from == 0 { Some(0) } else { lines.iter().position(newline).map(|i| i + 1) };
            let last = if ends && end == bytes.len() {
                Some(end)
            } else {
                lines.iter().rposition(newline).map(|i| i + 1)
            };
            match (start, last) {
                (Some(start), Some(last)) if start < last => (start, last),
                (start, _) => (start.filter(|start| *start < end).unwrap_or(0), end),
            }
        };
        self.decode(&bytes[start..end], from + start as u64)
    }

    /// Whole text in pieces of at most `most` bytes that end after a newline if there is one.
    ///
    /// # Panics
    /// If `most` is below 4, the largest number of bytes of a character.
    pub fn pieces(&self, most: usize) -> Pieces<'_> {
        assert!(most >= 4);
        Pieces { text: self, most, at: 0 }
    }

    /// Reads the whole text.
    ///
    /// # Errors
    /// [`TextError`] if it cannot be read or is not text.
    pub fn read(&self) -> Result<String, TextError> {
        self.pieces(PIECE).collect()
    }

    /// Reads up to `n` bytes of the text from byte `from` on.
    fn bytes(&self, from: u64, n: usize) -> Result<Vec<u8>, TextError> {
        let n = (n as u64).min(self.n_bytes.saturating_sub(from));
        let read = |mut file: &File| -> std::io::Result<Vec<u8>> {
            let mut bytes = Vec::with_capacity(n as usize);
            file.seek(SeekFrom::Start(self.n_mark + from))?;
            file.take(n).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let found = match &self.copy {
            Some(file) => read(file),
            None => File::open(&self.path).and_then(|file| read(&file)),
        };
        found.map_err(|source| TextError::Io { path: self.path.clone(), source })
    }

    /// Decodes `bytes`, which begin at byte `at` of the text.
    fn decode(&self, bytes: &[u8], at: u64) -> Result<String, TextError> {
        decode::decode(self.kind, bytes).map_err(|fault| fault.at(self, at))
    }

    /// Index after the last whole character in `head`, which includes the mark.
    fn head_end(&self, head: &[u8], whole: bool) -> usize {
        let n_mark = self.n_mark as usize;
        if whole || !self.kind.shows_starts() {
            return head.len();
        }
        // The last character may be cut off; one that begins before it is whole.
        let text = &head[n_mark..];
        let mut end = text.len().saturating_sub(REST);
        end = self.kind.next_start(text, 0, end);
        n_mark + end
    }
}

/// Iterator over the pieces of a [`TextFile`].
pub struct Pieces<'t> {
    text: &'t TextFile,
    most: usize,
    at: u64,
}

impl Pieces<'_> {
    /// Number of bytes of the text in the pieces so far.
    pub fn n_bytes(&self) -> u64 {
        self.at
    }

    fn piece(&mut self) -> Result<String, TextError> {
        let text = self.text;
        let bytes = text.bytes(self.at, self.most + REST)?;
        let rest = text.n_bytes - self.at;
        let end = if rest <= self.most as u64 {
            bytes.len().min(self.most)
        } else {
            let most = self.most.min(bytes.len());
            match text.kind.after_last_newline(&bytes[..most]) {
                Some(end) => end,
                None if text.kind.shows_starts() => text.kind.next_start(&bytes, self.at, most),
                None => most,
            }
        };
        let found = text.decode(&bytes[..end], self.at)?;
        // A file that was truncated meanwhile ends here.
        self.at = if end == 0 { text.n_bytes } else { self.at + end as u64 };
        Ok(found)
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<String, TextError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.text.n_bytes {
            return None;
        }
        let piece = self.piece();
        if piece.is_err() {
            self.at = self.text.n_bytes;
        }
        Some(piece)
    }
}

/// Creates an unnamed temporary file with `head` and the rest of `source`, and returns its length.
fn copied(head: &[u8], source: &mut File) -> Result<(File, u64), TextError> {
    // Errors come from the temporary folder far more often than from the pipe.
    let io = |e| TextError::Copy { folder: std::env::temp_dir(), source: without_path(e) };
    let mut copy = tempfile::tempfile().map_err(io)?;
    copy.write_all(head).map_err(io)?;
    let n_rest = std::io::copy(source, &mut copy).map_err(io)?;
    Ok((copy, head.len() as u64 + n_rest))
}

/// Rejects files of other formats by their first bytes.
fn check_format(path: &Path, head: &[u8]) -> Result<(), TextError> {
    match known::format(head) {
        Some(what) => Err(TextError::Format { path: path.into(), what }),
        None => Ok(()),
    }
}
