//! Random problems and every way of filling a cache with one.

use half::{bf16, f16};
use proptest::prelude::*;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rand_distr::{Distribution, StandardNormal};
use softhash::{
    Budget, CacheShape, DType, DecodeOptions, Device, Hyperplanes, Mode, Rule, Scoring, SelectionScope, SocketCache,
    SocketConfig, Temperature, TensorView,
};

/// How the tokens get into the cache. The cache's content is the same in the end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum History {
    /// One append.
    Whole,
    /// Appends of 1, 2, 4, ... tokens and back to 1 again.
    Chunks,
    /// Half of the tokens, other tokens, truncation to that half, the rest.
    Truncated,
    /// Half of the tokens, a fork, other tokens on the original, the rest on the fork, removal of the original.
    Forked,
}

/// A configuration, shapes, and the seed that the numbers follow from.
#[derive(Clone, Debug)]
pub struct Problem {
    pub config: SocketConfig,
    pub shape: CacheShape,
    pub page_tokens: usize,
    /// Tokens per sequence.
    pub lengths: Vec<usize>,
    /// Query tokens.
    pub tq: usize,
    pub q_dtype: DType,
    pub output: DType,
    pub history: History,
    pub seed: u64,
}

/// Numbers that their dtype represents exactly, and their storage.
pub struct Numbers {
    pub exact: Vec<f32>,
    dtype: DType,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
    f32: Vec<f32>,
    shape: [usize; 4],
    /// Channels between rows that no operation may read; they hold NaN.
    gap: usize,
}

impl Numbers {
    pub fn new(values: &[f32], dtype: DType, shape: [usize; 4], gap: usize) -> Self {
        let exact: Vec<f32> = match dtype {
            DType::F16 => values.iter().map(|&x| f16::from_f32(x).to_f32()).collect(),
            DType::Bf16 => values.iter().map(|&x| bf16::from_f32(x).to_f32()).collect(),
            _ => values.to_vec(),
        };
        let mut stored = Vec::new();
        for row in exact.chunks(shape[3]) {
            stored.extend_from_slice(row);
            stored.extend(std::iter::repeat_n(f32::NAN, gap));
        }
        let (mut half, mut brain, mut single) = (Vec::new(), Vec::new(), Vec::new());
        match dtype {
            DType::F16 => half = stored.into_iter().map(f16::from_f32).collect(),
            DType::Bf16 => brain = stored.into_iter().map(bf16::from_f32).collect(),
            _ => single = stored,
        }
        Self { exact, dtype, f16: half, bf16: brain, f32: single, shape, gap }
    }

    pub fn view(&self) -> TensorView<'_> {
        let [_, t, h, d] = self.shape;
        let row = d + self.gap;
        let view = match self.dtype {
            DType::F16 => TensorView::f16(&self.f16, self.shape),
            DType::Bf16 => TensorView::bf16(&self.bf16, self.shape),
            _ => TensorView::f32(&self.f32, self.shape),
        };
        view.with_strides([t * h * row, h * row, row, 1])
    }
}

/// Standard normal numbers from a seed and the name of what they are for.
pub fn normal(seed: u64, purpose: u64, n: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed.wrapping_mul(31).wrapping_add(purpose));
    (0..n).map(|_| StandardNormal.sample(&mut rng)).collect()
}

/// The numbers of one problem.
pub struct Data {
    pub q: Numbers,
    /// Per sequence `[len, num_kv_heads, dim]`, exact.
    pub k: Vec<Vec<f32>>,
    pub v: Vec<Vec<f32>>,
}

impl Problem {
    fn gap(&self) -> usize {
        // On some problems rows are apart, with poison between them.
        if self.seed.is_multiple_of(2) { 3 } else { 0 }
    }

    pub fn data(&self) -> Data {
        let shape = self.shape;
        let (mut k, mut v) = (Vec::new(), Vec::new());
        // A common shift of the keys, as real ones have, makes centring matter.
        let shift = normal(self.seed, 1, shape.num_kv_heads * shape.head_dim);
        for (b, &len) in self.lengths.iter().enumerate() {
            let noise = normal(self.seed, 2 + 2 * b as u64, len * shift.len());
            let keys: Vec<f32> = noise.iter().zip(shift.iter().cycle()).map(|(x, s)| x + s).collect();
            let values = normal(self.seed, 3 + 2 * b as u64, len * shape.num_kv_heads * shape.value_dim);
            k.push(Numbers::new(&keys, shape.dtype, [1, 1, 1, shape.head_dim], 0).exact);
            v.push(Numbers::new(&values, shape.dtype, [1, 1, 1, shape.value_dim], 0).exact);
        }
        let dims = [self.lengths.len(), self.tq, shape.num_q_heads, shape.head_dim];
        let q = Numbers::new(&normal(self.seed, 0, dims.iter().product()), self.q_dtype, dims, self.gap());
        Data { q, k, v }
    }

