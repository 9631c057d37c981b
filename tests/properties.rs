//! Random problems against the f64 reference, and the laws that need no reference, on every path.
//!
//! The stream of problems is the same in every run; `PROPTEST_CASES` asks for more of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::judge::{Judged, judge, read};
use common::problem::{History, Numbers, Problem, any_problem, normal};
use proptest::{
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use softhash::socket::reference as math;
use softhash::{
    Budget, CacheShape, DType, Device, Mode, Rule, SocketCache, SocketConfig, Temperature, TensorView, merge_state,
};

/// Runs `cases` problems of up to `longest` tokens, or as many as `PROPTEST_CASES` says.
fn over_problems(cases: u32, longest: usize, law: impl Fn(Problem) -> Judged) {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(cases);
    let config = Config { cases, max_shrink_iters: 60, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    if let Err(failure) = runner.run(&any_problem(longest), law) {
        panic!("{failure}");
    }
}

fn decode_matches_the_reference(device: &Device, problem: &Problem) -> Judged {
    let data = problem.data();
    let mut cache = problem.cache(device, &data);
    let sparse = read(&cache.decode_with(&data.q.view(), &problem.options(Mode::Sparse)).unwrap());
    judge(device, problem, &data, Mode::Sparse, &sparse)?;
    let again = read(&cache.decode_with(&data.q.view(), &problem.options(Mode::Sparse)).unwrap());
    prop_assert!(sparse.bytes == again.bytes, "the same call gave other bits");
    Ok(())
}

fn exact_attention_matches_the_reference(device: &Device, problem: &Problem) -> Judged {
    let data = problem.data();
    let mut cache = problem.cache(device, &data);
    let dense = read(&cache.decode_with(&data.q.view(), &problem.options(Mode::Dense)).unwrap());
    judge(device, problem, &data, Mode::Dense, &dense)?;
    let mut prompt = problem.clone();
    prompt.output = problem.q_dtype;
    let prefill = read(&cache.prefill(&data.q.view()).unwrap());
    judge(device, &prompt, &data, Mode::Dense, &prefill)
}

/// Batches whose candidate lists pass 128 MiB, the largest binding of many devices: many sequences, then many query
/// tokens of few.
fn batches_larger_than_a_binding(device: &Device) {
    let shape = CacheShape { num_q_heads: 8, num_kv_heads: 2, head_dim: 32, value_dim: 24, dtype: DType::F32 };
    let many: Vec<usize> = (0..300).map(|b| 20 + b * 37 % 181).collect();
    for (lengths, tq) in [(many, 1), (vec![330, 90, 300], 290)] {
        let problem = Problem {
            config: SocketConfig { sink: 2, window: 3, budget: Budget::Tokens(5), ..SocketConfig::fast() },
            shape,
            page_tokens: 64,
            lengths,
            tq,
            q_dtype: DType::F32,
            output: DType::F32,
            history: History::Whole,
            seed: 7,
        };
        decode_matches_the_reference(device, &problem).unwrap();
    }
}

/// As many query tokens as keys, and one more: the first sees nothing.
fn prefill_of_whole_prompts(device: &Device) {
    for (len, dtype) in [(65, DType::F32), (129, DType::F16), (64, DType::Bf16)] {
        let shape = CacheShape { num_q_heads: 4, num_kv_heads: 2, head_dim: 80, value_dim: 64, dtype };
        let problem = Problem {
            config: SocketConfig::fast(),
            shape,
            page_tokens: 64,
            lengths: vec![len, len / 2, 0],
            tq: len + 1,
            q_dtype: dtype,
            output: dtype,
            history: History::Whole,
            seed: len as u64,
        };
        let data = problem.data();
        let mut cache = problem.cache(device, &data);
        let prefill = read(&cache.prefill(&data.q.view()).unwrap());
        judge(device, &problem, &data, Mode::Dense, &prefill).unwrap();
        assert_eq!(prefill.lse[0], f64::NEG_INFINITY);
    }
}

/// Every awkward length, beside head dimensions, group sizes and element types, in ragged batches.
fn sizes_dimensions_and_groups(device: &Device) {
    let table =
        [(64, 1, DType::F32), (80, 4, DType::F16), (96, 8, DType::Bf16), (128, 4, DType::Bf16), (256, 8, DType::F16)];
    for (dim, group, dtype) in table {
        let shape = CacheShape { num_q_heads: 2 * group, num_kv_heads: 2, head_dim: dim, value_dim: dim, dtype };
        let budget = Budget::Tokens(9);
        let config = SocketConfig { center: None, budget, sink: 4, window: 8, ..SocketConfig::fast() };
        let problem = Problem {
            config,
            shape,
            page_tokens: 64,
            lengths: vec![1, 2, 63, 65, 100, 2047],
            tq: 1,
            q_dtype: dtype,
            output: dtype,
            history: History::Whole,
            seed: dim as u64,
        };
        let data = problem.data();
        let mut cache = problem.cache(device, &data);
        for mode in [Mode::Sparse, Mode::Dense] {
            let found = read(&cache.decode_with(&data.q.view(), &problem.options(mode)).unwrap());
            judge(device, &problem, &data, mode, &found).unwrap_or_else(|e| panic!("{dim} {group} {dtype:?}: {e}"));
        }
    }
}

/// Appends in chunks, a truncated tail and a fork leave the same content: the same selection, the same output.
fn histories_agree(device: &Device, problem: &Problem) -> Judged {
    let data = problem.data();
    let histories = [History::Whole, History::Chunks, History::Truncated, History::Forked];
    for history in histories {
        let problem = Problem { history, ..problem.clone() };
        let mut cache = problem.cache(device, &data);
        let sparse = read(&cache.decode_with(&data.q.view(), &problem.options(Mode::Sparse)).unwrap());
        judge(device, &problem, &data, Mode::Sparse, &sparse)
            .map_err(|e| TestCaseError::fail(format!("{history:?}: {e}")))?;
    }
    Ok(())
}

/// A budget of all keys gives what exact attention gives.
fn full_budget_is_dense(device: &Device, problem: &Problem) -> Judged {
    let mut problem = problem.clone();
    problem.config.budget = Budget::Tokens(problem.lengths.iter().copied().max().unwrap_or(0).max(1));
    problem.output = DType::F32;
    let data = problem.data();
    let mut cache = problem.cache(device, &data);
    let sparse = read(&cache.decode_with(&data.q.view(), &problem.options(Mode::Sparse)).unwrap());
    let dense = read(&cache.decode_with(&data.q.view(), &problem.options(Mode::Dense)).unwrap());
    let largest = dense.o.iter().map(|x| x.abs()).fold(0.0, f64::max);
    for (a, b) in sparse.o.iter().zip(&dense.o) {
        prop_assert!((a - b).abs() <= 1e-5 * largest, "{a} and {b}");
    }
    for (a, b) in sparse.lse.iter().zip(&dense.lse) {
        prop_assert!(a == b || (a - b).abs() <= 1e-5 * b.abs().max(1.0), "lse {a} and {b}");
    }
    Ok(())
}

/// Attention over two halves merges to that over the whole; the order is free; an empty half changes nothing.
fn states_merge(device: &Device) {
    let shape = CacheShape { num_q_heads: 4, num_kv_heads: 2, head_dim: 64, value_dim: 80, dtype: DType::F32 };
    let (n, cut) = (300, 77);
    let k = normal(5, 0, n * 2 * 64);
    let v = normal(5, 1, n * 2 * 80);
    let q = normal(5, 2, 4 * 64);
    let q = TensorView::f32(&q, [1, 1, 4, 64]);
    let attend = |tokens: std::ops::Range<usize>| {
        let mut cache = SocketCache::new(device, SocketConfig::fast(), shape, 1).unwrap();
        let part = |x: &[f32], dim: usize| {
            let dims = [1, tokens.len(), 2, dim];
            Numbers::new(&x[tokens.start * 2 * dim..tokens.end * 2 * dim], DType::F32, dims, 0)
        };
        let (k, v) = (part(&k, 64), part(&v, 80));
        cache.append(&k.view(), &v.view()).unwrap();
        let attended = cache.dense_decode(&q).unwrap();
        (attended.o.read_blocking().unwrap().to_f32(), attended.lse.read_blocking().unwrap().to_f32())
    };
    let merge = |a: &(Vec<f32>, Vec<f32>), b: &(Vec<f32>, Vec<f32>)| {
        let view = |x: &'static str, data| match x {
            "o" => TensorView::f32(data, [1, 1, 4, 80]),
            _ => TensorView::f32(data, [1, 1, 4, 1]),
        };
        let merged =
            merge_state(device, &view("o", &a.0), &view("lse", &a.1), &view("o", &b.0), &view("lse", &b.1)).unwrap();
        (merged.0.read_blocking().unwrap().to_f32(), merged.1.read_blocking().unwrap().to_f32())
    };
    let close = |a: &(Vec<f32>, Vec<f32>), b: &(Vec<f32>, Vec<f32>), bound: f32| {
        let all = a.0.iter().zip(&b.0).chain(a.1.iter().zip(&b.1));
        all.map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() }).fold(0.0, f32::max) <= bound
    };
    let (whole, first, second, none) = (attend(0..n), attend(0..cut), attend(cut..n), attend(0..0));
    assert!(none.0.iter().all(|&x| x == 0.0) && none.1.iter().all(|&x| x == f32::NEG_INFINITY), "{none:?}");
    assert!(close(&merge(&first, &second), &whole, 5e-6));
    assert!(close(&merge(&second, &first), &merge(&first, &second), 1e-6));
    assert!(close(&merge(&whole, &none), &whole, 1e-7));
    assert!(close(&merge(&none, &whole), &whole, 1e-7));
    assert!(close(&merge(&none, &none), &none, 0.0));
    let widen = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    for h in 0..4 {
        let row = |x: &[f32]| widen(&x[h * 80..(h + 1) * 80]);
        let (lse1, lse2) = (f64::from(first.1[h]), f64::from(second.1[h]));
        let (o, lse) = math::merge(&row(&first.0), lse1, &row(&second.0), lse2);
        let got = merge(&first, &second);
        let worst = o.iter().zip(row(&got.0)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-6 && (lse - f64::from(got.1[h])).abs() < 1e-6, "off by {worst:e}");
    }
}

