//! The CPU executor against formulas in f64 and against its own laws.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use half::{bf16, f16};
use softhash::{
    Budget, CacheShape, DType, DecodeOptions, Device, Hyperplanes, Mode, Rule, Scoring, SelectionScope, SocketCache,
    SocketConfig, Temperature, TensorView,
};

/// Numbers that look normal enough, from a seed.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 1.7).collect()
}

#[derive(Clone)]
enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Data {
    fn new(dtype: DType, x: &[f32]) -> Self {
        match dtype {
            DType::F32 => Self::F32(x.to_vec()),
            DType::F16 => Self::F16(x.iter().map(|x| f16::from_f32(*x)).collect()),
            _ => Self::Bf16(x.iter().map(|x| bf16::from_f32(*x)).collect()),
        }
    }

    fn view(&self, shape: [usize; 4]) -> TensorView<'_> {
        match self {
            Self::F32(x) => TensorView::f32(x, shape),
            Self::F16(x) => TensorView::f16(x, shape),
            Self::Bf16(x) => TensorView::bf16(x, shape),
        }
    }

    fn row(&self, index: usize, dim: usize) -> Vec<f64> {
        let at = index * dim..(index + 1) * dim;
        match self {
            Self::F32(x) => x[at].iter().map(|x| f64::from(*x)).collect(),
            Self::F16(x) => x[at].iter().map(|x| x.to_f64()).collect(),
            Self::Bf16(x) => x[at].iter().map(|x| x.to_f64()).collect(),
        }
    }

    fn f32s(&self) -> &[f32] {
        match self {
            Self::F32(x) => x,
            _ => panic!("an f32 case"),
        }
    }
}

/// Shapes, and the tensors of one batch.
struct Case {
    config: SocketConfig,
    shape: CacheShape,
    page: usize,
    counts: Vec<usize>,
    tq: usize,
    k: Data,
    v: Data,
    q: Data,
    planes: Vec<f32>,
}

impl Case {
    fn new(mut config: SocketConfig, shape: CacheShape, page: usize, counts: &[usize], tq: usize) -> Self {
        let planes = noise(7, config.tables * config.planes * shape.head_dim);
        config.hyperplanes = Hyperplanes::Supplied(planes.clone().into());
        let rows = counts.len() * counts.iter().max().unwrap() * shape.num_kv_heads;
        let k: Vec<f32> = noise(1, rows * shape.head_dim).iter().map(|x| x + 0.3).collect();
        let k = Data::new(shape.dtype, &k);
        let v = Data::new(shape.dtype, &noise(2, rows * shape.value_dim));
        let q = Data::new(shape.dtype, &noise(3, counts.len() * tq * shape.num_q_heads * shape.head_dim));
        Self { k, v, q, config, shape, page, counts: counts.to_vec(), tq, planes }
    }

    fn tokens(&self) -> usize {
        *self.counts.iter().max().unwrap()
    }

    fn empty(&self) -> SocketCache {
        let device = Device::cpu();
        SocketCache::with_page_tokens(&device, self.config.clone(), self.shape, self.counts.len(), self.page).unwrap()
    }

    fn filled(&self) -> SocketCache {
        let mut cache = self.empty();
        let shape = |dim| [self.counts.len(), self.tokens(), self.shape.num_kv_heads, dim];
        let (k, v) = (self.k.view(shape(self.shape.head_dim)), self.v.view(shape(self.shape.value_dim)));
        cache.append_ragged(&k, &v, &self.counts).unwrap();
        cache
    }

