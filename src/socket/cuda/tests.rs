#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::CudaExecutor;
use super::kernels::{Kernel, Key};
use super::merge::MergeKey;
use super::plan::{BINS, CANDIDATES, Sizes};
use crate::engine::Recording;
use crate::engine::cuda::{Context, KernelKey, Place};
use crate::socket::config::{Budget, CacheShape, Scoring, SelectionScope, SocketConfig};
use crate::socket::cpu::CpuExecutor;
use crate::socket::executor::{Attended, Executor, SequenceData};
use crate::socket::image;
use crate::socket::plan::Geometry;
use crate::socket::problem::{AttendProblem, CacheSpec, Kind, SeqState, query_rows};
use crate::tensor::{DType, TensorView};
use std::sync::Arc;

/// Shared memory and multiprocessors of an H200.
fn sizes(config: SocketConfig, shape: CacheShape, page_tokens: usize) -> Sizes {
    let g = Geometry::new(&CacheSpec { config, shape, page_tokens });
    Sizes { g, shared: 227 << 10, multiprocessors: 132, bulk: true }
}

/// Every kernel of this room, for the table of resources.
pub(crate) fn test_keys() -> Vec<Box<dyn KernelKey>> {
    let dtypes = [DType::F32, DType::F16, DType::Bf16];
    let merges = dtypes.iter().flat_map(|&o1| dtypes.map(|o2| MergeKey { o1, o2 }));
    let mut keys: Vec<Box<dyn KernelKey>> = merges.map(|key| Box::new(key) as Box<dyn KernelKey>).collect();
    let shape = |num_q_heads, num_kv_heads, dim, dtype| CacheShape {
        num_q_heads,
        num_kv_heads,
        head_dim: dim,
        value_dim: dim,
        dtype,
    };
    let paper = SocketConfig::paper();
    let fast = SocketConfig::fast();
    let group = |config: &SocketConfig| SocketConfig { scope: SelectionScope::PerGroup, ..config.clone() };
    let other = |scoring, tables, planes| SocketConfig { scoring, tables, planes, ..SocketConfig::paper() };
    let bf16 = DType::Bf16;
    let cases = [
        (paper.clone(), shape(32, 8, 128, bf16), bf16, bf16),
        (paper.clone(), shape(32, 32, 128, bf16), bf16, bf16),
        (group(&paper), shape(8, 2, 64, DType::F16), DType::F32, DType::F16),
        (fast.clone(), shape(32, 8, 128, bf16), bf16, bf16),
        (group(&fast), shape(32, 8, 128, bf16), bf16, DType::F32),
        (SocketConfig { value_norm: true, ..fast.clone() }, shape(24, 2, 64, DType::F16), DType::F16, DType::F32),
        (other(Scoring::HardCollision, 9, 3), shape(6, 2, 20, DType::F32), DType::F32, DType::F32),
        (other(Scoring::Hamming, 7, 16), shape(2, 2, 256, bf16), DType::F32, DType::F32),
    ];
    for (config, shape, q, output) in cases {
        let s = sizes(config, shape, 1024);
        let mut kernels = vec![Kernel::StoreKv, Kernel::HashStep, Kernel::HashQuery { q }];
        kernels.push(Kernel::Score { runs: false });
        if s.score_stages().is_some() {
            kernels.push(Kernel::Score { runs: true });
        }
        kernels.extend([Kernel::Select, Kernel::Collect]);
        kernels.push(if s.hash_tiles_shared().is_some() { Kernel::HashTiles } else { Kernel::HashKeys });
        if s.g.center {
            kernels.push(Kernel::MeanKeys);
        }
        for sparse in [true, false] {
            kernels.push(if s.on_matrix_unit(q) {
                Kernel::Attend { q, output, sparse }
            } else {
                Kernel::AttendAny { q, output, sparse }
            });
        }
        if s.bulk_fits(q) {
            kernels.push(Kernel::AttendBulk { q, output });
        }
        if s.prefill_on_matrix_unit(q, output) {
            kernels.push(Kernel::Prefill { q, output });
        }
        keys.extend(kernels.into_iter().map(|kernel| Box::new(Key { kernel, sizes: s }) as Box<dyn KernelKey>));
    }
    let mut seen = std::collections::BTreeSet::new();
    keys.retain(|key| seen.insert(key.label()));
    keys
}

