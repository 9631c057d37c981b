//! Saved caches: what is loaded goes on bit for bit, and no damaged or hostile file gets in.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[cfg(feature = "wgpu")]
#[path = "common/device.rs"]
mod device;

use half::{bf16, f16};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use softhash::{
    Attended, Budget, CacheShape, DType, DecodeOptions, Device, Error, Hyperplanes, Rule, Scoring, SocketCache,
    SocketConfig, TensorView,
};

/// Numbers in −1..1 that differ from call to call only by `seed`.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Owns elements of any float dtype.
enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Data {
    fn new(dtype: DType, seed: u64, n: usize) -> Self {
        let values = noise(seed, n);
        match dtype {
            DType::F16 => Self::F16(values.into_iter().map(f16::from_f32).collect()),
            DType::Bf16 => Self::Bf16(values.into_iter().map(bf16::from_f32).collect()),
            _ => Self::F32(values),
        }
    }

    fn view(&self, shape: [usize; 4]) -> TensorView<'_> {
        match self {
            Self::F32(x) => TensorView::f32(x, shape),
            Self::F16(x) => TensorView::f16(x, shape),
            Self::Bf16(x) => TensorView::bf16(x, shape),
        }
    }
}

fn shape(dtype: DType) -> CacheShape {
    CacheShape { num_q_heads: 4, num_kv_heads: 2, head_dim: 16, value_dim: 24, dtype }
}

/// A small configuration whose sparse path is taken from some dozens of tokens on.
fn small(base: SocketConfig) -> SocketConfig {
    SocketConfig { sink: 2, window: 3, budget: Budget::Tokens(9), ..base }
}

fn append(cache: &mut SocketCache, seed: u64, counts: &[usize]) {
    let shape = cache.shape();
    let tokens = counts.iter().copied().max().unwrap_or(0);
    let rows = counts.len() * tokens * shape.num_kv_heads;
    let k = Data::new(shape.dtype, seed, rows * shape.head_dim);
    let v = Data::new(shape.dtype, seed + 1000, rows * shape.value_dim);
    let k = k.view([counts.len(), tokens, shape.num_kv_heads, shape.head_dim]);
    let v = v.view([counts.len(), tokens, shape.num_kv_heads, shape.value_dim]);
    cache.append_ragged(&k, &v, counts).unwrap();
}

fn decode(cache: &mut SocketCache, seed: u64) -> [Vec<u8>; 4] {
    let shape = cache.shape();
    let q = Data::new(shape.dtype, seed, cache.sequences() * shape.num_q_heads * shape.head_dim);
    let q = q.view([cache.sequences(), 1, shape.num_q_heads, shape.head_dim]);
    let options = DecodeOptions { selection: true, ..Default::default() };
    let Attended { o, lse, selection } = cache.decode_with(&q, &options).unwrap();
    let selection = selection.unwrap();
    [o, lse, selection.indices, selection.scores].map(|t| t.read_blocking().unwrap().bytes().to_vec())
}

fn configs() -> Vec<(&'static str, SocketConfig)> {
    let per_head = noise(5, 2 * 6 * 5 * 16);
    vec![
        ("paper", small(SocketConfig { tables: 7, ..SocketConfig::paper() })),
        ("paper without value norm", small(SocketConfig { tables: 3, value_norm: false, ..SocketConfig::paper() })),
        ("centred", small(SocketConfig { center: Some(40), ..SocketConfig::sign_projection(64) })),
        (
            "sign projection and value norm",
            small(SocketConfig { value_norm: true, ..SocketConfig::sign_projection(32) }),
        ),
        (
            "hard, orthogonal",
            small(SocketConfig {
                tables: 9,
                planes: 3,
                scoring: Scoring::HardCollision,
                hyperplanes: Hyperplanes::Orthogonal { seed: 3 },
                ..SocketConfig::paper()
            }),
        ),
        ("hamming", small(SocketConfig { tables: 5, planes: 11, scoring: Scoring::Hamming, ..SocketConfig::paper() })),
        (
            "supplied per kv head",
            small(SocketConfig {
                tables: 6,
                planes: 5,
                rule: Rule::Disjoint,
                hyperplanes: Hyperplanes::Supplied(per_head.into()),
                ..SocketConfig::paper()
            }),
        ),
    ]
}

