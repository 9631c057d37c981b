//! Writes a small random model in Hugging Face layout, so that the loader and the whole run can be tried without any
//! download. It has learnt nothing: expect about eight bits per byte.

use std::collections::HashMap;
use std::path::Path;

use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::{Result, fail};

const VOCAB: usize = 256;
const HIDDEN: usize = 64;
const INNER: usize = 160;
const LAYERS: usize = 2;
const Q: usize = 4 * 16;
const KV: usize = 2 * 16;

fn shapes() -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("model.embed_tokens.weight".to_string(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_string(), vec![HIDDEN]),
        ("lm_head.weight".to_string(), vec![VOCAB, HIDDEN]),
    ];
    for layer in 0..LAYERS {
        for (part, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![Q, HIDDEN]),
            ("self_attn.k_proj", vec![KV, HIDDEN]),
            ("self_attn.v_proj", vec![KV, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, Q]),
            ("mlp.gate_proj", vec![INNER, HIDDEN]),
            ("mlp.up_proj", vec![INNER, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INNER]),
        ] {
            all.push((format!("model.layers.{layer}.{part}.weight"), shape));
        }
    }
    all
}

/// Writes the model into `dir`, which is made if need be and must not hold a model yet.
pub fn write(dir: &Path) -> Result<()> {
    if dir.join("config.json").exists() {
        return fail(format!("{}: holds a config.json already", dir.display()));
    }
    std::fs::create_dir_all(dir)?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut value = |shape: &[usize]| -> f32 {
        let draw: f32 = StandardNormal.sample(&mut rng);
        match shape {
            [_, inputs] => draw / (*inputs as f32).sqrt(),
            _ => 1.0,
        }
    };
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, shape) in shapes() {
        let count = shape.iter().product::<usize>();
        let bytes = (0..count).flat_map(|_| bf16::from_f32(value(&shape)).to_le_bytes()).collect();
        tensors.push((name, shape, bytes));
    }
    // Two files and an index, as large models come.
    let mut map = HashMap::new();
    let mut total = 0;
    for (i, shard) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let file = format!("model-{:05}-of-00002.safetensors", i + 1);
        let views = shard
            .iter()
            .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), bytes)?)))
            .collect::<Result<Vec<_>>>()?;
        for (name, _, bytes) in shard {
            map.insert(name.clone(), file.clone());
            total += bytes.len();
        }
        std::fs::write(dir.join(file), safetensors::serialize(views, None)?)?;
    }
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": map });
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string())?;
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2048
        },
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16"
    });
    std::fs::write(dir.join("config.json"), config.to_string())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;

    fn refused(dir: &Path) -> String {
        Model::load(dir).err().map(|e| e.to_string()).unwrap_or_default()
    }

    fn edit(path: &Path, from: &str, to: &str) -> Result<()> {
        let text = std::fs::read_to_string(path)?;
        assert!(text.contains(from), "{} has no {from}", path.display());
        Ok(std::fs::write(path, text.replace(from, to))?)
    }

    #[test]
    fn what_is_written_loads_whole() -> Result<()> {
        let dir = tempfile::tempdir()?;
        write(dir.path())?;
        let counted: usize = shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(Model::load(dir.path())?.parameters(), counted);
        assert!(write(dir.path()).is_err(), "an existing model must not be overwritten");
        Ok(())
    }

    #[test]
    fn broken_directories_are_refused_by_name() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (config, index) = (dir.path().join("config.json"), dir.path().join("model.safetensors.index.json"));
        let second = dir.path().join("model-00002-of-00002.safetensors");
        assert!(refused(dir.path()).contains("config.json"));
        write(dir.path())?;

        edit(&config, "\"intermediate_size\":160", "\"intermediate_size\":161")?;
        assert!(refused(dir.path()).contains("mlp.gate_proj.weight has shape [160, 64]"));
        edit(&config, "\"intermediate_size\":161", "\"intermediate_size\":160,\"mlp_bias\":true")?;
        assert!(refused(dir.path()).contains("mlp.gate_proj.bias is missing"));
        edit(&config, ",\"mlp_bias\":true", "")?;
        edit(&config, "\"num_hidden_layers\":2", "\"num_hidden_layers\":1")?;
        assert!(refused(dir.path()).contains("model.layers.1.") && refused(dir.path()).contains("not part"));
        edit(&config, "\"num_hidden_layers\":1", "\"num_hidden_layers\":2")?;
        Model::load(dir.path())?;

        let whole = std::fs::read(&second)?;
        std::fs::write(&second, &whole[..whole.len() / 2])?;
        assert!(refused(dir.path()).contains("model-00002-of-00002.safetensors"));
        std::fs::remove_file(&second)?;
        assert!(refused(dir.path()).contains("model-00002-of-00002.safetensors"));
        edit(&index, "model-00002-of-00002", "../model-00002-of-00002")?;
        assert!(refused(dir.path()).contains("no plain file name"));
        std::fs::remove_file(&index)?;
        assert!(refused(dir.path()).contains("neither model.safetensors"));
        Ok(())
    }
}
