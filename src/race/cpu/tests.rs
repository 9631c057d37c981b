//! Every instruction set gives what the best one gives.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::race::config::{Beta, Normalization};
use crate::race::executor::Pass;
use crate::tensor::TensorView;

fn noise(seed: u32, n: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as f32 / u32::MAX as f32 - 0.5
    };
    (0..n).map(|_| next()).collect()
}

/// o, the gradients of the inputs, and those of the parameters.
fn results(level: Level, config: &RaceConfig, shape: &RaceShape) -> Vec<Vec<f32>> {
    let parameters = Parameters::new(config, shape).unwrap();
    let mut race = CpuRace::with_level(level, config, shape, &parameters).unwrap();
    let t = 77;
    let of = |heads, dim| [1, t, heads, dim];
    let (hq, hkv, d, dv) = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.value_dim);
    let (q, k) = (noise(1, t * hq * d), noise(2, t * hkv * d));
    let (v, g) = (noise(3, t * hkv * dv), noise(4, t * hq * dv));
    let inputs = Inputs {
        q: Some(TensorView::f32(&q, of(hq, d))),
        k: Some(TensorView::f32(&k, of(hkv, d))),
        v: Some(TensorView::f32(&v, of(hkv, dv))),
        grad_o: Some(TensorView::f32(&g, of(hq, dv))),
    };
    let call = Call {
        op: "test",
        pass: Pass::Causal,
        lengths: vec![t],
        tokens: t,
        output: DType::F32,
        gradients: DType::F32,
        into: None,
    };
    let mut state = race.new_state("test", 1).unwrap();
    let o = race.forward(Recording::Run, &call, &inputs, &mut state).unwrap().unwrap();
    let (start, mut gradient) = (race.new_state("test", 1).unwrap(), race.new_state("test", 1).unwrap());
    let mut sums = race.new_sums("test").unwrap();
    let back = race.backward(&call, &inputs, &start, &mut gradient, &mut sums).unwrap();
    let (beta, planes) = race.finish_sums("test", sums).unwrap();
    let read = |x: Option<Tensor>| x.unwrap().read_blocking().unwrap().to_f32();
    vec![read(Some(o)), read(back.dq), read(back.dk), read(back.dv), read(Some(beta)), read(Some(planes))]
}

#[test]
fn every_level_agrees() {
    for normalization in [Normalization::Ratio, Normalization::BucketMean] {
        for (tables, planes, head_dim, value_dim) in [(2, 2, 64, 48), (3, 3, 33, 7)] {
            let beta = Beta::Shared(1.0);
            let config = RaceConfig { tables, planes, ensembles: 2, beta, normalization, ..RaceConfig::default() };
            let shape = RaceShape { num_q_heads: 4, num_kv_heads: 2, head_dim, value_dim, dtype: DType::F32 };
            let want = results(Level::best(), &config, &shape);
            for level in Level::available() {
                for (i, (got, want)) in results(level, &config, &shape).iter().zip(&want).enumerate() {
                    let size = want.iter().map(|x| x * x).sum::<f32>().sqrt();
                    let off = got.iter().zip(want).map(|(x, y)| (x - y) * (x - y)).sum::<f32>().sqrt();
                    // The gradient of β is one number that large parts cancel in.
                    let bound = if i == 4 { 1e-3 } else { 1e-5 };
                    assert!(off <= bound * size, "{level:?} result {i}: {off} of {size}");
                }
            }
        }
    }
}
