//! `config.json` of a Llama-architecture model: read, checked, and reduced to what inference needs.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::{Result, fail};

/// A checked model configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels of a head; even.
    pub head_dim: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f32,
    /// Whether q, k, v and o projections have biases.
    pub attention_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Whether the output projection is the embedding.
    pub tied: bool,
    /// Positions the model was trained for.
    pub max_positions: usize,
    /// Rotary frequency of each channel pair, radians per token.
    pub frequencies: Vec<f32>,
}

/// The file as it is written; absent fields have the defaults of the format.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    vocab_size: u64,
    hidden_size: u64,
    intermediate_size: u64,
    num_hidden_layers: u64,
    num_attention_heads: u64,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    hidden_act: Option<String>,
    max_position_embeddings: Option<u64>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Rope>,
    /// Newer files keep the base and the scaling in one object.
    rope_parameters: Option<Rope>,
    partial_rotary_factor: Option<f64>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
struct Rope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

impl LlamaConfig {
    /// Reads and checks `config.json` of `dir`.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Self::parse(&text).map_err(|e| format!("{}: {e}", path.display()).into())
    }

    /// Checks the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Self> {
        let raw: Raw = serde_json::from_str(text)?;
        if let Some(kind) = raw.model_type.as_deref()
            && kind != "llama"
        {
            return fail(format!("model_type is {kind:?}, only \"llama\" is supported"));
        }
        match raw.architectures.as_deref() {
            None | Some([]) if raw.model_type.is_none() => {
                return fail("neither model_type nor architectures is given");
            }
            Some(names) if !names.is_empty() && !names.iter().any(|n| n == "LlamaForCausalLM") => {
                return fail(format!("architectures is {names:?}, only \"LlamaForCausalLM\" is supported"));
            }
            _ => {}
        }
        if let Some(act) = raw.hidden_act.as_deref()
            && act != "silu"
        {
            return fail(format!("hidden_act is {act:?}, only \"silu\" is supported"));
        }
        if raw.partial_rotary_factor.is_some_and(|f| f != 1.0) {
            return fail("partial_rotary_factor other than 1 is not supported");
        }
        if raw.quantization_config.as_ref().is_some_and(|q| !q.is_null()) {
            return fail("quantization_config is set: only plain f32, f16 and bf16 weights are supported");
        }

        let hidden_size = sized("hidden_size", raw.hidden_size, 1 << 16)?;
        let q_heads = sized("num_attention_heads", raw.num_attention_heads, 1024)?;
        let kv_heads = match raw.num_key_value_heads {
            None => q_heads,
            Some(n) => sized("num_key_value_heads", n, 1024)?,
        };
        if !q_heads.is_multiple_of(kv_heads) {
            return fail(format!("num_attention_heads = {q_heads} is no multiple of num_key_value_heads = {kv_heads}"));
        }
        let head_dim = match raw.head_dim {
            Some(n) => sized("head_dim", n, 512)?,
            None if hidden_size.is_multiple_of(q_heads) => sized("head_dim", (hidden_size / q_heads) as u64, 512)?,
            None => {
                let sizes = format!("hidden_size = {hidden_size}, num_attention_heads = {q_heads}");
                return fail(format!("head_dim is not given and the heads do not divide the width: {sizes}"));
            }
        };
        if !head_dim.is_multiple_of(2) {
            return fail(format!("head_dim = {head_dim} must be even for rotary positions"));
        }
        let eps = raw.rms_norm_eps.unwrap_or(1e-6);
        if !(eps > 0.0 && eps < 1.0) {
            return fail(format!("rms_norm_eps = {eps} must be between 0 and 1"));
        }
        let scaling = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        let theta = scaling.and_then(|s| s.rope_theta).or(raw.rope_theta).unwrap_or(10000.0);
        Ok(Self {
            vocab_size: sized("vocab_size", raw.vocab_size, 1 << 24)?,
            hidden_size,
            intermediate_size: sized("intermediate_size", raw.intermediate_size, 1 << 20)?,
            layers: sized("num_hidden_layers", raw.num_hidden_layers, 1024)?,
            q_heads,
            kv_heads,
            head_dim,
            rms_norm_eps: eps as f32,
            attention_bias: raw.attention_bias,
            mlp_bias: raw.mlp_bias,
            tied: raw.tie_word_embeddings,
            max_positions: sized("max_position_embeddings", raw.max_position_embeddings.unwrap_or(2048), 1 << 30)?,
            frequencies: frequencies(theta, head_dim, scaling)?,
        })
    }
}