#[test]
fn blocks_stay_within_shared_memory() {
    for shared in [99 << 10, 163 << 10, 227 << 10] {
        for (head_dim, value_dim) in [(1, 1), (64, 64), (128, 128), (256, 256), (512, 512), (20, 300)] {
            for (q, kv) in [(32, 8), (32, 1), (7, 7)] {
                for dtype in [DType::F16, DType::Bf16] {
                    let shape = CacheShape { num_q_heads: q, num_kv_heads: kv, head_dim, value_dim, dtype };
                    let s = Sizes { shared, ..sizes(SocketConfig::paper(), shape, 1024) };
                    assert!(s.score_shared() + s.score_stages().map_or(0, |(_, bytes)| bytes) <= shared);
                    if !s.on_matrix_unit(dtype) {
                        continue;
                    }
                    for tokens in [1, 5000, 1 << 20] {
                        let (lens, any) = (std::iter::once(tokens), s.attend_shared(false, 0));
                        let sparse = s.attend_shared(true, s.sparse_span(lens));
                        assert!(sparse <= shared && any <= shared, "{shape:?} {tokens}");
                    }
                    for tokens in [1, 5000, 1 << 20].into_iter().filter(|_| s.bulk_fits(dtype)) {
                        let (blocks, stages) = s.bulk_blocks(dtype, tokens);
                        let taken = blocks * s.bulk_shared(stages);
                        assert!((2..=5).contains(&stages) && taken <= shared, "{shape:?} {stages} {blocks}");
                    }
                }
            }
        }
    }
}

/// Keys of the contexts below, more than a list of candidates holds, and how many of them are chosen.
const TOKENS: usize = 20_000;
const CHOSEN: usize = 700;

/// A context that is hard to select from: sign bits and gain of a key by its token.
struct Hard {
    name: &'static str,
    /// All keys have the same sign bits, so that their scores differ by their gains alone.
    same_bits: bool,
    gain: fn(usize) -> f32,
    /// Keys near the threshold: how many a row lists at least and at most; more than `CANDIDATES` are searched whole.
    listed: (usize, usize),
}

const HARD: [Hard; 6] = [
    Hard { name: "random", same_bits: false, gain: |_| 1.0, listed: (1, 2000) },
    Hard { name: "all equal", same_bits: true, gain: |_| 1.0, listed: (CANDIDATES + 1, usize::MAX) },
    Hard { name: "no gain", same_bits: false, gain: |_| 0.0, listed: (CANDIDATES + 1, usize::MAX) },
    Hard { name: "sorted", same_bits: true, gain: |token| 1.0 + token as f32 * 1e-3, listed: (1, 2000) },
    // The threshold among equals in one page, which is one warp's to look through.
    Hard {
        name: "one page has the best, all equal",
        same_bits: true,
        gain: |token| if token / 1024 == 3 { 9.0 } else { 0.01 },
        listed: (1000, 1024),
    },
    // So many candidates that blocks do without lanes that share one, and radix rounds come before ranks.
    Hard {
        name: "many nearly equal",
        same_bits: true,
        gain: |token| if token % 2 == 0 { 1.0 + (token * 7919 % 10_007) as f32 * 2e-7 } else { 0.01 },
        listed: (9000, 10_000),
    },
];

/// The sequence of a case: its index is made, not hashed.
fn sequence(g: &Geometry, tokens: usize, case: &Hard) -> SequenceData {
    let mut x = 1u64;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 16) as u32
    };
    let mut data = image::empty(g, SeqState { len: tokens, indexed: tokens });
    for bytes in data.k.chunks_mut(2).chain(data.v.chunks_mut(2)) {
        let value = half::bf16::from_f32((next() % 1000) as f32 * 2e-3 - 1.0);
        bytes.copy_from_slice(&value.to_bits().to_le_bytes());
    }
    let key_words = g.num_kv_heads * g.words;
    for at in 0..data.bits.len() {
        data.bits[at] = if case.same_bits && at >= key_words { data.bits[at - key_words] } else { next() };
    }
    for (key, gain) in data.gain.iter_mut().enumerate() {
        *gain = (case.gain)(key / g.num_kv_heads);
    }
    data
}

