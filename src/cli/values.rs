//! Parsers of option values: shares, sizes and counts for clap's `value_parser`, and names of types.

use anyhow::{Context, Result, bail, ensure};
use putri_gguf::Quantise;
use putri_gguf::ggml::{FileType, Type};
use putri_gguf::pipeline::{RecoverBudget, TensorTypes};
use std::time::Duration;

/// Reads a share, as in `0.25` or `25%`. The caller checks its range.
pub fn share(text: &str) -> Result<f64, String> {
    let (number, whole) = text.strip_suffix('%').map_or((text, 1.0), |number| (number, 100.0));
    match number.trim().parse::<f64>() {
        Ok(n) => Ok(n / whole),
        Err(_) => Err("is not a share, as in 0.25 or 25%".into()),
    }
}

/// Reads a number of bytes, with K, M, G or T in powers of 1024: `8G`, `512M`, `2GiB`, `1000`.
pub fn bytes(text: &str) -> Result<u64, String> {
    let upper = text.to_ascii_uppercase();
    let number = upper.strip_suffix('B').unwrap_or(&upper);
    let number = number.strip_suffix('I').filter(|rest| rest.ends_with(SIZES)).unwrap_or(number);
    scaled(number, 1024.0, &SIZES).ok_or_else(|| "is not a size, as in 8G or 512M".into())
}

/// Reads a number, with K, M, B or T in powers of 1000: `110M`, `1.2e9`.
pub fn count(text: &str) -> Result<u64, String> {
    let number = scaled(&text.to_ascii_uppercase(), 1000.0, &COUNTS);
    number.ok_or_else(|| "is not a number of parameters, as in 110M or 1.2e9".into())
}

/// Reads a number of tokens, as in `250k` or `1M`.
pub fn tokens(text: &str) -> Result<usize, String> {
    count(text).map(|n| n as usize).map_err(|_| "is not a number of tokens, as in 250k or 1M".into())
}

/// Reads a time, as in `45min` or `2h`.
pub fn time(text: &str) -> Result<Duration, String> {
    let lower = text.trim().to_ascii_lowercase();
    let units = [("min", 60.0), ("h", 3600.0), ("s", 1.0)];
    let found = units.iter().find_map(|(name, unit)| Some((lower.strip_suffix(name)?, unit)));
    let seconds = found.and_then(|(number, unit)| number.trim().parse::<f64>().ok().map(|n| n * unit));
    let seconds = seconds.filter(|s| (1.0..=1e8).contains(s)).ok_or("is not a time, as in 45min or 2h")?;
    Ok(Duration::from_secs_f64(seconds))
}

/// Amount of training, if there is any.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Amount(pub Option<RecoverBudget>);

/// Reads `off`, a number of tokens, or a time.
pub fn amount_or_off(text: &str) -> Result<Amount, String> {
    if text == "off" {
        return Ok(Amount(None));
    }
    let found = time(text).map(RecoverBudget::Time).or_else(|_| tokens(text).map(RecoverBudget::Tokens));
    found
        .map(|found| Amount(Some(found)))
        .map_err(|_| "is neither off, tokens, as in 250k, nor time, as in 2h".into())
}

/// Units of sizes, each 1024 of the one before.
const SIZES: [char; 4] = ['K', 'M', 'G', 'T'];

/// Units of counts, each 1000 of the one before.
const COUNTS: [char; 4] = ['K', 'M', 'B', 'T'];

/// Reads a number from 1 on, with or without one of `units` after it.
fn scaled(text: &str, base: f64, units: &[char]) -> Option<u64> {
    let unit = units.iter().position(|unit| text.ends_with(*unit));
    let number = if unit.is_some() { &text[..text.len() - 1] } else { text };
    let factor = unit.map_or(1.0, |at| base.powi(at as i32 + 1));
    let value = number.trim().parse::<f64>().ok()? * factor;
    (value.is_finite() && value >= 1.0).then_some(value as u64)
}

