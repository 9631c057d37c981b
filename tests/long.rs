//! Long sequences, for what short ones never reach on a GPU: appends and prompts in several blocks, long chunks, and
//! more ties than the list of candidates holds. Against the CPU path, which other tests hold against the reference.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common {
    pub mod device;
}

use softhash::{
    Attended, Budget, CacheShape, DType, DecodeOptions, Device, Hyperplanes, Mode, Rule, Scoring, SocketCache,
    SocketConfig, TensorView,
};

const DIM: usize = 8;

/// Small whole numbers: their sums are exact, so every path computes the same sign bits.
fn whole_numbers(seed: u32, n: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2_654_435_761).max(1);
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        (x >> 8) % 7
    };
    (0..n).map(|_| next() as f32 - 3.0).collect()
}

fn cache(device: &Device, config: &SocketConfig, heads: usize, tokens: usize) -> SocketCache {
    let shape =
        CacheShape { num_q_heads: heads, num_kv_heads: heads, head_dim: DIM, value_dim: DIM, dtype: DType::F32 };
    let mut cache = SocketCache::new(device, config.clone(), shape, 1).unwrap();
    let (k, v) = (whole_numbers(1, tokens * heads * DIM), whole_numbers(2, tokens * heads * DIM));
    let dims = [1, tokens, heads, DIM];
    cache.append(&TensorView::f32(&k, dims), &TensorView::f32(&v, dims)).unwrap();
    cache
}

fn assert_close(what: &str, found: &Attended, expected: &Attended) {
    for (name, found, expected) in [("o", &found.o, &expected.o), ("lse", &found.lse, &expected.lse)] {
        let [found, expected] = [found, expected].map(|x| x.read_blocking().unwrap().to_f32());
        assert_eq!(found.len(), expected.len());
        for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
            assert!(a == b || (a - b).abs() < 2e-5, "{what}: {name}[{i}] is {a}, not {b}");
        }
    }
}

/// 33,100 tokens are more than one dispatch appends; with 1, 8 and 16 kv heads they are read in chunks of 256, 512 and
/// 1024; and with one or two distinct scores the ties are far more than the candidates of one row.
#[test]
fn long_sequences_are_read_as_the_cpu_reads_them() {
    let gpu = common::device::gpu();
    let tokens = 33_100;
    for (heads, scoring, tables, planes) in
        [(1, Scoring::Hamming, 1, 1), (8, Scoring::HardCollision, 2, 2), (16, Scoring::Hamming, 1, 1)]
    {
        let config = SocketConfig {
            tables,
            planes,
            scoring,
            budget: Budget::Tokens(300),
            rule: Rule::Disjoint,
            sink: 4,
            window: 16,
            value_norm: false,
            hyperplanes: Hyperplanes::Supplied(whole_numbers(3, tables * planes * DIM).into()),
            ..SocketConfig::paper()
        };
        let q = whole_numbers(4, heads * DIM);
        let q = TensorView::f32(&q, [1, 1, heads, DIM]);
        let caches = [&gpu, &Device::cpu()].map(|device| cache(device, &config, heads, tokens));
        let [sparse, dense] = [Mode::Sparse, Mode::Dense].map(|mode| DecodeOptions {
            mode,
            selection: mode == Mode::Sparse,
            ..DecodeOptions::default()
        });
        let [found, expected] =
            caches.map(|mut cache| (cache.decode_with(&q, &sparse).unwrap(), cache.decode_with(&q, &dense).unwrap()));
        let [a, b] = [&found, &expected].map(|(sparse, _)| {
            let selection = sparse.selection.as_ref().unwrap();
            (selection.indices.read_blocking().unwrap(), selection.scores.read_blocking().unwrap())
        });
        assert_eq!(a.0.shape(), [1, 1, heads, 320]);
        assert!(a.0 == b.0, "{heads} heads: other keys are selected");
        assert!(a.1 == b.1, "{heads} heads: other scores");
        assert_close(&format!("{heads} heads, sparse"), &found.0, &expected.0);
        assert_close(&format!("{heads} heads, dense"), &found.1, &expected.1);
    }
}

/// More query tokens than one block of the prompt's attention takes; the keys end inside the last block.
#[test]
fn long_prompts_go_in_blocks() {
    let (keys, tokens) = (150, 4200);
    let q = whole_numbers(5, tokens * DIM);
    let q = TensorView::f32(&q, [1, tokens, 1, DIM]);
    let [found, expected] = [common::device::gpu(), Device::cpu()]
        .map(|device| cache(&device, &SocketConfig::fast(), 1, keys).prefill(&q).unwrap());
    let lse = expected.lse.read_blocking().unwrap().to_f32();
    assert_eq!(lse.iter().filter(|x| x.is_finite()).count(), keys, "the last rows alone see keys");
    assert_close("prefill", &found, &expected);
}
