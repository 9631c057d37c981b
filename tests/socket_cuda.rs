//! SOCKET on CUDA: inside a host's graph, on memory that is there already, through every change of a cache. Runs where
//! `SOFTHASH_TEST_DEVICE` names a CUDA device, which CI has not.

#![cfg(feature = "cuda")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use softhash::{
    Attended, Budget, CacheShape, DType, DecodeOptions, Device, Mode, Rule, SelectionScope, SocketCache, SocketConfig,
    TensorView,
};

fn cuda() -> Option<Device> {
    let name = std::env::var("SOFTHASH_TEST_DEVICE").ok().filter(|name| name.starts_with("cuda"));
    if name.is_none() {
        println!("left out: SOFTHASH_TEST_DEVICE names no CUDA device");
    }
    name.map(|name| Device::by_name(&name).unwrap())
}

fn numbers(seed: u32, n: usize) -> Vec<half::bf16> {
    let mut x = seed.wrapping_mul(2_654_435_761).max(1);
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as f32 / u32::MAX as f32 - 0.5
    };
    (0..n).map(|_| half::bf16::from_f32(4.0 * next())).collect()
}

const DIM: usize = 64;
const SHAPE: CacheShape =
    CacheShape { num_q_heads: 8, num_kv_heads: 2, head_dim: DIM, value_dim: DIM, dtype: DType::Bf16 };

fn configs() -> Vec<SocketConfig> {
    let small = |config: SocketConfig| SocketConfig { budget: Budget::Tokens(48), sink: 4, window: 8, ..config };
    let paper = small(SocketConfig::paper());
    let fast = small(SocketConfig { center: Some(100), ..SocketConfig::fast() });
    vec![
        SocketConfig { scope: SelectionScope::PerGroup, ..paper.clone() },
        SocketConfig { rule: Rule::Disjoint, ..paper.clone() },
        paper,
        SocketConfig { scope: SelectionScope::PerGroup, ..fast.clone() },
        fast,
    ]
}

fn bits(data: &[half::bf16]) -> Vec<u16> {
    data.iter().map(|x| x.to_bits()).collect()
}

fn view(data: &[half::bf16], tokens: usize, heads: usize) -> TensorView<'_> {
    TensorView::bf16(data, [data.len() / (tokens * heads * DIM), tokens, heads, DIM])
}

fn bytes(attended: &Attended) -> Vec<u8> {
    let mut bytes = attended.o.read_blocking().unwrap().bytes().to_vec();
    bytes.extend(attended.lse.read_blocking().unwrap().bytes());
    bytes
}

fn filled(device: &Device, config: &SocketConfig, tokens: usize) -> SocketCache {
    let mut cache = SocketCache::with_page_tokens(device, config.clone(), SHAPE, 2, 256).unwrap();
    let (k, v) = (numbers(1, 2 * tokens * 2 * DIM), numbers(2, 2 * tokens * 2 * DIM));
    cache.append(&view(&k, tokens, 2), &view(&v, tokens, 2)).unwrap();
    cache
}

#[test]
fn a_step_is_captured_and_replayed() {
    let Some(device) = cuda() else { return };
    let (_, stream) = device.as_cuda().unwrap();
    for config in configs() {
        for mode in [Mode::Sparse, Mode::Dense] {
            let mut cache = filled(&device, &config, 3000);
            let options = DecodeOptions { mode, ..Default::default() };
            let data = numbers(3, 2 * 8 * DIM);
            let q = stream.clone_htod(&bits(&data)).unwrap();
            let q = TensorView::cuda_slice(&q, 0, DType::Bf16, [2, 1, 8, DIM]);
            let want = bytes(&cache.decode_with(&q, &options).unwrap());
            let (mut graph, attended) = device.capture(|| cache.decode_with(&q, &options)).unwrap();
            for _ in 0..3 {
                graph.launch().unwrap();
                assert_eq!(bytes(&attended), want, "{config:?} {mode:?}");
            }
            // A host slice cannot be part of a graph, and says so.
            let refused = device.capture(|| cache.decode_with(&view(&data, 1, 8), &options));
            assert!(matches!(refused, Err(softhash::Error::Unsupported { .. })), "{:?}", refused.err());
        }
    }
}

#[test]
fn appends_are_captured_too() {
    let Some(device) = cuda() else { return };
    let (_, stream) = device.as_cuda().unwrap();
    for config in configs() {
        let (k, v) = (numbers(5, 2 * 2 * DIM), numbers(6, 2 * 2 * DIM));
        let data = numbers(3, 2 * 8 * DIM);
        let mut eager = filled(&device, &config, 3000);
        eager.append(&view(&k, 1, 2), &view(&v, 1, 2)).unwrap();
        let want = bytes(&eager.decode(&view(&data, 1, 8)).unwrap());

        let [k, v] = [k, v].map(|data| stream.clone_htod(&bits(&data)).unwrap());
        let q = stream.clone_htod(&bits(&data)).unwrap();
        let mut cache = filled(&device, &config, 3000);
        cache.reserve(4000).unwrap();
        let [k, v] = [&k, &v].map(|slice| TensorView::cuda_slice(slice, 0, DType::Bf16, [2, 1, 2, DIM]));
        let q = TensorView::cuda_slice(&q, 0, DType::Bf16, [2, 1, 8, DIM]);
        let (mut graph, attended) = device
            .capture(|| {
                cache.append(&k, &v)?;
                cache.decode(&q)
            })
            .unwrap();
        graph.launch().unwrap();
        assert_eq!(bytes(&attended), want, "{config:?}");
    }
}

