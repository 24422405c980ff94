//! Package: a folder for a device with the model, the files to run it, its provenance, and checksums.
//!
//! The same job gives the same bytes: no content depends on when, where or how fast it ran.

use crate::assemble::original_name;
use crate::gguf::{GgufFile, Value, sha256};
#[cfg(unix)]
use crate::job::usual_mode;
use crate::job::{JobError, resolved, temporary_folder};
use crate::report::{Report, markdown, page, plain, shell_word};
use std::fmt::Write;
use std::path::Path;

/// Name of the list of checksums of all other files, in the format of sha256sum.
const SUMS: &str = "SHA256SUMS";

/// Content of a package.
#[derive(Clone, Copy, Debug)]
pub struct Package<'a> {
    /// Path of the model.
    pub model: &'a Path,
    /// Modelfile, as written by [`crate::ollama::modelfile`].
    pub modelfile: &'a str,
    /// Report of the model.
    pub report: &'a Report,
    /// Texts of the source's licences.
    pub licenses: &'a [String],
}

/// Files of a package beside the model and the list.
const FILES: [&str; 5] = ["Modelfile", "NOTICE.txt", "README.md", "report.html", "report.json"];

/// Checks that `folder` can become a package of `model`.
/// It must not exist, except as an empty folder, or with `force` as a package. None of the paths `outside`
/// may be in it, because it is created or replaced as a whole.
///
/// # Errors
/// [`JobError::Exists`], [`JobError::NoPackage`] or [`JobError::InPackage`], or [`JobError::Io`] if nothing
/// can be created there.
pub fn check(folder: &Path, model: &Path, outside: &[&Path], force: bool) -> Result<(), JobError> {
    let name = model.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let below = |path: &&&Path| resolved(path).starts_with(resolved(folder));
    if let Some(path) = outside.iter().chain([&model]).find(below) {
        return Err(JobError::InPackage { path: path.to_path_buf(), folder: folder.into() });
    }
    if name == SUMS || FILES.contains(&name) {
        return Err(JobError::InPackage { path: name.into(), folder: folder.into() });
    }
    match folder.symlink_metadata() {
        Ok(found) if found.is_dir() && (is_empty(folder) || force && is_package(folder)) => {}
        Ok(_) if force => return Err(JobError::NoPackage(folder.into())),
        Ok(_) => return Err(JobError::Exists(folder.into())),
        Err(_) => {}
    }
    temporary_folder(folder).map(drop)
}

impl Package<'_> {
    /// Writes the package to `folder`, which appears when it is complete.
    /// The model is a hard link to the same file if the file system supports that.
    ///
    /// # Errors
    /// [`JobError`] if a file cannot be read or written, or [`check`] rejects the folder.
    pub fn write(&self, folder: &Path, force: bool) -> Result<(), JobError> {
        check(folder, self.model, &[], force)?;
        let io = |source| JobError::Io { path: folder.into(), source };
        let temp = temporary_folder(folder)?;
        let name = self.model.file_name().unwrap_or_default().to_string_lossy();
        let model = temp.path().join(&*name);
        std::fs::hard_link(self.model, &model)
            .or_else(|_| std::fs::copy(self.model, &model).map(drop))
            .map_err(io)?;
        let report = self.report.portable();
        let file = GgufFile::open(&model)?;
        let files = [
            ("Modelfile", self.modelfile.to_string()),
            ("NOTICE.txt", self.notice(&file, &name)),
            ("README.md", self.readme(&file, &name)),
            ("report.html", page(&report)),
            ("report.json", report.to_json()),
        ];
        let mut sums = vec![(name.to_string(), file.sha256())];
        for (name, text) in files {
            let mut file = std::fs::File::create_new(temp.path().join(name)).map_err(io)?;
            std::io::Write::write_all(&mut file, text.as_bytes()).map_err(io)?;
            sums.push((name.into(), sha256([text.as_bytes()])));
        }
        sums.sort();
        let sums: String = sums.iter().map(|(name, sum)| sum_line(name, sum)).collect();
        std::fs::write(temp.path().join(SUMS), sums).map_err(io)?;
        make_readable(temp.path()).map_err(io)?;
        // An old package is removed when the new one is complete.
        let old = if is_package(folder) {
            let old = temporary_folder(folder)?;
            std::fs::rename(folder, old.path()).map_err(io)?;
            Some(old)
        } else {
            None
        };
        std::fs::rename(temp.path(), folder).map_err(|e| {
            // Restores the old package.
            old.as_ref().map(|old| std::fs::rename(old.path(), folder));
            io(e)
        })
    }

    /// README with the commands to run the model and the memory that it takes.
    fn readme(&self, file: &GgufFile, name: &str) -> String {
        let r = self.report;
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        let title = file.get("general.name").and_then(Value::as_text).filter(|title| !title.is_empty());
        let title = title.unwrap_or(name.into());
        let mut out = format!("# {}\n\n", markdown(&title));
        let _ = writeln!(
            out,
            "{}, {}, made by putri-gguf {}: {:.1} % of the parameters in the source's blocks are gone. Where it comes \
             from and under which licence: `NOTICE.txt`. What it lost: `report.html`.\n",
            markdown(name),
            mib(r.after.bytes),
            r.version,
            r.sparsity * 100.0
        );
        let context = r.running.as_ref().map_or(String::new(), |running| format!(" -c {}", running.ctx_size));
        let tag = ollama_name(name);
        let _ = writeln!(
            out,
            "```sh\nllama-cli -m {}{context}\nollama create {tag} -f Modelfile && ollama run {tag}\n\
             sha256sum -c {SUMS}    # are the files whole?\n```",
            shell_word(&plain(name))
        );
        if let Some(running) = &r.running {
            let (before, after) = (&running.before, &running.after);
            let _ = writeln!(
                out,
                "\nWith {} tokens of context llama.cpp takes {} on a CPU, vocabulary and program not counted: {} of weights, \
                 {} of keys and values, {} to compute in. (The source: {}.)\n\n| Context | Keys and values | Of the source |\n|---|---|---|",
                running.ctx_size,
                mib(after.bytes),
                mib(after.weights),
                mib(after.kv_cache),
                mib(after.compute),
                mib(before.bytes),
            );
            for c in &running.kv_caches {
                let _ = writeln!(out, "| {} | {} | {} |", c.ctx_size, mib(c.after), mib(c.before));
            }
        }
        out
    }

    /// Notice of the changes, and of the makers and licence that the source names.
    fn notice(&self, file: &GgufFile, name: &str) -> String {
        let r = self.report;
        let mut out = format!(
            "{} is a changed version of another model (SHA-256 of its GGUF: {}).\n\
             putri-gguf {} removed {:.1} % of the parameters of its blocks, and gave new values to what makes up for them.\n\n",
            plain(name),
            r.input.sha256.as_deref().unwrap_or("unknown"),
            r.version,
            r.sparsity * 100.0
        );
        let of_makers = file.metadata().iter().filter(|(key, _)| is_of_makers(key));
        let said = |(key, value): &(String, Value)| {
            let Value::Str(bytes) = value else { return None };
            // The name in the file says that it was pruned, which its makers did not do.
            let bytes = if key == "general.name" { original_name(bytes) } else { bytes };
            Some(format!("{key}: {}", plain(&String::from_utf8_lossy(bytes))))
        };
        let said: Vec<String> = of_makers.filter_map(said).collect();
        if said.is_empty() && self.licenses.is_empty() {
            out += "The source says nothing of its licence. Ask those who made it before you pass this on.\n";
        }
        if !said.is_empty() {
            let _ = writeln!(out, "What the source says of its makers and licence:\n\n{}", said.join("\n"));
        }
        for text in self.licenses {
            let _ = writeln!(out, "\n{}\n\n{text}", "-".repeat(80));
        }
        out
    }
}