/// Three sequences, one of them empty, that went through every operation; small pages, so several of them.
fn lived_in(device: &Device, config: SocketConfig, dtype: DType) -> SocketCache {
    let mut cache = SocketCache::with_page_tokens(device, config, shape(dtype), 2, 64).unwrap();
    append(&mut cache, 1, &[150, 70]);
    append(&mut cache, 2, &[1, 0]);
    cache.truncate(0, 140).unwrap();
    let fork = cache.fork(0).unwrap();
    cache.truncate(fork, 30).unwrap();
    cache.add_sequence().unwrap();
    append(&mut cache, 3, &[3, 1, 20, 0]);
    cache
}

fn assert_goes_on_equally(what: &str, a: &mut SocketCache, b: &mut SocketCache) {
    assert_eq!(decode(a, 11), decode(b, 11), "{what}: decode");
    for step in 0..3 {
        append(a, 20 + step, &[1, 2, 1, 1]);
        append(b, 20 + step, &[1, 2, 1, 1]);
        assert_eq!(decode(a, 30 + step), decode(b, 30 + step), "{what}: decode after append {step}");
    }
}

#[test]
fn a_loaded_cache_goes_on_bit_for_bit() {
    let device = Device::cpu();
    for (name, config) in configs() {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let what = format!("{name}, {dtype:?}");
            let mut saved = lived_in(&device, config.clone(), dtype);
            let bytes = saved.to_bytes().unwrap();
            let mut loaded = SocketCache::from_bytes(&device, &bytes).unwrap();
            assert_eq!(loaded.config(), saved.config(), "{what}");
            assert_eq!(loaded.shape(), saved.shape(), "{what}");
            assert_eq!(loaded.page_tokens(), 64, "{what}");
            let lens = |c: &SocketCache| (0..c.sequences()).map(|s| c.len(s).unwrap()).collect::<Vec<_>>();
            assert_eq!(lens(&loaded), [143, 71, 50, 0], "{what}");
            assert_eq!(lens(&loaded), lens(&saved), "{what}");
            assert_eq!(loaded.to_bytes().unwrap(), bytes, "{what}: saved again");
            assert_goes_on_equally(&what, &mut saved, &mut loaded);
        }
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn files_move_between_devices() {
    let (cpu, gpu) = (Device::cpu(), device::gpu());
    for (name, config) in configs() {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let what = format!("{name}, {dtype:?}");
            for (from, to) in [(&cpu, &gpu), (&gpu, &cpu), (&gpu, &gpu)] {
                let mut saved = lived_in(from, config.clone(), dtype);
                let bytes = saved.to_bytes().unwrap();
                let mut loaded = SocketCache::from_bytes(to, &bytes).unwrap();
                // The other device holds the same bits: saved there, it is the same file.
                assert!(loaded.to_bytes().unwrap() == bytes, "{what}: saved again");
                let mut back = SocketCache::from_bytes(from, &loaded.to_bytes().unwrap()).unwrap();
                assert_goes_on_equally(&what, &mut saved, &mut back);
            }
        }
    }
}

#[test]
fn an_empty_cache_survives() {
    let mut none = SocketCache::new(&Device::cpu(), SocketConfig::fast(), shape(DType::F32), 0).unwrap();
    let loaded = SocketCache::from_bytes(&Device::cpu(), &none.to_bytes().unwrap()).unwrap();
    assert_eq!((loaded.sequences(), loaded.page_tokens()), (0, none.page_tokens()));
}

#[test]
fn other_programs_can_read_the_file() {
    let mut cache = lived_in(&Device::cpu(), configs()[2].1.clone(), DType::Bf16);
    let bytes = cache.to_bytes().unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let k = file.tensor("0.k").unwrap();
    assert_eq!((k.dtype(), k.shape()), (safetensors::Dtype::BF16, [143, 2, 16].as_slice()));
    assert_eq!(file.tensor("0.mean").unwrap().shape(), [2, 16]);
    assert!(file.tensor("3.mean").is_err(), "an empty sequence has no mean yet");
}

/// The smallest file: what is checked byte by byte.
fn tiny_file() -> Vec<u8> {
    let shape = CacheShape { num_q_heads: 1, num_kv_heads: 1, head_dim: 2, value_dim: 2, dtype: DType::F16 };
    let config = SocketConfig { tables: 1, planes: 2, center: Some(3), ..small(SocketConfig::fast()) };
    let mut cache = SocketCache::with_page_tokens(&Device::cpu(), config, shape, 1, 64).unwrap();
    append(&mut cache, 1, &[4]);
    cache.to_bytes().unwrap()
}

