//! Reading a fixture file.

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{collections::BTreeMap, path::Path};

/// Why a file cannot be judged.
#[derive(Debug)]
pub enum Failure {
    /// The file is unreadable, of no known kind, or does not hold what its kind needs.
    File(String),
    /// The library refused or failed.
    Library(softhash::Error),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(reason) => f.write_str(reason),
            Self::Library(error) => write!(f, "the library failed: {error}"),
        }
    }
}

impl From<softhash::Error> for Failure {
    fn from(error: softhash::Error) -> Self {
        Self::Library(error)
    }
}

pub type Result<T> = std::result::Result<T, Failure>;

pub fn unfit<T>(reason: impl Into<String>) -> Result<T> {
    Err(Failure::File(reason.into()))
}

/// One tensor, widened.
#[derive(Clone, Debug)]
pub struct Array {
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
    /// Whether it was stored as f64, so that f64 accuracy can be asked of the reference.
    pub wide: bool,
    /// The library's dtype, where it has one.
    pub dtype: Option<softhash::DType>,
}

impl Array {
    fn new(view: &TensorView<'_>) -> Result<Self> {
        fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f64) -> Vec<f64> {
            bytes.as_chunks::<N>().0.iter().map(|b| value(*b)).collect()
        }
        let bytes = view.data();
        let data = match view.dtype() {
            Dtype::F64 => each(bytes, f64::from_le_bytes),
            Dtype::F32 => each(bytes, |b| f64::from(f32::from_le_bytes(b))),
            Dtype::F16 => each(bytes, |b| half::f16::from_le_bytes(b).to_f64()),
            Dtype::BF16 => each(bytes, |b| half::bf16::from_le_bytes(b).to_f64()),
            Dtype::I32 => each(bytes, |b| f64::from(i32::from_le_bytes(b))),
            Dtype::U16 => each(bytes, |b| f64::from(u16::from_le_bytes(b))),
            Dtype::U8 => each(bytes, |b: [u8; 1]| f64::from(b[0])),
            other => return unfit(format!("dtype {other:?} is none of the format's")),
        };
        let dtype = match view.dtype() {
            Dtype::F32 => Some(softhash::DType::F32),
            Dtype::F16 => Some(softhash::DType::F16),
            Dtype::BF16 => Some(softhash::DType::Bf16),
            _ => None,
        };
        Ok(Self { shape: view.shape().to_vec(), data, wide: view.dtype() == Dtype::F64, dtype })
    }
}

/// A case: its name and its tensors.
#[derive(Clone, Debug)]
pub struct Fixture {
    pub name: String,
    pub tensors: BTreeMap<String, Array>,
}

impl Fixture {
    /// Reads a file, and from its companion (`_kv` or `_in`) what it lacks.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let mut tensors = read_tensors(path)?;
        let companion = path.with_file_name(format!("{name}_kv.safetensors"));
        if tensors.contains_key("sel_union") && !tensors.contains_key("k") {
            tensors.extend(read_tensors(&companion)?);
        }
        if tensors.contains_key("dq") && !tensors.contains_key("q") {
            let case = name.rsplit_once('_').map_or("", |(case, _)| case);
            let case = ["_ratio", "_bucket_mean"].iter().find_map(|mode| case.strip_suffix(mode)).unwrap_or(case);
            tensors.extend(read_tensors(&path.with_file_name(format!("{case}_in.safetensors")))?);
        }
        Ok(Self { name, tensors })
    }

    pub fn has(&self, names: &[&str]) -> bool {
        names.iter().all(|&n| self.tensors.contains_key(n))
    }

    pub fn array(&self, name: &str) -> Result<&Array> {
        self.tensors.get(name).map_or_else(|| unfit(format!("tensor {name} is missing")), Ok)
    }

    /// A tensor that must have a given shape.
    pub fn shaped(&self, name: &str, shape: &[usize]) -> Result<&Array> {
        let array = self.array(name)?;
        if array.shape != shape {
            return unfit(format!("tensor {name} has shape {:?}, expected {shape:?}", array.shape));
        }
        Ok(array)
    }

    /// The shape of a tensor that must have `N` dimensions, none of them empty.
    pub fn dims<const N: usize>(&self, name: &str) -> Result<[usize; N]> {
        let shape = &self.array(name)?.shape;
        match <[usize; N]>::try_from(shape.as_slice()) {
            Ok(dims) if !dims.contains(&0) => Ok(dims),
            _ => unfit(format!("tensor {name} has shape {shape:?}, expected {N} dimensions, none empty")),
        }
    }

    pub fn scalar(&self, name: &str) -> Result<f64> {
        Ok(self.shaped(name, &[1])?.data[0])
    }

    /// A non-negative whole number of at most `limit`.
    pub fn count(&self, name: &str, limit: usize) -> Result<usize> {
        as_count(name, self.scalar(name)?, limit)
    }

    /// As [`Fixture::count`], a list of them.
    pub fn counts(&self, name: &str, shape: &[usize], limit: usize) -> Result<Vec<usize>> {
        self.shaped(name, shape)?.data.iter().map(|&x| as_count(name, x, limit)).collect()
    }
}

fn as_count(name: &str, value: f64, limit: usize) -> Result<usize> {
    if value.fract() == 0.0 && (0.0..=limit as f64).contains(&value) {
        Ok(value as usize)
    } else {
        unfit(format!("tensor {name} holds {value}, expected a whole number from 0 to {limit}"))
    }
}

fn read_tensors(path: &Path) -> Result<BTreeMap<String, Array>> {
    let refuse = |reason: String| Failure::File(format!("{}: {reason}", path.display()));
    let bytes = std::fs::read(path).map_err(|e| refuse(e.to_string()))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| refuse(e.to_string()))?;
    file.iter().map(|(name, view)| Ok((name.to_string(), Array::new(&view)?))).collect()
}