mod cpu {
    use super::*;

    #[test]
    fn decode() {
        over_problems(48, 2047, |problem| decode_matches_the_reference(&Device::cpu(), &problem));
    }

    #[test]
    fn exact_attention() {
        over_problems(32, 2047, |problem| exact_attention_matches_the_reference(&Device::cpu(), &problem));
    }

    #[test]
    fn prefill() {
        prefill_of_whole_prompts(&Device::cpu());
    }

    #[test]
    fn large_batches() {
        batches_larger_than_a_binding(&Device::cpu());
    }

    #[test]
    fn sizes() {
        sizes_dimensions_and_groups(&Device::cpu());
    }

    #[test]
    fn histories() {
        over_problems(12, 300, |problem| histories_agree(&Device::cpu(), &problem));
    }

    #[test]
    fn full_budget() {
        over_problems(24, 700, |problem| full_budget_is_dense(&Device::cpu(), &problem));
    }

    #[test]
    fn merge() {
        states_merge(&Device::cpu());
    }
}

#[cfg(feature = "wgpu")]
mod gpu {
    use super::*;
    use common::device::gpu;

    #[test]
    fn decode() {
        let device = gpu();
        over_problems(16, 2047, |problem| decode_matches_the_reference(&device, &problem));
    }

    #[test]
    fn exact_attention() {
        let device = gpu();
        over_problems(8, 1000, |problem| exact_attention_matches_the_reference(&device, &problem));
    }