#[test]
fn histories_leave_the_same_bits() {
    let Some(device) = cuda() else { return };
    for config in configs() {
        let q = numbers(3, 2 * 8 * DIM);
        let mut plain = filled(&device, &config, 1500);
        let want = bytes(&plain.decode(&view(&q, 1, 8)).unwrap());
        // Too long, cut, forked, removed: the same two sequences are left.
        let mut cache = filled(&device, &config, 1500);
        cache.fork(1).unwrap();
        let (k, v) = (numbers(8, 900 * 2 * DIM), numbers(9, 900 * 2 * DIM));
        cache.append_to(1, &view(&k, 900, 2), &view(&v, 900, 2)).unwrap();
        cache.truncate(1, 1500).unwrap();
        cache.append_to(2, &view(&k, 900, 2), &view(&v, 900, 2)).unwrap();
        cache.remove(2).unwrap();
        assert_eq!(bytes(&cache.decode(&view(&q, 1, 8)).unwrap()), want, "{config:?}");
        // Saved and loaded.
        let mut loaded = SocketCache::from_bytes(&device, &cache.to_bytes().unwrap()).unwrap();
        assert_eq!(bytes(&loaded.decode(&view(&q, 1, 8)).unwrap()), want, "{config:?}");
        let stages = loaded.profile_with(&view(&q, 1, 8), &DecodeOptions::default()).unwrap();
        assert!(stages.iter().all(|stage| stage.nanoseconds > 0.0), "{stages:?}");
        assert_eq!(loaded.non_finite_seen().unwrap(), 0);
    }
}

#[test]
fn what_is_not_finite_is_stored_as_zero_and_counted() {
    let Some(device) = cuda() else { return };
    let (_, stream) = device.as_cuda().unwrap();
    let config = SocketConfig { budget: Budget::Tokens(8), ..SocketConfig::paper() };
    let mut data = numbers(1, 40 * 2 * DIM);
    let mut clean = data.clone();
    for (at, bad) in [(5, f32::NAN), (700, f32::INFINITY), (701, f32::NEG_INFINITY)] {
        data[at] = half::bf16::from_f32(bad);
        clean[at] = half::bf16::ZERO;
    }
    let q = numbers(3, 8 * DIM);
    let mut results = Vec::new();
    for data in [&data, &clean] {
        let mut cache = SocketCache::new(&device, config.clone(), SHAPE, 1).unwrap();
        let slice = stream.clone_htod(&bits(data)).unwrap();
        let kv = TensorView::cuda_slice(&slice, 0, DType::Bf16, [1, 40, 2, DIM]);
        cache.append(&kv, &kv).unwrap();
        results.push((bytes(&cache.decode(&view(&q, 1, 8)).unwrap()), cache.non_finite_seen().unwrap()));
    }
    assert_eq!(results[0].0, results[1].0);
    assert_eq!([results[0].1, results[1].1], [6, 0]);
}

/// A mean of values of one sign, which sums that are cut off would bend.
#[test]
fn long_sums_have_the_precision_of_f32() {
    let Some(device) = cuda() else { return };
    let tokens = (1 << 17) + 100;
    let k = numbers(1, tokens * 2 * DIM);
    let v: Vec<_> = numbers(2, tokens * 2 * DIM).iter().map(|x| half::bf16::from_f32(x.to_f32().abs())).collect();
    let mut cache = SocketCache::new(&device, SocketConfig::fast(), SHAPE, 1).unwrap();
    cache.append(&view(&k, tokens, 2), &view(&v, tokens, 2)).unwrap();
    let mut means = [0.0f64; 2 * DIM];
    for v in v.chunks(2 * DIM) {
        means.iter_mut().zip(v).for_each(|(mean, v)| *mean += v.to_f64());
    }
    // All logits are zero, in a query of each head and in three of them.
    let q = vec![0.0; 3 * 8 * DIM];
    let dense = DecodeOptions { mode: Mode::Dense, ..DecodeOptions::default() };
    let decoded = cache.decode_with(&TensorView::f32(&q[..8 * DIM], [1, 1, 8, DIM]), &dense).unwrap();
    let prefilled = cache.prefill(&TensorView::f32(&q, [1, 3, 8, DIM])).unwrap();
    for (what, attended) in [("decode", decoded), ("prefill", prefilled)] {
        let o = attended.o.read_blocking().unwrap().to_f32();
        let last = &o[o.len() - 8 * DIM..];
        let mut worst = 0.0f64;
        for (i, &o) in last.iter().enumerate() {
            let mean = means[i / DIM / 4 * DIM + i % DIM] / tokens as f64;
            let error = (f64::from(o) / mean - 1.0).abs();
            assert!(error < 5e-6, "{what}: {error:.1e} at {i}");
            worst = worst.max(error);
        }
        println!("{what}: {worst:.1e}");
    }
}