/// Returns whether a key names the makers of a model or its licence.
fn is_of_makers(key: &str) -> bool {
    const KEYS: [&str; 8] = ["license", "name", "author", "organization", "version", "url", "doi", "uuid"];
    const GROUPS: [&str; 4] = ["license.", "source.", "base_model.", "repo_url"];
    key.strip_prefix("general.")
        .is_some_and(|k| KEYS.contains(&k) || GROUPS.iter().any(|group| k.starts_with(group)))
}

/// Name for Ollama: the characters of a file's name that its names may contain.
fn ollama_name(file: &str) -> String {
    let stem = file.strip_suffix(".gguf").unwrap_or(file).to_lowercase();
    let kept = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let name: String = stem.chars().map(kept).collect();
    let name = name.trim_matches(['.', '_', '-']);
    if name.is_empty() { "pruned".into() } else { name.into() }
}

/// Line of the list, in the format of sha256sum. Line ends and backslashes of a name are escaped; a backslash
/// before the checksum marks this.
fn sum_line(name: &str, sum: &str) -> String {
    if !name.contains(['\\', '\n', '\r']) {
        return format!("{sum}  {name}\n");
    }
    let name = name.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r");
    format!("\\{sum}  {name}\n")
}

/// Checksum in a line of the list.
fn line_sum(line: &str) -> &str {
    let line = line.strip_prefix('\\').unwrap_or(line);
    line.split_once("  ").map_or("", |(sum, _)| sum)
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// Returns whether a folder contains exactly the files of its list, so that a newer package may replace it.
fn is_package(folder: &Path) -> bool {
    let Ok(sums) = std::fs::read_to_string(folder.join(SUMS)) else { return false };
    let listed: Vec<&str> = sums.lines().collect();
    let is_listed = |name: &str| listed.iter().any(|line| sum_line(name, line_sum(line)).trim_end() == *line);
    let known = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.is_ok_and(|e| {
            e.file_type().is_ok_and(|t| t.is_file())
                && e.file_name().to_str().is_some_and(|n| n == SUMS || is_listed(n))
        })
    };
    // Many folders of models contain such a list. A package has exactly these files and one model.
    let ours = FILES.iter().all(|name| is_listed(name)) && listed.len() == FILES.len() + 1;
    ours && std::fs::read_dir(folder).is_ok_and(|mut entries| entries.all(known))
}

/// Makes a temporary folder, which is private, as readable as the process's umask allows.
fn make_readable(folder: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    if let Some(files) = usual_mode(folder) {
        use std::os::unix::fs::PermissionsExt;
        let folders = 0o700 | files | (files & 0o444) >> 2;
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(folders))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_such_as_ollama_takes() {
        let names = ["Out v2.gguf", "SmolLM2-135M.Q4_1.gguf", "größe.gguf", "..gguf", "-x-"];
        assert_eq!(names.map(ollama_name), ["out-v2", "smollm2-135m.q4_1", "gr--e", "pruned", "x"]);
    }

    #[test]
    fn makers_and_licence_are_told_apart_from_the_rest() {
        let told = ["general.license", "general.license.link", "general.base_model.0.name", "general.author"];
        assert!(told.iter().all(|key| is_of_makers(key)));
        let other = ["general.file_type", "general.quantization_version", "llama.license", "general.tags"];
        assert!(!other.iter().any(|key| is_of_makers(key)));
    }
}
