//! Tensors out of safetensors files, widened to f32.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::{Result, fail};

/// The bytes of a model's weight files.
pub struct Files {
    files: Vec<(PathBuf, Vec<u8>)>,
}

/// Tensors by name, each to be taken once.
pub struct Weights<'a> {
    tensors: HashMap<String, safetensors::tensor::TensorView<'a>>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

fn names(dir: &Path) -> Result<BTreeSet<String>> {
    let index = dir.join("model.safetensors.index.json");
    let single = "model.safetensors";
    if !index.exists() {
        if !dir.join(single).exists() {
            return fail(format!("{}: holds neither {single} nor {single}.index.json", dir.display()));
        }
        return Ok(BTreeSet::from([single.to_string()]));
    }
    let text = std::fs::read_to_string(&index).map_err(|e| format!("{}: {e}", index.display()))?;
    let map: Index = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", index.display()))?;
    let names: BTreeSet<String> = map.weight_map.into_values().collect();
    // A file name from an untrusted index must not lead out of the directory.
    if let Some(name) = names.iter().find(|n| Path::new(n).file_name() != Some(n.as_ref())) {
        return fail(format!("{}: {name:?} is no plain file name", index.display()));
    }
    Ok(names)
}

impl Files {
    /// Reads the one or several weight files of `dir`.
    pub fn read(dir: &Path) -> Result<Self> {
        let read = |name: String| {
            let path = dir.join(name);
            let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            Ok((path, bytes))
        };
        Ok(Self { files: names(dir)?.into_iter().map(read).collect::<Result<_>>()? })
    }

    /// The tensors in them.
    pub fn tensors(&self) -> Result<Weights<'_>> {
        let mut tensors = HashMap::new();
        for (path, bytes) in &self.files {
            let file = SafeTensors::deserialize(bytes).map_err(|e| format!("{}: {e}", path.display()))?;
            for (name, tensor) in file.tensors() {
                if tensors.contains_key(&name) {
                    return fail(format!("{}: {name} is in another file too", path.display()));
                }
                tensors.insert(name, tensor);
            }
        }
        Ok(Weights { tensors })
    }
}

impl Weights<'_> {
    /// Takes a tensor of the given shape, as f32.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let Some(tensor) = self.tensors.remove(name) else {
            return fail(format!("tensor {name} is missing"));
        };
        if tensor.shape() != shape {
            return fail(format!("tensor {name} has shape {:?}, config.json says {shape:?}", tensor.shape()));
        }
        let data = tensor.data();
        let values: Vec<f32> = match tensor.dtype() {
            Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 => data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::BF16 => data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            other => return fail(format!("tensor {name} has dtype {other:?}, expected F32, F16 or BF16")),
        };
        match values.iter().position(|x| !x.is_finite()) {
            Some(at) => fail(format!("tensor {name} holds {} at element {at}", values[at])),
            None => Ok(values),
        }
    }

    /// Checks that nothing is left over which would change the result: a tensor not asked for is a feature that
    /// config.json does not tell of. Tables that follow from the configuration may stay.
    pub fn finish(self, tied: bool) -> Result<()> {
        let follows = |name: &str| name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight");
        match self.tensors.keys().filter(|n| !follows(n)).min() {
            Some(name) => fail(format!("tensor {name} is not part of the model that config.json describes")),
            None => Ok(()),
        }
    }
}