    fn q_view(&self) -> TensorView<'_> {
        self.q.view([self.counts.len(), self.tq, self.shape.num_q_heads, self.shape.head_dim])
    }

    fn key(&self, b: usize, t: usize, h: usize) -> Vec<f64> {
        self.k.row((b * self.tokens() + t) * self.shape.num_kv_heads + h, self.shape.head_dim)
    }

    fn value(&self, b: usize, t: usize, h: usize) -> Vec<f64> {
        self.v.row((b * self.tokens() + t) * self.shape.num_kv_heads + h, self.shape.value_dim)
    }

    fn query(&self, b: usize, t: usize, h: usize) -> Vec<f64> {
        self.q.row((b * self.tq + t) * self.shape.num_q_heads + h, self.shape.head_dim)
    }

    fn visible(&self, b: usize, t: usize) -> usize {
        (self.counts[b] + t + 1).saturating_sub(self.tq)
    }

    fn scale(&self) -> f64 {
        f64::from((1.0 / (self.shape.head_dim as f64).sqrt()) as f32)
    }

    /// o and lse in f64 over a key set.
    fn exact(&self, b: usize, t: usize, h: usize, keys: &[usize]) -> (Vec<f64>, f64) {
        let kv = h / self.shape.group();
        let q = self.query(b, t, h);
        let logits: Vec<f64> = keys.iter().map(|&j| dot(&q, &self.key(b, j, kv)) * self.scale()).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
        let mut o = vec![0.0; self.shape.value_dim];
        for (l, &j) in logits.iter().zip(keys) {
            let w = (l - max).exp() / sum;
            o.iter_mut().zip(self.value(b, j, kv)).for_each(|(o, v)| *o += w * v);
        }
        (o, if keys.is_empty() { f64::NEG_INFINITY } else { max + sum.ln() })
    }

    fn project(&self, x: &[f64]) -> Vec<f64> {
        let rows = self.planes.chunks(self.shape.head_dim);
        rows.map(|w| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect()
    }

    /// The scores of keys `0..n` for a query head, spec §3.
    fn scores(&self, b: usize, t: usize, h: usize, n: usize) -> Vec<f64> {
        let kv = h / self.shape.group();
        let config = &self.config;
        let mut q = self.query(b, t, h);
        if config.normalize_query {
            let norm = dot(&q, &q).sqrt();
            q.iter_mut().for_each(|x| *x /= norm);
        }
        let mut mean = vec![0.0; self.shape.head_dim];
        if let Some(c) = config.center {
            for t in 0..c {
                mean.iter_mut().zip(self.key(b, t, kv)).for_each(|(m, k)| *m += k / c as f64);
            }
        }
        let uq = self.project(&q);
        let p = config.planes;
        let beta = f64::from(config.temperature.beta(self.shape.head_dim));
        let one = |j: usize| {
            let kc: Vec<f64> = self.key(b, j, kv).iter().zip(&mean).map(|(k, m)| k - m).collect();
            let uk = self.project(&kc);
            let v = self.value(b, j, kv);
            let norm = if config.value_norm { dot(&v, &v).sqrt() } else { 1.0 };
            let tables = uq.chunks(p).zip(uk.chunks(p));
            let like = |q: &f64, k: &f64| (*q >= 0.0) == (*k >= 0.0);
            match config.scoring {
                Scoring::SoftCollision => {
                    let side = |k: f64| if k >= 0.0 { 1.0 } else { -1.0 };
                    let factor = |(q, k): (&f64, &f64)| 1.0 / (1.0 + (-2.0 * beta * q.tanh() * side(*k)).exp());
                    norm * tables.map(|(q, k)| q.iter().zip(k).map(factor).product::<f64>()).sum::<f64>()
                }
                Scoring::SignProjection => {
                    let a = dot(&kc, &kc) / uk.iter().map(|u| u.abs()).sum::<f64>();
                    let sum: f64 = uq.iter().zip(&uk).map(|(q, k)| if *k >= 0.0 { *q } else { -q }).sum();
                    (dot(&q, &mean) + a * sum) * self.scale() + norm.ln()
                }
                Scoring::HardCollision => {
                    norm * tables.filter(|(q, k)| q.iter().zip(*k).all(|(q, k)| like(q, k))).count() as f64
                }
                Scoring::Hamming => norm * uq.iter().zip(&uk).filter(|(q, k)| like(q, k)).count() as f64,
            }
        };
        (0..n).map(one).collect()
    }

    fn selecting_scores(&self, b: usize, t: usize, head: usize, n: usize) -> Vec<f64> {
        let g = self.shape.group();
        match self.config.scope {
            SelectionScope::PerHead => self.scores(b, t, head, n),
            SelectionScope::PerGroup => {
                let all: Vec<_> = (0..g).map(|i| self.scores(b, t, head * g + i, n)).collect();
                (0..n).map(|j| all.iter().map(|s| s[j]).sum::<f64>() / g as f64).collect()
            }
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn shape(heads: [usize; 2], dims: [usize; 2], dtype: DType) -> CacheShape {
    CacheShape { num_q_heads: heads[0], num_kv_heads: heads[1], head_dim: dims[0], value_dim: dims[1], dtype }
}

fn wide(x: &softhash::Tensor) -> Vec<f64> {
    x.read_blocking().unwrap().to_f32().into_iter().map(f64::from).collect()
}

/// Rounding of o, and of f32 sums.
fn o_bound(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-6,
        DType::F16 => 1e-3,
        _ => 6e-3,
    }
}

/// Every output row against exact attention over the keys that `keys` names.
fn check_rows(
    case: &Case,
    name: &str,
    got: &softhash::Attended,
    bound: f64,
    keys: impl Fn(usize, usize, usize) -> Vec<usize>,
) {
    let (o, lse) = (wide(&got.o), wide(&got.lse));
    let (heads, dv) = (case.shape.num_q_heads, case.shape.value_dim);
    for b in 0..case.counts.len() {
        for t in 0..case.tq {
            for h in 0..heads {
                let at = (b * case.tq + t) * heads + h;
                let (expected, expected_lse) = case.exact(b, t, h, &keys(b, t, h));
                let difference: Vec<f64> = o[at * dv..][..dv].iter().zip(&expected).map(|(a, b)| a - b).collect();
                let size = dot(&expected, &expected).sqrt().max(0.05);
                let error = dot(&difference, &difference).sqrt() / size;
                assert!(error <= bound, "{name} [{b}, {t}, {h}]: relative error {error:e} above {bound:e}");
                let same = lse[at] == expected_lse;
                let near = (lse[at] - expected_lse).abs() < 4e-6 * (1.0 + expected_lse.abs());
                assert!(same || near, "{name} [{b}, {t}, {h}]: lse {} not {expected_lse}", lse[at]);
            }
        }
    }
}

fn reporting() -> DecodeOptions {
    DecodeOptions { output: Some(DType::F32), selection: true, ..Default::default() }
}

/// Runs the sparse path and checks scores, choice and attention.
fn check_sparse(case: &Case, name: &str) {
    let got = case.filled().decode_with(&case.q_view(), &reporting()).unwrap();
    let selection = got.selection.clone().unwrap();
    let [_, _, heads, width] = selection.indices.shape().try_into().unwrap();
    let indices = selection.indices.read_blocking().unwrap().to_i32();
    let scores = wide(&selection.scores);
    let config = &case.config;
    let place = |b: usize, t: usize, head: usize| ((b * case.tq + t) * heads + head) * width;
    let row = |b: usize, t: usize, head: usize| -> Vec<usize> {
        indices[place(b, t, head)..][..width].iter().take_while(|i| **i >= 0).map(|i| *i as usize).collect()
    };
    let places = (0..case.counts.len()).flat_map(|b| (0..case.tq).map(move |t| (b, t)));
    for (b, t, head) in places.flat_map(|(b, t)| (0..heads).map(move |h| (b, t, h))) {
        let n = case.visible(b, t);
        let name = format!("{name} [{b}, {t}, {head}]");
        let at = place(b, t, head);
        let chosen = row(b, t, head);
        assert!(chosen.is_sorted_by(|a, b| a < b), "{name}: ascending, each once");
        assert!(indices[at + chosen.len()..at + width].iter().all(|i| *i == -1), "{name}: padding");
        assert!(chosen.iter().all(|i| *i < n), "{name}: causal");
        if config.center.is_some_and(|c| case.counts[b] < c) {
            assert_eq!(chosen.len(), n, "{name}: dense until hashed");
            continue;
        }
        let all = case.selecting_scores(b, t, head, n);
        let tolerance = 4e-6 * all.iter().fold(1.0f64, |m, s| m.max(s.abs()));
        for (j, score) in chosen.iter().zip(&scores[at..]) {
            assert!((score - all[*j]).abs() < tolerance, "{name}: score of {j} is {score} not {}", all[*j]);
        }
        let Budget::Tokens(heavy) = config.budget else { panic!("fixed budgets here") };
        let base = |j: &usize| *j < config.sink || *j + config.window >= n;
        if n <= config.sink + config.window + heavy {
            assert_eq!(chosen.len(), n, "{name}: everything fits");
            continue;
        }
        assert!((0..n).filter(base).all(|j| chosen.contains(&j)), "{name}: sink and window");
        let others: Vec<usize> = chosen.iter().copied().filter(|j| !base(j)).collect();
        let left = (0..n).filter(|j| !chosen.contains(j)).map(|j| all[j]).fold(f64::NEG_INFINITY, f64::max);
        let least = others.iter().map(|j| all[*j]).fold(f64::INFINITY, f64::min);
        assert!(least >= left - 2.0 * tolerance, "{name}: {least} chosen, {left} left out");
        if config.rule == Rule::Disjoint {
            assert_eq!(others.len(), heavy, "{name}: budget");
        } else {
            // Base keys that belong to the best are not replaced by others.
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|a, b| all[*b].total_cmp(&all[*a]).then(a.cmp(b)));
            let expected = order[..heavy].iter().filter(|j| !base(j)).count();
            assert!(others.len().abs_diff(expected) <= 1, "{name}: {} not {expected}", others.len());
        }
    }
    let per_head = case.shape.num_q_heads / heads;
    check_rows(case, name, &got, 3e-6, |b, t, h| row(b, t, h / per_head));
}

fn config(scoring: Scoring, tables: usize, planes: usize) -> SocketConfig {
    SocketConfig {
        tables,
        planes,
        temperature: Temperature::Beta(0.7),
        budget: Budget::Tokens(20),
        rule: Rule::Disjoint,
        sink: 4,
        window: 8,
        value_norm: false,
        scope: SelectionScope::PerHead,
        scoring,
        hyperplanes: Hyperplanes::Gaussian { seed: 0 },
        normalize_query: false,
        center: None,
    }
}

const SCORINGS: [Scoring; 4] =
    [Scoring::SoftCollision, Scoring::SignProjection, Scoring::HardCollision, Scoring::Hamming];

#[test]
fn scores_and_choice_for_every_number_of_planes() {
    for scoring in SCORINGS {
        for planes in 1..=16 {
            let case = Case::new(config(scoring, 7, planes), shape([2, 1], [32, 16], DType::F32), 64, &[131], 1);
            check_sparse(&case, &format!("{scoring:?} P{planes}"));
        }
    }
}

#[test]
fn scores_and_choice_for_every_option() {
    for scoring in SCORINGS {
        for (i, rule) in [Rule::Disjoint, Rule::Union].into_iter().enumerate() {
            for scope in [SelectionScope::PerHead, SelectionScope::PerGroup] {
                for value_norm in [false, true] {
                    for (center, normalize_query) in [(None, false), (Some(40), true)] {
                        let base = config(scoring, 9, 6 + i);
                        let config = SocketConfig { rule, scope, value_norm, center, normalize_query, ..base };
                        let name = format!("{config:?}");
                        let case = Case::new(config, shape([6, 2], [24, 40], DType::F32), 64, &[1, 100, 30, 65], 2);
                        check_sparse(&case, &name);
                    }
                }
            }
        }
    }
}

#[test]
fn all_shapes_and_dtypes() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        for group in [1, 4, 7, 8] {
            for (dk, dv) in [(64, 64), (80, 80), (96, 33), (128, 128), (256, 17)] {
                let shape = shape([group, 1], [dk, dv], dtype);
                let case = Case::new(config(Scoring::SignProjection, 16, 8), shape, 64, &[130, 63], 1);
                check_sparse(&case, &format!("{dtype:?} G{group} D{dk} Dv{dv}"));
                let got = case.filled().dense_decode(&case.q_view()).unwrap();
                assert_eq!(got.o.dtype(), dtype);
                check_rows(&case, "dense", &got, o_bound(dtype), |b, t, _| (0..case.visible(b, t)).collect());
            }
        }
    }
}