    #[test]
    fn prefill() {
        prefill_of_whole_prompts(&gpu());
    }

    #[test]
    fn large_batches() {
        batches_larger_than_a_binding(&gpu());
    }

    #[test]
    fn sizes() {
        sizes_dimensions_and_groups(&gpu());
    }

    #[test]
    fn histories() {
        let device = gpu();
        over_problems(3, 300, |problem| histories_agree(&device, &problem));
    }

    #[test]
    fn full_budget() {
        let device = gpu();
        over_problems(4, 300, |problem| full_budget_is_dense(&device, &problem));
    }

    #[test]
    fn merge() {
        states_merge(&gpu());
    }
}

/// The reference against itself: both forms of the soft hash, its laws, the selection's rules, the merge.
mod reference {
    use super::*;

    fn numbers(seed: u64, n: usize) -> Vec<f64> {
        normal(seed, 9, n).into_iter().map(f64::from).collect()
    }

    #[test]
    fn both_forms_of_the_soft_hash_agree() {
        for planes in 1..=10 {
            for beta in [0.125, 1.0, 8.0] {
                let projections: Vec<f64> = numbers(planes as u64, 3 * planes).iter().map(|u| u * 4.0).collect();
                let product = math::soft_hash(&projections, planes, beta);
                let corners = math::soft_hash_by_corners(&projections, planes, beta);
                let worst = product.iter().zip(&corners).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(worst < 1e-14, "planes {planes}, beta {beta}: {worst:e}");
                for table in product.chunks(1 << planes) {
                    assert!((table.iter().sum::<f64>() - 1.0).abs() < 1e-13);
                }
                // The heaviest bucket is the query's own.
                let codes = math::codes(&projections, planes);
                for (table, code) in product.chunks(1 << planes).zip(codes) {
                    assert!(table.iter().all(|x| *x <= table[code]));
                }
            }
        }
    }