/// Reads `--type`.
pub fn quantise(name: &str, again: bool) -> Result<Quantise> {
    let to = FileType::from_name(name).with_context(|| {
        let names: Vec<_> = FileType::names().collect();
        format!("--type {name} is not one of llama-quantize's: {}", names.join(", "))
    })?;
    Ok(Quantise { to, again })
}

/// Reads `--tensor-type` arguments; the last one counts.
pub fn tensor_types(given: &[String]) -> Result<TensorTypes> {
    let mut types = TensorTypes::default();
    for text in given {
        let (tensor, name) = text
            .split_once('=')
            .with_context(|| format!("--tensor-type {text} is not TENSOR=TYPE, as in ffn_down=q8_0"))?;
        let ty = Type::from_name(name).filter(|t| t.can_quantize());
        let ty =
            ty.with_context(|| format!("--tensor-type {text}: llama.cpp writes no tensors of type {name}"))?;
        match tensor {
            "attn_output" => types.attn_output = Some(ty),
            "ffn_down" => types.ffn_down = Some(ty),
            _ => bail!(
                "--tensor-type {text}: only the matrices attn_output and ffn_down get new values; the others keep their bytes"
            ),
        }
    }
    Ok(types)
}

/// Reads `--threads`: all processors that this process may use, unless fewer are wanted. More threads than
/// that would only wait for each other.
pub fn threads(given: Option<usize>) -> Result<usize> {
    ensure!(given.is_none_or(|n| (1..=512).contains(&n)), "--threads is not from 1 to 512");
    let most = std::thread::available_parallelism().map_or(1, |n| n.get());
    if let Some(n) = given.filter(|n| *n > most) {
        let processors = if most == 1 { "one processor".into() } else { format!("{most} processors") };
        eprintln!("note: this process may use {processors}, so --threads {n} counts as {most}");
    }
    Ok(given.map_or(most, |n| n.min(most)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_numbers_or_percentages() {
        assert_eq!(["0.25", "25%", "12.5 %"].map(|text| share(text).unwrap()), [0.25, 0.25, 0.125]);
        assert!(["", "%", "25x%", "a quarter"].iter().all(|text| share(text).is_err()));
    }

    #[test]
    fn sizes_are_in_powers_of_1024() {
        let sizes = [
            ("8G", 8 << 30),
            ("1.5g", 3 << 29),
            ("512M", 512 << 20),
            ("2GiB", 2 << 30),
            ("2 GB", 2 << 30),
            ("80Mi", 80 << 20),
            ("1000", 1000),
            ("1000B", 1000),
            ("1T", 1 << 40),
        ];
        for (text, expected) in sizes {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn counts_are_in_powers_of_1000() {
        let counts = [("110M", 110_000_000), ("1.2e9", 1_200_000_000), ("7b", 7_000_000_000), ("1k", 1000)];
        for (text, expected) in counts {
            assert_eq!(count(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn amounts_are_tokens_or_time() {
        let amount = |text| amount_or_off(text).map(|found| found.0);
        let tokens = |n| Ok(Some(RecoverBudget::Tokens(n)));
        let time = |seconds| Ok(Some(RecoverBudget::Time(Duration::from_secs(seconds))));
        assert_eq!(
            [amount("250k"), amount("1M"), amount("off")],
            [tokens(250_000), tokens(1_000_000), Ok(None)]
        );
        assert_eq!(["2h", "1.5h", "45min", "90 s"].map(amount), [7200, 5400, 2700, 90].map(time));
        for text in ["", "much", "h", "-2h", "0", "on", "2d"] {
            assert!(amount(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "much", "8Q", "-1G", "0", "0.5", "G", "GB", "5I", "inf", "nan", "8GG", "8é"] {
            assert_eq!(bytes(text), Err("is not a size, as in 8G or 512M".into()), "{text}");
        }
        for text in ["", "many", "1Q", "1G", "-1M", "0", "M", "inf", "NaN", "1MB"] {
            assert!(count(text).is_err(), "{text}");
        }
    }
}