#[test]
fn dense_at_page_edges_and_ranges() {
    for n in [1, 2, 63, 65, 100, 2047, 4100] {
        for page in [64, 1024] {
            let case = Case::new(config(Scoring::Hamming, 2, 8), shape([4, 2], [64, 64], DType::F32), page, &[n], 1);
            let got = case.filled().dense_decode(&case.q_view()).unwrap();
            check_rows(&case, &format!("n {n} page {page}"), &got, 2e-6, |_, _, _| (0..n).collect());
        }
    }
}

#[test]
fn prefill_and_many_query_tokens_equal_exact_attention() {
    for (group, dtype) in [(1, DType::F32), (3, DType::F16), (5, DType::Bf16)] {
        for (n, tq) in [(200, 200), (150, 40), (70, 100), (3, 1)] {
            let shape = shape([2 * group, 2], [40, 24], dtype);
            let case = Case::new(config(Scoring::Hamming, 2, 8), shape, 64, &[n, n / 2, 0], tq);
            let mut cache = case.filled();
            let all = |b: usize, t: usize, _: usize| (0..case.visible(b, t)).collect();
            check_rows(&case, "prefill", &cache.prefill(&case.q_view()).unwrap(), o_bound(dtype), all);
            check_rows(&case, "dense", &cache.dense_decode(&case.q_view()).unwrap(), o_bound(dtype), all);
        }
    }
}