    pub fn options(&self, mode: Mode) -> DecodeOptions {
        DecodeOptions { mode, output: Some(self.output), selection: mode == Mode::Sparse, ..Default::default() }
    }

    pub fn empty_cache(&self, device: &Device, sequences: usize) -> SocketCache {
        SocketCache::with_page_tokens(device, self.config.clone(), self.shape, sequences, self.page_tokens).unwrap()
    }

    /// Appends tokens `range` of sequence `b` to sequence `to`.
    pub fn append(&self, cache: &mut SocketCache, to: usize, data: &Data, b: usize, range: std::ops::Range<usize>) {
        let shape = self.shape;
        let part = |x: &[f32], dim: usize| {
            let token = shape.num_kv_heads * dim;
            let dims = [1, range.len(), shape.num_kv_heads, dim];
            Numbers::new(&x[range.start * token..range.end * token], shape.dtype, dims, self.gap())
        };
        let (k, v) = (part(&data.k[b], shape.head_dim), part(&data.v[b], shape.value_dim));
        cache.append_to(to, &k.view(), &v.view()).unwrap();
    }

    /// Appends tokens that are no part of the problem.
    fn append_others(&self, cache: &mut SocketCache, to: usize, count: usize) {
        let shape = self.shape;
        let other = |purpose, dim: usize| {
            let dims = [1, count, shape.num_kv_heads, dim];
            Numbers::new(&normal(self.seed, purpose, dims.iter().product()), shape.dtype, dims, 0)
        };
        let (k, v) = (other(1001, shape.head_dim), other(1002, shape.value_dim));
        cache.append_to(to, &k.view(), &v.view()).unwrap();
    }

    /// A cache that holds the problem's sequences, filled as its history says.
    pub fn cache(&self, device: &Device, data: &Data) -> SocketCache {
        let batch = self.lengths.len();
        let mut cache = self.empty_cache(device, batch);
        match self.history {
            History::Whole => {
                // All sequences in one ragged append; what is beyond a sequence's length must not matter.
                let tokens = self.lengths.iter().copied().max().unwrap_or(0);
                let shape = self.shape;
                let pad = |x: &[Vec<f32>], dim: usize| {
                    let mut all = Vec::new();
                    for x in x {
                        all.extend_from_slice(x);
                        all.resize(all.len() + tokens * shape.num_kv_heads * dim - x.len(), 999.0);
                    }
                    Numbers::new(&all, shape.dtype, [batch, tokens, shape.num_kv_heads, dim], self.gap())
                };
                let (k, v) = (pad(&data.k, shape.head_dim), pad(&data.v, shape.value_dim));
                cache.append_ragged(&k.view(), &v.view(), &self.lengths).unwrap();
            }
            History::Chunks => {
                for (b, &len) in self.lengths.iter().enumerate() {
                    let (mut at, mut chunk) = (0, 1);
                    while at < len {
                        let end = len.min(at + chunk);
                        self.append(&mut cache, b, data, b, at..end);
                        (at, chunk) = (end, if chunk >= 256 { 1 } else { chunk * 2 });
                    }
                }
            }
            History::Truncated => {
                for (b, &len) in self.lengths.iter().enumerate() {
                    self.append(&mut cache, b, data, b, 0..len / 2);
                    self.append_others(&mut cache, b, 70);
                    cache.truncate(b, len / 2).unwrap();
                    self.append(&mut cache, b, data, b, len / 2..len);
                }
            }
            History::Forked => {
                for (b, &len) in self.lengths.iter().enumerate() {
                    self.append(&mut cache, b, data, b, 0..len / 2);
                    let fork = cache.fork(b).unwrap();
                    assert_eq!(fork, batch + b);
                    self.append_others(&mut cache, b, 70);
                    self.append(&mut cache, fork, data, b, len / 2..len);
                    self.append_others(&mut cache, b, 1);
                }
                (0..batch).for_each(|_| cache.remove(0).unwrap());
            }
        }
        let lengths: Vec<_> = (0..cache.sequences()).filter_map(|b| cache.len(b)).collect();
        assert_eq!(lengths, self.lengths);
        cache
    }
}

fn any_dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16])
}