    #[test]
    fn plane_zero_is_the_most_significant_bit() {
        assert_eq!(math::codes(&[1.0, -1.0, -1.0, 0.0, 0.5, -0.5], 3), [0b100, 0b110]);
    }

    #[test]
    fn selection_follows_its_rules() {
        let scores = [9.0, 1.0, 5.0, 5.0, 5.0, 0.0, 8.0, 7.0];
        assert_eq!(math::select(&scores, Rule::Disjoint, 1, 1, 2), [0, 2, 6, 7], "a tie goes to the lower index");
        assert_eq!(math::select(&scores, Rule::Union, 1, 1, 2), [0, 6, 7], "key 0 takes a place of the budget");
        assert_eq!(math::select(&scores, Rule::Union, 0, 0, 4), [0, 2, 6, 7]);
        assert_eq!(math::select(&scores, Rule::Disjoint, 3, 3, 2), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(math::select(&scores, Rule::Disjoint, 0, 3, 0), [5, 6, 7]);
        assert!(math::select(&[], Rule::Union, 1, 1, 1).is_empty());
    }

    #[test]
    fn budgets_round_up_and_count_sink_and_window() {
        let config = SocketConfig { sink: 2, window: 3, budget: Budget::Ratio(1.0 / 33.0), ..SocketConfig::paper() };
        assert_eq!([33, 165, 166, 330, 331].map(|n| math::heavy(&config, n)), [0, 0, 1, 5, 6]);
        let config = SocketConfig { budget: Budget::Tokens(7), ..config };
        assert_eq!([1, 1000].map(|n| math::heavy(&config, n)), [7, 7]);
        assert!((Temperature::Tau(0.3).beta(64) - 1.0 / 2.4).abs() < 1e-7);
    }

    #[test]
    fn an_empty_set_attends_to_nothing_and_merges_away() {
        let (o, lse) = math::attend(&[1.0, 2.0], &[], &[], &[], 1.0, 3);
        assert_eq!((o.as_slice(), lse), (&[0.0; 3][..], f64::NEG_INFINITY));
        assert_eq!(math::merge(&o, lse, &o, lse), (vec![0.0; 3], f64::NEG_INFINITY));
        assert_eq!(math::merge(&[1.0, 2.0], 0.5, &[0.0, 0.0], f64::NEG_INFINITY), (vec![1.0, 2.0], 0.5));
    }

    #[test]
    fn parts_merge_to_the_whole() {
        let (keys, values, q) = (numbers(1, 40 * 8), numbers(2, 40 * 5), numbers(3, 8));
        let keys: Vec<&[f64]> = keys.chunks(8).collect();
        let values: Vec<&[f64]> = values.chunks(5).collect();
        let attend = |set: &[usize]| math::attend(&q, &keys, &values, set, 0.3, 5);
        let all: Vec<usize> = (0..40).collect();
        let (even, odd): (Vec<usize>, Vec<usize>) = all.iter().partition(|j| *j % 2 == 0);
        let ((o1, lse1), (o2, lse2), (o, lse)) = (attend(&even), attend(&odd), attend(&all));
        let merged = math::merge(&o1, lse1, &o2, lse2);
        let worst = merged.0.iter().zip(&o).map(|(a, b)| (a - b).abs()).fold((merged.1 - lse).abs(), f64::max);
        assert!(worst < 1e-14, "{worst:e}");
    }

    #[test]
    fn the_sign_projection_is_exact_along_a_plane() {
        // With orthogonal rows of norm √d and a key along one of them, sign bits and gain give the key back.
        let dim = 16;
        let rows: Vec<f64> = (0..dim * dim).map(|i| if i / dim == i % dim { 4.0 } else { 0.0 }).collect();
        let key: Vec<f64> = (0..dim).map(|d| if d % 3 == 0 { -0.5 } else { 0.5 }).collect();
        let q = numbers(4, dim);
        let (u, w) = (math::project(&rows, &key), math::project(&rows, &q));
        let estimate = math::sign_projection(0.0, &w, &u, math::sign_gain(&key, &u));
        assert!((estimate - math::dot(&q, &key)).abs() < 1e-12);
        assert!(math::sign_variance(&q, &key, &u).abs() < 1e-12);
    }
}