#[test]
fn several_query_tokens_equal_one_by_one() {
    let tq = 5;
    let case = Case::new(config(Scoring::SoftCollision, 10, 8), shape([4, 2], [64, 64], DType::F32), 64, &[200], tq);
    let all = case.filled().decode_with(&case.q_view(), &reporting()).unwrap();
    for t in 0..tq {
        let mut cache = case.filled();
        cache.truncate(0, 200 - tq + t + 1).unwrap();
        let q = TensorView::f32(&case.q.f32s()[t * 256..][..256], [1, 1, 4, 64]);
        let single = cache.decode_with(&q, &reporting()).unwrap();
        assert_eq!(wide(&all.o)[t * 256..][..256], wide(&single.o)[..], "token {t}");
    }
}

/// Tokens `from..to` of the only sequence of an f32 case.
fn push(case: &Case, cache: &mut SocketCache, sequence: usize, from: usize, to: usize) {
    let heads = case.shape.num_kv_heads;
    let part = |x: &Data, dim: usize| x.f32s()[from * heads * dim..to * heads * dim].to_vec();
    let (k, v) = (part(&case.k, case.shape.head_dim), part(&case.v, case.shape.value_dim));
    let shape = |dim| [1, to - from, heads, dim];
    let (k, v) = (TensorView::f32(&k, shape(case.shape.head_dim)), TensorView::f32(&v, shape(case.shape.value_dim)));
    cache.append_to(sequence, &k, &v).unwrap();
}