fn any_config() -> impl Strategy<Value = SocketConfig> {
    let hash =
        prop::sample::select(vec![(60, 8), (16, 8), (16, 4), (5, 3), (1, 1), (12, 10), (3, 12), (7, 5), (2, 16)]);
    let temperature = prop_oneof![
        Just(Temperature::Tau(0.3)),
        Just(Temperature::Tau(0.5)),
        Just(Temperature::Beta(1.0)),
        Just(Temperature::Beta(0.1)),
    ];
    let budget = prop_oneof![
        3 => prop::sample::select(vec![0usize, 1, 7, 30, 64, 200]).prop_map(Budget::Tokens),
        1 => Just(Budget::Tokens(5000)),
        2 => prop::sample::select(vec![1.0 / 33.0, 0.1, 0.5, 1.0]).prop_map(Budget::Ratio),
    ];
    let rule = prop::sample::select(vec![Rule::Disjoint, Rule::Union]);
    let ends = prop::sample::select(vec![(0usize, 0usize), (4, 8), (16, 0), (0, 5), (1, 65)]);
    let scope = prop::sample::select(vec![SelectionScope::PerHead, SelectionScope::PerGroup]);
    let scoring = prop::sample::select(vec![
        Scoring::SoftCollision,
        Scoring::SignProjection,
        Scoring::HardCollision,
        Scoring::Hamming,
    ]);
    let planes = (0..4u8, 0..100u64);
    let center = prop::sample::select(vec![None, Some(1), Some(40), Some(130)]);
    (hash, temperature, budget, rule, ends, scope, scoring, (planes, any::<bool>(), any::<bool>(), center)).prop_map(
        |(hash, temperature, budget, rule, ends, scope, scoring, (planes, value_norm, normalize_query, center))| {
            let (mut tables, mut bits) = hash;
            if scoring == Scoring::SoftCollision && bits > 12 {
                // The reference's table of 2^16 entries would take too long.
                (tables, bits) = (4, 6);
            }
            // A single key at least, which the configuration insists on.
            let budget = match (budget, ends) {
                (Budget::Tokens(0), (0, 0)) => Budget::Tokens(1),
                _ => budget,
            };
            let hyperplanes = match planes {
                (0, seed) => Hyperplanes::Gaussian { seed },
                (1, seed) => Hyperplanes::Orthogonal { seed },
                (2, seed) => Hyperplanes::Hadamard { seed },
                // Made to measure once the shape is known.
                (_, _) => Hyperplanes::Supplied([].into()),
            };
            SocketConfig {
                tables,
                planes: bits,
                temperature,
                budget,
                rule,
                sink: ends.0,
                window: ends.1,
                value_norm,
                scope,
                scoring,
                hyperplanes,
                normalize_query,
                center,
            }
        },
    )
}

/// Problems with up to `longest` tokens in a sequence.
pub fn any_problem(longest: usize) -> impl Strategy<Value = Problem> {
    let length = prop_oneof![
        1 => Just(0usize),
        6 => prop::sample::select(vec![1usize, 2, 63, 64, 65, 100, 129, 300]),
        2 => prop::sample::select(vec![700usize, 1000, 2047]),
    ];
    let lengths = prop::collection::vec(length.prop_map(move |n| n.min(longest)), 1..=3);
    let heads = (prop::sample::select(vec![1usize, 4, 8]), 1..=2usize);
    let dims = (
        prop::sample::select(vec![64usize, 80, 96, 128, 256]),
        prop::sample::select(vec![64usize, 64, 80, 96, 128, 256]),
    );
    let dtypes = (any_dtype(), any_dtype(), any_dtype());
    let history = prop::sample::select(vec![History::Whole, History::Chunks, History::Truncated, History::Forked]);
    let rest = (prop::sample::select(vec![64usize, 64, 256, 1024]), 1..=5usize, history, any::<u64>(), any::<bool>());
    (any_config(), lengths, heads, dims, dtypes, rest).prop_map(
        |(mut config, mut lengths, (group, num_kv_heads), (head_dim, value_dim), dtypes, rest)| {
            let (page_tokens, tq, history, seed, per_head) = rest;
            // One long sequence at most: the reference is slow.
            let mut long = false;
            for len in &mut lengths {
                if *len > 300 && std::mem::replace(&mut long, true) {
                    *len = 65;
                }
            }
            if let Hyperplanes::Supplied(rows) = &mut config.hyperplanes {
                let sets = if per_head { num_kv_heads } else { 1 };
                *rows = normal(seed, 77, sets * config.tables * config.planes * head_dim).into();
            }
            let num_q_heads = group * num_kv_heads;
            let shape = CacheShape { num_q_heads, num_kv_heads, head_dim, value_dim, dtype: dtypes.0 };
            let (q_dtype, output) = (dtypes.1, dtypes.2);
            Problem { config, shape, page_tokens, lengths, tq, q_dtype, output, history, seed }
        },
    )
}