fn load(bytes: &[u8]) -> Result<SocketCache, Error> {
    SocketCache::from_bytes(&Device::cpu(), bytes)
}

#[test]
fn every_flipped_byte_is_refused() {
    let file = tiny_file();
    load(&file).unwrap();
    for at in 0..file.len() {
        // One bit, all bits, and the one that turns a space of the header's padding into another white space.
        for mask in [0x01, 0xff, 0x20 ^ 0x0a] {
            let mut bytes = file.clone();
            bytes[at] ^= mask;
            let error = load(&bytes).err().unwrap_or_else(|| panic!("byte {at} ^ {mask:#x} was accepted"));
            assert!(matches!(error, Error::File { op: "load", .. }), "byte {at} ^ {mask:#x}: {error:?}");
        }
    }
}

#[test]
fn every_truncation_is_refused() {
    let file = tiny_file();
    for len in 0..file.len() {
        let error = load(&file[..len]).err().unwrap_or_else(|| panic!("the first {len} bytes were accepted"));
        assert!(matches!(error, Error::File { op: "load", .. }), "{len} bytes: {error:?}");
    }
    let longer = [file.as_slice(), &[0]].concat();
    assert!(matches!(load(&longer), Err(Error::File { .. })));
}

/// Takes a file apart, lets `edit` change the safetensors header and the data, and puts it together with a right
/// checksum: what a forger can do.
fn forge(file: &[u8], edit: impl FnOnce(&mut Value, &mut Vec<u8>)) -> Vec<u8> {
    let header_bytes = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..8 + header_bytes]).unwrap();
    let mut data = file[8 + header_bytes..].to_vec();
    edit(&mut header, &mut data);
    let range = |header: &Value| {
        let offsets = &header["sha256"]["data_offsets"];
        offsets[0].as_u64().zip(offsets[1].as_u64()).map(|(a, b)| a as usize..b as usize)
    };
    let at = range(&header).filter(|at| at.end <= data.len() && at.len() == 32);
    if let Some(at) = &at {
        data[at.clone()].fill(0);
    }
    let text = header.to_string();
    let mut bytes = [(text.len() as u64).to_le_bytes().as_slice(), text.as_bytes(), &data].concat();
    if let Some(at) = at {
        let sum = Sha256::digest(&bytes);
        let start = bytes.len() - data.len() + at.start;
        bytes[start..start + 32].copy_from_slice(&sum);
    }
    bytes
}

/// Changes the JSON document inside the metadata.
fn forge_document(file: &[u8], edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    forge(file, |header, _| {
        let entry = &mut header["__metadata__"]["softhash.cache"];
        let mut document: Value = serde_json::from_str(entry.as_str().unwrap()).unwrap();
        edit(&mut document);
        *entry = json!(document.to_string());
    })
}

/// Writes into a tensor's data.
fn forge_tensor(file: &[u8], name: &str, at: usize, value: &[u8]) -> Vec<u8> {
    forge(file, |header, data| {
        let start = header[name]["data_offsets"][0].as_u64().unwrap() as usize + at;
        data[start..start + value.len()].copy_from_slice(value);
    })
}

#[track_caller]
fn refused(bytes: &[u8], words: &str) {
    match load(bytes) {
        Ok(_) => panic!("accepted; expected a word of {words:?}"),
        Err(error) => assert!(error.to_string().contains(words), "{error} does not speak of {words:?}"),
    }
}

#[test]
fn the_forger_is_a_good_one() {
    let file = tiny_file();
    load(&forge(&file, |_, _| ())).unwrap();
    load(&forge_document(&file, |_| ())).unwrap();
}