fn assert_same(case: &Case, cache: &mut SocketCache, name: &str) {
    let got = cache.decode_with(&case.q_view(), &reporting()).unwrap();
    let expected = case.filled().decode_with(&case.q_view(), &reporting()).unwrap();
    let all = |x: &softhash::Attended| {
        let selection = x.selection.as_ref().unwrap();
        (wide(&x.o), wide(&x.lse), wide(&selection.indices), wide(&selection.scores))
    };
    assert_eq!(all(&got), all(&expected), "{name}");
}

fn law_case(center: Option<usize>) -> Case {
    let config = SocketConfig { center, value_norm: true, ..config(Scoring::SignProjection, 16, 8) };
    Case::new(config, shape([4, 2], [64, 48], DType::F32), 64, &[150], 1)
}

#[test]
fn appending_in_pieces_changes_nothing() {
    for center in [None, Some(50)] {
        let case = law_case(center);
        for chunk in [1, 7, 64, 100] {
            let mut cache = case.empty();
            for first in (0..150).step_by(chunk) {
                push(&case, &mut cache, 0, first, (first + chunk).min(150));
            }
            assert_same(&case, &mut cache, &format!("chunks of {chunk}"));
        }
    }
}

#[test]
fn forks_share_pages_and_do_not_disturb_each_other() {
    let case = law_case(Some(100));
    let mut cache = case.empty();
    // Forked while the mean is awaited: hashing later reaches back into shared pages.
    push(&case, &mut cache, 0, 0, 90);
    let before = cache.memory();
    let fork = cache.fork(0).unwrap();
    assert_eq!(cache.memory().keys, before.keys, "a fork copies nothing");
    push(&case, &mut cache, fork, 0, 60);
    push(&case, &mut cache, 0, 90, 150);
    cache.remove(fork).unwrap();
    assert_same(&case, &mut cache, "the first goes on undisturbed");
    let fork = cache.fork(0).unwrap();
    cache.truncate(fork, 70).unwrap();
    push(&case, &mut cache, fork, 70, 150);
    cache.remove(0).unwrap();
    assert_same(&case, &mut cache, "the fork, rolled back and filled anew");
    cache.reset().unwrap();
    assert!(cache.is_empty());
    assert_eq!(cache.memory().keys, 0);
}

