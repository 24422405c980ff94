//! Runs the command as a user does.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Temporary folder, and the command in it.
pub struct Cli {
    pub dir: tempfile::TempDir,
}

impl Cli {
    pub fn new() -> Cli {
        Cli { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn run(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_putri-gguf"))
            .current_dir(self.dir.path())
            .args(args)
            .output()
            .unwrap()
    }

    /// Runs the command and expects success.
    pub fn ok(&self, args: &[&str]) -> String {
        let out = self.run(args);
        let (stdout, stderr) = texts(&out);
        assert!(out.status.success(), "{args:?}: {:?}\n{stdout}\n{stderr}", out.status);
        stdout
    }

    /// Runs the command and expects exit code `code` with one line on stderr that holds each of `parts`.
    /// No file may appear or change.
    pub fn fails(&self, args: &[&str], code: i32, parts: &[&str]) {
        let before = self.listing();
        let out = self.run(args);
        let (stdout, stderr) = texts(&out);
        assert_eq!(out.status.code(), Some(code), "{args:?}\n{stdout}\n{stderr}");
        let errors: Vec<&str> = stderr.lines().filter(|l| l.starts_with("error:")).collect();
        assert_eq!(errors.len(), 1, "{args:?}: {stderr}");
        for part in parts {
            assert!(errors[0].contains(part), "{args:?}: {:?} is not in {}", part, errors[0]);
        }
        assert_eq!(self.listing(), before, "{args:?} left something behind");
    }

    /// Names and contents of the files in the folder.
    pub fn listing(&self) -> Vec<(PathBuf, Vec<u8>)> {
        self.listing_of("")
    }

    /// Names and contents of the files in the subfolder `name`.
    pub fn listing_of(&self, name: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let mut all: Vec<_> = std::fs::read_dir(self.dir.path().join(name))
            .unwrap()
            .map(|e| e.unwrap().path())
            .map(|p| if p.is_file() { (p.clone(), std::fs::read(p).unwrap()) } else { (p, Vec::new()) })
            .collect();
        all.sort();
        all
    }
}

fn texts(out: &Output) -> (String, String) {
    (String::from_utf8_lossy(&out.stdout).into_owned(), String::from_utf8_lossy(&out.stderr).into_owned())
}

/// Converts a path to an argument.
pub fn arg(p: &Path) -> &str {
    p.to_str().unwrap()
}