/// One step; a sparse one with what it selected.
fn decode(executor: &mut dyn Executor, spec: &CacheSpec, data: &SequenceData, kind: Kind) -> Attended {
    executor.fork(None, SeqState::default()).unwrap();
    executor.import(0, data).unwrap();
    let shape = &spec.shape;
    let wave = |i: usize| half::bf16::from_f32((i as f32 * 0.7).sin());
    let q: Vec<_> = (0..shape.num_q_heads * shape.head_dim).map(wave).collect();
    let q = TensorView::bf16(&q, [1, 1, shape.num_q_heads, shape.head_dim]);
    let rows = query_rows(&spec.config, kind, &[data.state], 1);
    let (want_selection, output) = (kind == Kind::Sparse, DType::F32);
    let seqs = vec![data.state];
    let problem = AttendProblem { kind, op: "decode", tq: 1, rows, seqs, scale: 0.125, output, want_selection };
    executor.attend(Recording::Run, &q, &problem).unwrap()
}

fn selected(attended: &Attended) -> Vec<i32> {
    attended.selection.as_ref().unwrap().indices.read_blocking().unwrap().to_i32()
}

/// Keys near the threshold that each score row counted.
fn listed(executor: &mut CudaExecutor) -> Vec<usize> {
    let ctx = executor.ctx.clone();
    let row = BINS + 1;
    let bytes = executor.sizes.g.scores_per_row() * row as u64 * 4;
    let counts = executor.workspace.histogram.get(&ctx, "test", bytes).unwrap();
    let counts = ctx.read_buffer_blocking("test", &counts, 0, bytes).unwrap();
    let words: Vec<_> = counts.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    words.chunks_exact(row).map(|row| row[BINS] as usize).collect()
}

fn cuda() -> Option<Arc<Context>> {
    if !std::env::var("SOFTHASH_TEST_DEVICE").is_ok_and(|name| name.starts_with("cuda")) {
        println!("left out: SOFTHASH_TEST_DEVICE names no CUDA device");
        return None;
    }
    Some(Context::open(0, Place::Off).unwrap())
}

/// Keys that are hard to tell apart: the CPU's selection, by every way that finds it.
#[test]
fn hard_selections_are_those_of_the_cpu() {
    let Some(ctx) = cuda() else { return };
    let small = |config| SocketConfig { budget: Budget::Tokens(CHOSEN), sink: 4, window: 8, center: None, ..config };
    let (paper, fast) = (small(SocketConfig::paper()), small(SocketConfig::fast()));
    let group = SocketConfig { scope: SelectionScope::PerGroup, ..fast.clone() };
    let configs = [(paper.clone(), 8), (paper, 2), (fast.clone(), 8), (fast, 2), (group, 8)];
    for case in &HARD {
        let mut met = false;
        for (config, num_q_heads) in configs.clone() {
            let shape = CacheShape { num_q_heads, num_kv_heads: 2, head_dim: 64, value_dim: 64, dtype: DType::Bf16 };
            let spec = CacheSpec { config, shape, page_tokens: 1024 };
            let what =
                format!("{}: {:?}, {num_q_heads} heads, {:?}", case.name, spec.config.scoring, spec.config.scope);
            let g = Geometry::new(&spec);
            assert_eq!(g.tables_per_word() * g.planes, 32, "every bit of a word is used in these cases");
            let data = sequence(&g, TOKENS, case);
            let mut executor = CudaExecutor::make(ctx.clone(), &spec).unwrap();
            let found = selected(&decode(&mut executor, &spec, &data, Kind::Sparse));
            let mut cpu = CpuExecutor::new(&spec).unwrap();
            let expected = selected(&decode(&mut cpu, &spec, &data, Kind::Sparse));
            assert!(found == expected, "{what}: not what the CPU selects");
            let listed = listed(&mut executor);
            println!("{what}: {listed:?} near the threshold");
            met = met || listed.iter().any(|&count| (case.listed.0..=case.listed.1).contains(&count));
        }
        // Not by every config: a linear score may be negative, where the order of the gains turns around.
        assert!(met, "{}: no row lists as many as this case is for", case.name);
    }
}