#[test]
fn truncating_takes_tokens_back() {
    for center in [None, Some(50)] {
        let case = law_case(center);
        for keep in [0, 20, 63, 64, 100] {
            let mut cache = case.filled();
            cache.truncate(0, keep).unwrap();
            push(&case, &mut cache, 0, keep, 150);
            assert_same(&case, &mut cache, &format!("kept {keep}"));
        }
    }
}

#[test]
fn whole_budget_is_dense() {
    for scoring in SCORINGS {
        let config = SocketConfig { budget: Budget::Ratio(1.0), ..config(scoring, 8, 8) };
        let case = Case::new(config, shape([4, 2], [64, 64], DType::F32), 64, &[300, 5], 1);
        let mut cache = case.filled();
        let sparse = cache.decode(&case.q_view()).unwrap();
        let dense = cache.dense_decode(&case.q_view()).unwrap();
        assert_eq!(wide(&sparse.o), wide(&dense.o));
        assert_eq!(wide(&sparse.lse), wide(&dense.lse));
    }
}

/// `Auto` goes sparse at the lengths of the table in `benches/NOTES.md`: here 4K for short scans, 16K for long ones.
#[test]
fn auto_follows_the_table() {
    for (tables, crossover) in [(16, 4096), (17, 16384)] {
        for (tokens, sparse) in [(crossover - 1, false), (crossover, true)] {
            let config = config(Scoring::Hamming, tables, 8);
            let case = Case::new(config, shape([1, 1], [8, 8], DType::F32), 1024, &[tokens], 1);
            let mut cache = case.filled();
            let [auto, expected] = [Mode::Auto, if sparse { Mode::Sparse } else { Mode::Dense }].map(|mode| {
                let got = cache.decode_with(&case.q_view(), &DecodeOptions { mode, ..reporting() }).unwrap();
                (wide(&got.o), wide(&got.lse), got.selection.is_some())
            });
            assert_eq!(auto, expected, "{tables} tables, {tokens} tokens");
            assert_eq!(auto.2, sparse);
        }
    }
}