fn sized(field: &str, value: u64, limit: u64) -> Result<usize> {
    if value == 0 || value > limit {
        return fail(format!("{field} = {value} must be 1 to {limit}"));
    }
    Ok(value as usize)
}

fn positive(field: &str, value: Option<f64>) -> Result<f64> {
    match value {
        Some(x) if x.is_finite() && x > 0.0 => Ok(x),
        Some(x) => fail(format!("rope scaling: {field} = {x} must be positive")),
        None => fail(format!("rope scaling: {field} is missing")),
    }
}

/// θ^(−2i/d), slowed as the scaling says.
fn frequencies(theta: f64, head_dim: usize, scaling: Option<&Rope>) -> Result<Vec<f32>> {
    if !(theta.is_finite() && theta > 1.0) {
        return fail(format!("rope_theta = {theta} must be above 1"));
    }
    let plain = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64));
    let kind = scaling.map_or("default", |s| s.rope_type.as_deref().unwrap_or("default"));
    let scaled: Vec<f64> = match (kind, scaling) {
        ("default", _) | (_, None) => plain.collect(),
        ("linear", Some(s)) => {
            let factor = positive("factor", s.factor)?;
            plain.map(|f| f / factor).collect()
        }
        ("llama3", Some(s)) => {
            let factor = positive("factor", s.factor)?;
            let low = positive("low_freq_factor", s.low_freq_factor)?;
            let high = positive("high_freq_factor", s.high_freq_factor)?;
            let trained = positive("original_max_position_embeddings", s.original_max_position_embeddings)?;
            if high <= low {
                return fail(format!("rope scaling: high_freq_factor = {high} must be above low_freq_factor = {low}"));
            }
            // Channels that turn often within the trained length stay, those that hardly turn are stretched, and the
            // ones between pass smoothly from one to the other.
            plain
                .map(|f| {
                    let turns = trained * f / std::f64::consts::TAU;
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    keep * f + (1.0 - keep) * f / factor
                })
                .collect()
        }
        (other, Some(_)) => return fail(format!("rope scaling {other:?} is not supported: default, linear or llama3")),
    };
    Ok(scaled.into_iter().map(|f| f as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(extra: &str) -> Result<LlamaConfig> {
        LlamaConfig::parse(&format!(
            r#"{{"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
                "num_hidden_layers": 2, "num_attention_heads": 4{extra}}}"#
        ))
    }

    fn refused(extra: &str) -> String {
        with(extra).err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn absent_fields_have_the_formats_defaults() -> Result<()> {
        let config = with("")?;
        assert_eq!((config.kv_heads, config.head_dim, config.tied), (4, 16, false));
        assert_eq!(config.frequencies[0], 1.0);
        assert!((f64::from(config.frequencies[1]) - 10000f64.powf(-0.125)).abs() < 1e-6);
        Ok(())
    }

    #[test]
    fn hostile_sizes_are_refused_by_name() {
        assert!(refused(r#", "head_dim": 99999999999"#).contains("head_dim = 99999999999"));
        assert!(refused(r#", "num_key_value_heads": 3"#).contains("num_key_value_heads = 3"));
        assert!(refused(r#", "num_key_value_heads": 0"#).contains("num_key_value_heads = 0"));
        assert!(refused(r#", "head_dim": 7"#).contains("even"));
        assert!(refused(r#", "rope_scaling": {"type": "yarn"}"#).contains("yarn"));
        assert!(refused(r#", "architectures": ["GPT2LMHeadModel"]"#).contains("GPT2LMHeadModel"));
        assert!(refused(r#", "rope_scaling": {"type": "linear"}"#).contains("factor is missing"));
    }

    #[test]
    fn llama3_scaling_keeps_fast_channels_and_stretches_slow_ones() -> Result<()> {
        let scaled = with(
            r#", "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#,
        )?;
        let plain = with(r#", "rope_theta": 500000.0"#)?;
        assert_eq!(scaled.frequencies[0], plain.frequencies[0]);
        let last = plain.frequencies.len() - 1;
        assert!((scaled.frequencies[last] * 8.0 / plain.frequencies[last] - 1.0).abs() < 1e-6);
        Ok(())
    }
}