#[test]
fn hostile_headers_are_refused() {
    let file = tiny_file();
    refused(b"", "not a whole safetensors file");
    refused(&[0xff; 64], "not a whole safetensors file");
    refused(&[0; 8], "not a whole safetensors file");
    refused(&[100u64.to_le_bytes().as_slice(), b"{}"].concat(), "not a whole safetensors file");
    refused(&[2u64.to_le_bytes().as_slice(), b"{}"].concat(), "not a saved cache");
    refused(&forge(&file, |h, _| h["__metadata__"] = json!({"softhash.cache": "{"})), "softhash.cache");
    refused(&forge(&file, |h, _| h["__metadata__"] = json!({"softhash.cache": "{}"})), "version");
    let deep = "[".repeat(100_000);
    refused(&forge(&file, |h, _| h["__metadata__"] = json!({ "softhash.cache": deep })), "softhash.cache");
    refused(&forge_document(&file, |d| d["version"] = json!(2)), "format version 2, this library reads version 1");
    refused(&forge_document(&file, |d| d["sequences"] = json!([{"len": 1u64 << 60, "indexed": 1u64 << 60}])), "0.k");
    refused(&forge_document(&file, |d| d["sequences"] = json!([{"len": u64::MAX, "indexed": u64::MAX}])), "0.k");
    refused(&forge_document(&file, |d| d["sequences"] = json!([{"len": -1, "indexed": 0}])), "softhash.cache");
    refused(&forge_document(&file, |d| d["sequences"] = json!([{"len": 4, "indexed": 2}])), "2 indexed, expected 4");
    refused(&forge_document(&file, |d| d["sequences"] = json!([{"len": 2, "indexed": 2}])), "2 indexed, expected 0");
    refused(&forge_document(&file, |d| d["sequences"] = json!([])), "7 tensors");
    let many: Vec<_> = (0..70_000).map(|_| json!({"len": 0, "indexed": 0})).collect();
    refused(&forge_document(&file, |d| d["sequences"] = json!(many)), "70000 sequences, the limit is 65536");
    let two = json!([{"len": 4, "indexed": 4}, {"len": 4, "indexed": 4}]);
    refused(&forge_document(&file, |d| d["sequences"] = two), "1.k is missing");
}

#[test]
fn hostile_configurations_are_refused() {
    let file = tiny_file();
    for (field, value, words) in [
        ("planes", json!(17), "planes = 17"),
        ("planes", json!(u64::MAX), "planes = 18446744073709551615"),
        ("tables", json!(0), "tables = 0"),
        ("tables", json!(u64::MAX), "tables = 18446744073709551615"),
        ("tables", json!(2), "planes"),
        ("sink", json!(u64::MAX), "sink = 18446744073709551615"),
        ("window", json!(u64::MAX), "window = 18446744073709551615"),
        ("budget", json!({"Tokens": u64::MAX}), "budget (tokens) = 18446744073709551615"),
        ("budget", json!({"Ratio": 0.0}), "budget (ratio) = 0"),
        ("temperature", json!({"Beta": -1.0}), "temperature"),
        ("center", json!(u64::MAX), "center = 18446744073709551615"),
        ("center", json!(null), "7 tensors, this cache has 6"),
        ("value_norm", json!(true), "0.bias is missing"),
        ("scoring", json!("Hamming"), "7 tensors"),
        ("hyperplanes", json!({"Supplied": "many"}), "softhash.cache"),
    ] {
        refused(&forge_document(&file, |d| d["config"][field] = value), words);
    }
    for (field, value, words) in [
        ("num_q_heads", json!(0), "num_q_heads = 0"),
        ("num_kv_heads", json!(u64::MAX), "num_kv_heads = 18446744073709551615"),
        ("head_dim", json!(513), "head_dim = 513"),
        ("head_dim", json!(4), "planes"),
        ("value_dim", json!(4), "0.v"),
        ("dtype", json!("I32"), "dtype = I32"),
        ("dtype", json!("Bf16"), "0.k is F16"),
        ("dtype", json!("F64"), "softhash.cache"),
    ] {
        refused(&forge_document(&file, |d| d["shape"][field] = value), words);
    }
    for page_tokens in [0, 63, 96, 1 << 17] {
        let words = format!("page_tokens = {page_tokens}");
        refused(&forge_document(&file, |d| d["page_tokens"] = json!(page_tokens)), &words);
    }
}