#[test]
fn a_profile_names_the_stages_of_a_step() {
    let case = Case::new(config(Scoring::Hamming, 8, 8), shape([2, 1], [16, 16], DType::F32), 64, &[200, 90], 1);
    for (mode, expected) in
        [(Mode::Sparse, &["hash query", "score", "select", "attend"][..]), (Mode::Dense, &["attend"])]
    {
        let stages = case.filled().profile_with(&case.q_view(), &DecodeOptions { mode, ..reporting() }).unwrap();
        let names: Vec<_> = stages.iter().map(|s| s.stage).collect();
        assert_eq!(names, expected);
        assert!(stages.iter().all(|s| s.nanoseconds > 0.0));
    }
}

/// Bytes by part, of one page of 64 tokens: two heads of 16 and 32 channels, 96 bits in 3 words, gain and bias.
#[test]
fn memory_is_counted_by_part() {
    let config = SocketConfig { value_norm: true, ..config(Scoring::SignProjection, 12, 8) };
    let case = Case::new(config, shape([2, 2], [16, 32], DType::F16), 64, &[3], 1);
    let memory = case.filled().memory();
    assert_eq!((memory.keys, memory.values), (64 * 2 * 16 * 2, 64 * 2 * 32 * 2));
    assert_eq!((memory.bits, memory.scalars), (64 * 2 * 3 * 4, 64 * 2 * 2 * 4));
    assert!(memory.workspace >= 96 * 16 * 4, "the hyperplanes at least");
    let parts = [memory.keys, memory.values, memory.bits, memory.scalars, memory.workspace];
    assert_eq!(memory.total(), parts.iter().sum::<u64>());
}

#[test]
fn same_bits_whatever_the_number_of_threads() {
    let shape = shape([8, 2], [128, 128], DType::Bf16);
    let case = Case::new(config(Scoring::SoftCollision, 60, 8), shape, 1024, &[9000], 1);
    let run = |threads: usize, mode: Mode| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let options = DecodeOptions { mode, ..reporting() };
        let got = pool.install(|| case.filled().decode_with(&case.q_view(), &options).unwrap());
        (wide(&got.o), wide(&got.lse))
    };
    for mode in [Mode::Sparse, Mode::Dense] {
        assert_eq!(run(1, mode), run(5, mode));
    }
}

#[test]
fn strided_views_and_reserved_room() {
    let case = Case::new(config(Scoring::Hamming, 8, 8), shape([2, 2], [16, 16], DType::F32), 64, &[90], 1);
    // The same tokens as [head][token][channel], with k and v interleaved.
    let mut both = vec![0.0; 2 * 90 * 32];
    for h in 0..2 {
        for t in 0..90 {
            let (at, from) = ((h * 90 + t) * 32, (t * 2 + h) * 16);
            both[at..at + 16].copy_from_slice(&case.k.f32s()[from..from + 16]);
            both[at + 16..at + 32].copy_from_slice(&case.v.f32s()[from..from + 16]);
        }
    }
    let strides = [2 * 90 * 32, 32, 90 * 32, 1];
    let mut cache = case.empty();
    cache.reserve(90).unwrap();
    let memory = cache.memory();
    let k = TensorView::f32(&both, [1, 90, 2, 16]).with_strides(strides);
    let v = TensorView::f32(&both[16..], [1, 90, 2, 16]).with_strides(strides);
    cache.append(&k, &v).unwrap();
    assert_eq!(cache.memory(), memory, "room was reserved");
    assert_same(&case, &mut cache, "strided");
}
