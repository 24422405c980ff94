//! Hints on what to do about an error, in terms of options; the library's messages name no options.

use putri_gguf::calibrate::CalibrateError;
use putri_gguf::evaluate::EvaluateError;
use putri_gguf::forward::ForwardError;
use putri_gguf::ggml::GgmlError;
use putri_gguf::ollama::OllamaError;
use putri_gguf::pipeline::{NoRoom, PruneError, Target, TargetError};
use putri_gguf::text::TextError;
use putri_gguf::{ImatrixUse, JobError, QualityLimit};
use std::borrow::Cow;

/// Hint on a job's error, if an option helps.
pub fn hint(e: &JobError) -> Option<Cow<'static, str>> {
    let fixed = match e {
        JobError::WindowsTooLong { n_ctx_train, .. } => {
            return Some(format!("--ctx-size {n_ctx_train} or less fits").into());
        }
        JobError::Calibrate(e) => return of_calibration(e).map(Cow::from),
        JobError::Text(e) => return of_text(e).map(Cow::from),
        JobError::Evaluate { source, .. } => return of_evaluation(source).map(Cow::from),
        JobError::Prune(e) => return of_pruning(e).map(Cow::from),
        JobError::Quantise(e) | JobError::Llama(e) => return of_engine(e).map(Cow::from),
        JobError::Target(TargetError::OutOfReach { target, .. }) => match target {
            Target::Bytes(_) => "raise --target-size",
            Target::Params(_) => "raise --target-params",
            Target::WithCache { .. } => "raise --target-ram, or lower --target-ctx",
        },
        JobError::NoRoom(NoRoom::Memory { .. }) => "raise --max-memory, or lower --ctx-size",
        JobError::NoRoomOnDevice(NoRoom::Device { .. }) => {
            "raise --max-device-memory, lower --ctx-size, or leave out --device"
        }
        JobError::Limit { limit: QualityLimit::Kld(_), .. } => "raise --max-kld",
        JobError::Limit { limit: QualityLimit::PplRatio(_), .. } => "raise --max-ppl-ratio",
        JobError::Quantised { .. } => "--allow-requantize quantises it all the same",
        JobError::NoWayBack(_) => "leave out --recover",
        JobError::OfExperts { wanted, .. } => match wanted {
            ImatrixUse::Output => "leave out --imatrix-out, or give the source's with --imatrix",
            ImatrixUse::Quantise => "leave out --type",
            ImatrixUse::Baselines => "leave out --compare-quant",
        },
        JobError::Exists(_) => "--force replaces it",
        JobError::NoPackage(_) => "--force replaces packages only",
        JobError::StateExists(_) => "--resume continues it",
        _ => return None,
    };
    Some(fixed.into())
}

/// Hint on an error of a command outside a job.
pub fn of_command(e: &anyhow::Error) -> Option<&'static str> {
    match e.downcast_ref::<OllamaError>() {
        Some(e) => of_ollama(e),
        None => of_engine(e.downcast_ref::<GgmlError>()?),
    }
}

/// Hint on an error of Ollama.
pub fn of_ollama(e: &OllamaError) -> Option<&'static str> {
    match e {
        OllamaError::Program(_) => Some("--modelfile writes a Modelfile for use elsewhere"),
        _ => None,
    }
}

fn of_calibration(e: &CalibrateError) -> Option<&'static str> {
    match e {
        CalibrateError::Text(e) => of_text(e),
        CalibrateError::TooShort { .. } => Some("lower --ctx-size, or give more text with --file"),
        CalibrateError::NoStart => Some("give --file TEXT and --self-share 0"),
        CalibrateError::NoTemplate => Some("leave out --chat-share"),
        CalibrateError::Llama(e) => of_engine(e),
        CalibrateError::Interrupted => None,
    }
}

fn of_text(e: &TextError) -> Option<&'static str> {
    match e {
        TextError::Invalid { .. } | TextError::Nul { looks_like: Some(_), .. } => {
            Some("--encoding names its encoding")
        }
        _ => None,
    }
}

fn of_evaluation(e: &EvaluateError) -> Option<&'static str> {
    match e {
        EvaluateError::Llama(e) => of_engine(e),
        EvaluateError::Text(e) => of_text(e),
        EvaluateError::TooShort { .. } | EvaluateError::TooLong { .. } => Some("lower --ctx-size"),
        _ => None,
    }
}

fn of_pruning(e: &PruneError) -> Option<&'static str> {
    match e {
        PruneError::Experts => Some("leave out --method paper"),
        PruneError::HeadsPerBlock(_) => Some("leave out --heads per-layer"),
        PruneError::Singular { .. } | PruneError::Grown { .. } => {
            Some("raise --chunks, or give another --file")
        }
        PruneError::Ggml(e) | PruneError::Forward(ForwardError::Ggml(e)) => of_engine(e),
        _ => None,
    }
}

fn of_engine(e: &GgmlError) -> Option<&'static str> {
    match e {
        GgmlError::Memory(..) => Some("lower --ctx-size or --threads"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_name_options() {
        let too_long = JobError::WindowsTooLong { path: "in.gguf".into(), n_ctx: 512, n_ctx_train: 256 };
        assert_eq!(hint(&too_long).as_deref(), Some("--ctx-size 256 or less fits"));
        assert_eq!(hint(&JobError::Exists("out.gguf".into())).as_deref(), Some("--force replaces it"));
        let memory = || GgmlError::Memory(8, "a compute graph");
        let inner = JobError::Calibrate(memory().into());
        assert_eq!(hint(&inner).as_deref(), of_engine(&memory()));
        assert_eq!(hint(&JobError::Interrupted), None);
        // The hint is also found below a context.
        let of_machine = anyhow::Error::from(memory()).context("--rpc");
        assert_eq!(of_command(&of_machine), of_engine(&memory()));
        let no_program = OllamaError::Program(std::io::ErrorKind::NotFound.into());
        assert!(of_command(&no_program.into()).is_some_and(|hint| hint.contains("--modelfile")));
    }

    #[test]
    fn the_library_names_no_options() {
        let src = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut folders = vec![src.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() && path != src.join("cli") {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "rs") {
                    let text = std::fs::read_to_string(&path).unwrap();
                    let code = text.lines().take_while(|line| *line != "#[cfg(test)]");
                    for line in code.map(str::trim).filter(|line| !line.starts_with("//")) {
                        let named = [" --", "\"--", "`--"].iter().any(|flag| line.contains(flag));
                        assert!(!named, "{}: {line}", path.display());
                    }
                }
            }
        }
    }

    #[test]
    fn what_an_option_helps_with_has_a_hint() {
        for e in [
            JobError::Exists("out.gguf".into()),
            JobError::NoPackage("p".into()),
            JobError::StateExists("s".into()),
            JobError::OfExperts { path: "in.gguf".into(), wanted: ImatrixUse::Quantise },
            JobError::Calibrate(CalibrateError::TooShort { found: 1, needed: 2, n_ctx: 1 }),
            JobError::Calibrate(CalibrateError::NoTemplate),
            JobError::Prune(PruneError::Experts),
            JobError::Prune(PruneError::HeadsPerBlock("llama")),
            JobError::Llama(GgmlError::Memory(8, "a compute graph")),
        ] {
            let said = putri_gguf::with_causes(&e);
            assert!(hint(&e).is_some_and(|hint| hint.contains("--")), "{said}");
        }
    }
}