/// With spans long enough that each block goes through its ring of keys more than once, and pages shorter than a round.
#[test]
fn long_spans_of_the_scorer_select_the_same() {
    let Some(ctx) = cuda() else { return };
    let small = |config| SocketConfig { budget: Budget::Tokens(CHOSEN), sink: 4, window: 8, center: None, ..config };
    let fast = small(SocketConfig::fast());
    let group = SocketConfig { scope: SelectionScope::PerGroup, ..fast.clone() };
    for (config, num_q_heads, page_tokens) in [(fast.clone(), 8, 1024), (fast, 12, 64), (group, 2, 128)] {
        let shape = CacheShape { num_q_heads, num_kv_heads: 2, head_dim: 64, value_dim: 64, dtype: DType::Bf16 };
        let spec = CacheSpec { config, shape, page_tokens };
        let data = sequence(&Geometry::new(&spec), TOKENS, &HARD[0]);
        let mut cpu = CpuExecutor::new(&spec).unwrap();
        let expected = selected(&decode(&mut cpu, &spec, &data, Kind::Sparse));
        for bulk in [true, false] {
            let mut executor = CudaExecutor::make(ctx.clone(), &spec).unwrap();
            executor.sizes.multiprocessors = 2;
            executor.sizes.bulk &= bulk;
            let sizes = executor.sizes;
            assert_eq!(sizes.score_in_runs(sizes.score_span(TOKENS)), sizes.bulk);
            let found = selected(&decode(&mut executor, &spec, &data, Kind::Sparse));
            assert!(found == expected, "{num_q_heads} heads, {page_tokens} tokens a page, in runs: {}", sizes.bulk);
        }
    }
}

/// By tiles that are copied in runs and by those that are not, in blocks of a few tiles and of many.
#[test]
fn dense_decoding_is_that_of_the_cpu() {
    let Some(ctx) = cuda() else { return };
    for (num_q_heads, num_kv_heads, dim) in [(1, 1, 64), (8, 2, 128), (16, 2, 64), (16, 1, 256), (4, 1, 80)] {
        let shape = CacheShape { num_q_heads, num_kv_heads, head_dim: dim, value_dim: dim, dtype: DType::Bf16 };
        // Their means are not made.
        let config = SocketConfig { center: None, ..SocketConfig::fast() };
        let spec = CacheSpec { config, shape, page_tokens: 64 };
        for tokens in [1, 63, 64, 65, 2047, 5000] {
            let data = sequence(&Geometry::new(&spec), tokens, &HARD[0]);
            let mut cpu = CpuExecutor::new(&spec).unwrap();
            let expected = decode(&mut cpu, &spec, &data, Kind::Dense).o.read_blocking().unwrap().to_f32();
            for (bulk, multiprocessors) in [(true, 132), (true, 1), (false, 132), (false, 1)] {
                let mut executor = CudaExecutor::make(ctx.clone(), &spec).unwrap();
                executor.sizes.multiprocessors = multiprocessors;
                executor.sizes.bulk &= bulk;
                let found = decode(&mut executor, &spec, &data, Kind::Dense).o.read_blocking().unwrap().to_f32();
                assert_eq!(found.len(), expected.len());
                for (i, (a, b)) in expected.iter().zip(&found).enumerate() {
                    let near = (a - b).abs() <= 2e-5;
                    assert!(near, "{shape:?}, {tokens} tokens, {bulk} {multiprocessors}: {b} for {a} at {i}");
                }
            }
        }
    }
}

#[test]
fn dense_blocks_run_at_once() {
    for (q, kv) in [(32, 8), (32, 32), (32, 1), (7, 7)] {
        let shape = CacheShape { num_q_heads: q, num_kv_heads: kv, head_dim: 128, value_dim: 128, dtype: DType::Bf16 };
        let s = sizes(SocketConfig::paper(), shape, 1024);
        let heads = kv * s.head_tiles().1;
        let cases = [vec![1 << 14], vec![1 << 20], vec![100_003], vec![1 << 15; 4], vec![2048, 40_000, 131_072]];
        for (lens, tile) in cases.iter().flat_map(|lens| [16, 64].map(|tile| (lens, tile))) {
            let span = s.dense_span(lens.iter().copied(), tile, 2);
            let blocks = lens.iter().map(|len| len.div_ceil(span)).sum::<usize>() * heads;
            assert!(span.is_multiple_of(tile), "{lens:?} {span}");
            assert!(blocks <= 264, "{lens:?}, {kv} kv heads: {blocks} blocks");
            // No block has more than twice its share.
            let work = lens.iter().sum::<usize>() * heads;
            assert!(span <= (2 * work / 264).next_multiple_of(tile).max(256), "{lens:?}, {kv} kv heads: {span}");
        }
    }
}