#[test]
fn hostile_tensors_are_refused() {
    let file = tiny_file();
    for name in ["planes", "sha256", "0.k", "0.v", "0.bits", "0.gain", "0.mean"] {
        // Under another name the data is all there, but the tensor is not.
        let renamed = forge(&file, |h, _| {
            let info = h[name].take();
            h.as_object_mut().unwrap().remove(name);
            h["other"] = info;
        });
        refused(&renamed, name);
        let reshaped = forge(&file, |h, _| {
            let shape = h[name]["shape"].as_array_mut().unwrap();
            shape.insert(0, json!(1));
        });
        refused(&reshaped, name);
        let huge = forge(&file, |h, _| h[name]["shape"] = json!([1u64 << 63, 1u64 << 63]));
        refused(&huge, "not a whole safetensors file");
        let beyond = forge(&file, |h, _| h[name]["data_offsets"][1] = json!(u64::MAX));
        refused(&beyond, "not a whole safetensors file");
    }
    let retyped = forge(&file, |h, _| h["0.gain"]["dtype"] = json!("I32"));
    refused(&retyped, "tensor 0.gain is I32");
    let no_elements = forge(&file, |h, data| {
        let end = data.len();
        h["0.gain2"] = json!({"dtype": "F32", "shape": [0, 1u64 << 40], "data_offsets": [end, end]});
    });
    refused(&no_elements, "8 tensors, this cache has 7");

    let nan16 = f16::NAN.to_le_bytes();
    refused(&forge_tensor(&file, "0.k", 2, &nan16), "0.k: NaN or infinity at element 1");
    refused(&forge_tensor(&file, "0.v", 4, &f16::INFINITY.to_le_bytes()), "0.v: NaN or infinity at element 2");
    refused(&forge_tensor(&file, "0.gain", 8, &f32::NAN.to_le_bytes()), "0.gain: NaN at element 2");
    refused(&forge_tensor(&file, "0.mean", 4, &f32::INFINITY.to_le_bytes()), "0.mean: NaN or infinity at element 1");
    refused(&forge_tensor(&file, "planes", 0, &f32::NAN.to_le_bytes()), "planes: NaN or infinity at element 0");
    refused(&forge_tensor(&file, "0.bits", 4, &4u32.to_le_bytes()), "0.bits: bits set outside the code at element 1");
}

#[test]
fn stored_hyperplanes_win_over_the_seed() {
    let file = tiny_file();
    let mut original = load(&file).unwrap();
    assert!(matches!(original.config().hyperplanes, Hyperplanes::Hadamard { seed: 0 }));
    let changed = forge_tensor(&file, "planes", 0, &7.5f32.to_le_bytes());
    let mut cache = load(&changed).unwrap();
    let Hyperplanes::Supplied(rows) = cache.config().hyperplanes.clone() else { panic!("{:?}", cache.config()) };
    assert_eq!((rows.len(), rows[0]), (4, 7.5));
    // Saved again it stays what it is.
    let again = load(&cache.to_bytes().unwrap()).unwrap();
    assert_eq!(again.config(), cache.config());
    assert_eq!(original.to_bytes().unwrap(), file);
}

#[test]
fn files_appear_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layer 0.safetensors");
    let device = Device::cpu();
    let mut cache = lived_in(&device, configs()[0].1.clone(), DType::F32);
    cache.save_to(&path).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), cache.to_bytes().unwrap());

    append(&mut cache, 9, &[1, 1, 1, 1]);
    cache.save_to(&path).unwrap();
    let mut loaded = SocketCache::load_from(&device, &path).unwrap();
    assert_eq!(loaded.len(0), cache.len(0));
    assert_goes_on_equally("from a file", &mut cache, &mut loaded);
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["layer 0.safetensors"], "no temporary is left");

    // A path that is a folder: the rename fails, and its temporary goes too.
    let taken = folder.path().join("taken");
    std::fs::create_dir(&taken).unwrap();
    std::fs::write(taken.join("x"), b"x").unwrap();
    for (path, op) in [(taken.clone(), "save"), (folder.path().join("no/such/folder"), "save")] {
        let error = cache.save_to(&path).unwrap_err();
        assert!(matches!(error, Error::File { op: o, .. } if o == op), "{error:?}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    for path in [taken, folder.path().join("none")] {
        let error = SocketCache::load_from(&device, &path).unwrap_err();
        assert!(matches!(error, Error::File { op: "load", .. }), "{error:?}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
    // A damaged file is named.
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = SocketCache::load_from(&device, &path).unwrap_err().to_string();
    assert!(error.contains("layer 0.safetensors") && error.contains("damaged"), "{error}");
}
