//! Factors and temperatures that some families multiply by.

use super::*;

/// Scale factors of a family that has them.
pub(super) struct Factors {
    pub(super) embedding: f32,
    pub(super) residual: f32,
    pub(super) logit: f32,
    pub(super) attention: Option<f32>,
    pub(super) rotates: bool,
}

/// Reads the scale factors as `src/models/granite.cpp`, `minicpm.cpp` and `command-r.cpp` of llama.cpp do,
/// for which 0 means none.
pub(super) fn read_scales(
    file: &GgufFile,
    key: &impl Fn(&str) -> String,
    traits: &Traits,
    [n_embd, n_layer]: [usize; 2],
) -> Result<Factors, ModelError> {
    let read = |suffix: &str, default: f32| {
        let value = file.get_f32(&key(suffix))?.unwrap_or(default);
        Ok::<_, GgufError>(if value == 0.0 { 1.0 } else { value })
    };
    let none = Factors { embedding: 1.0, residual: 1.0, logit: 1.0, attention: None, rotates: true };
    match traits.scales {
        None => Ok(none),
        Some(Scales::Cohere) => Ok(Factors { logit: read("logit_scale", 0.0)?, ..none }),
        Some(Scales::MiniCpm) => Ok(Factors {
            embedding: read("embedding_scale", 12.0)?,
            residual: read("residual_scale", 1.4 / (n_layer as f32).sqrt())?,
            logit: 1.0 / read("logit_scale", 256.0 / n_embd as f32)?,
            ..none
        }),
        Some(Scales::Granite { rope_switch }) => {
            if file.get(&key("logit_scale")).is_none() {
                return Err(GgufError::MissingKey(key("logit_scale")).into());
            }
            let finetuned = key("rope.scaling.finetuned");
            let rotates = match file.get(&finetuned).filter(|_| rope_switch) {
                None => true,
                Some(Value::Bool(rotates)) => *rotates,
                Some(other) => {
                    let problem = format!("is of type {}, not bool", other.type_name());
                    return Err(GgufError::BadKey { key: finetuned, problem }.into());
                }
            };
            Ok(Factors {
                embedding: read("embedding_scale", 0.0)?,
                residual: read("residual_scale", 0.0)?,
                logit: 1.0 / read("logit_scale", 0.0)?,
                attention: file.get_f32(&key("attention.scale"))?.filter(|s| *s != 0.0),
                rotates,
            })
        }
    }
}

/// Reads the temperature of attention, if the family has one (`src/models/mistral3.cpp` of llama.cpp).
pub(super) fn read_temperature(
    file: &GgufFile,
    key: &impl Fn(&str) -> String,
    traits: &Traits,
    floor: usize,
) -> Result<Option<Temperature>, ModelError> {
    if !traits.yarn_keys {
        return Ok(None);
    }
    let name = key("attention.temperature_scale");
    let scale = file.get_f32(&name)?.filter(|s| *s != 0.0);
    if scale.is_some() && floor == 0 {
        let problem = "needs a rope.scaling.original_context_length that is not 0".into();
        return Err(GgufError::BadKey { key: name, problem }.into());
    }
    Ok(scale.map(|scale| Temperature { scale, floor }))
}
