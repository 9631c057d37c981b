//! Backward passes in pieces.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::GpuRace;
use super::tests::{context, wave};
use crate::engine::Recording;
use crate::race::config::{Beta, Normalization, Parameters, RaceConfig, RaceShape};
use crate::race::executor::{Call, Inputs, Pass, RaceExecutor, StateData};
use crate::tensor::{DType, TensorView};

fn error(x: &[f64], y: &[f64]) -> f64 {
    assert_eq!(x.len(), y.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut x.iter().zip(y).map(|(x, y)| x - y)) / norm(&mut y.iter().copied())
}

/// A state, and the gradient of one.
fn states(race: &GpuRace, batch: usize) -> [StateData; 2] {
    let n = batch * race.geometry.units() * race.geometry.buckets();
    let of = |offset: f64, step: f32| {
        let wide = |n, step| wave(n, step).into_iter().map(f64::from).collect::<Vec<_>>();
        let a = wide(n, step).into_iter().map(|x| x + offset).collect();
        StateData { a, b: wide(n * race.geometry.value_dim, step * 0.7) }
    };
    [of(2.0, 0.9), of(0.0, 1.3)]
}

/// However small the pieces, on whichever blocks of heads, gradients are those of one piece.
#[test]
fn pieces_add_up_to_the_whole_backwards() {
    let ctx = context();
    let shape = RaceShape { num_q_heads: 6, num_kv_heads: 3, head_dim: 8, value_dim: 10, dtype: DType::F32 };
    let (batch, tokens, lengths) = (3, 330, vec![330, 64, 129]);
    for (causal, ensembles, normalization) in [
        (true, 1, Normalization::Ratio),
        (false, 1, Normalization::BucketMean),
        (true, 2, Normalization::BucketMean),
        (false, 2, Normalization::Ratio),
    ] {
        let beta = Beta::PerHead(vec![0.3, 1.0, 3.0]);
        let config =
            RaceConfig { tables: 2, planes: 3, causal, ensembles, normalization, beta, ..RaceConfig::default() };
        let parameters = Parameters::new(&config, &shape).unwrap();
        let mut race = GpuRace::new(ctx.clone(), &config, &shape, &parameters).unwrap();
        let [q, g] = [(8, 0.37), (10, 0.53)].map(|(dim, step)| wave(batch * tokens * 6 * dim, step));
        let [k, v] = [(8, 0.71), (10, 0.13)].map(|(dim, step)| wave(batch * tokens * 3 * dim, step));
        let view = |x, heads, dim| Some(TensorView::f32(x, [batch, tokens, heads, dim]));
        let all = Inputs { q: view(&q, 6, 8), k: view(&k, 3, 8), v: view(&v, 3, 10), grad_o: view(&g, 6, 10) };
        let mut run = |rows: usize| {
            race.budget.rows = rows;
            let [initial, arriving] = states(&race, batch);
            let mut state = race.import("test", &initial).unwrap();
            let mut gradient = race.import("test", &arriving).unwrap();
            let mut sums = race.new_sums("test").unwrap();
            let call = |pass| Call {
                op: "test",
                pass,
                lengths: lengths.clone(),
                tokens,
                output: DType::F32,
                gradients: DType::F32,
                into: None,
            };
            let found = if causal {
                vec![race.backward(&call(Pass::Causal), &all, &state, &mut gradient, &mut sums).unwrap()]
            } else {
                let absorbed = Inputs { q: None, grad_o: None, ..all };
                let read = Inputs { k: None, v: None, ..all };
                race.forward(Recording::Run, &call(Pass::Absorb), &absorbed, &mut state).unwrap();
                let dq = race.backward(&call(Pass::Read), &read, &state, &mut gradient, &mut sums).unwrap();
                vec![dq, race.backward(&call(Pass::Absorb), &absorbed, &state, &mut gradient, &mut sums).unwrap()]
            };
            let (dbeta, dplanes) = race.finish_sums("test", sums).unwrap();
            let mut tensors = vec![dbeta, dplanes];
            tensors.extend(found.into_iter().flat_map(|f| [f.dq, f.dk, f.dv]).flatten());
            assert_eq!(tensors.len(), 5);
            let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<_>>();
            let mut out: Vec<_> = tensors.iter().map(|x| wide(x.read_blocking().unwrap().to_f32())).collect();
            let StateData { a, b } = race.export("test", &gradient).unwrap();
            out.extend([a, b]);
            if causal {
                // The state that the call was given stays.
                assert!(error(&race.export("test", &state).unwrap().b, &initial.b) < 1e-14);
            }
            out
        };
        let whole = run(1 << 16);
        // A chunk of one head, of two heads, of all; several chunks; several sequences.
        for rows in [64, 128, 192, 400, 64 * 3 * 6 * 2] {
            let names = ["dbeta", "dplanes", "dq or dk", "dk or dv", "dv or dq", "dA", "dB"];
            for ((name, got), want) in names.iter().zip(run(rows)).zip(&whole) {
                let e = error(&got, want);
                assert!(e < 1e-5, "{rows} rows, causal {causal}, {normalization:?}: {name} is off by {e:.1e}");
            }
        }
    }
}

/// Passes over nothing change nothing, and sums of nothing are zero.
#[test]
fn empty_sequences_give_zeros() {
    let shape = RaceShape { num_q_heads: 2, num_kv_heads: 1, head_dim: 4, value_dim: 3, dtype: DType::F32 };
    let config = RaceConfig { tables: 1, planes: 2, ..RaceConfig::default() };
    let parameters = Parameters::new(&config, &shape).unwrap();
    let mut race = GpuRace::new(context(), &config, &shape, &parameters).unwrap();
    let x = wave(2 * 5 * 2 * 4, 0.4);
    let view = |heads, dim| Some(TensorView::f32(&x[..2 * 5 * heads * dim], [2, 5, heads, dim]));
    let inputs = Inputs { q: view(2, 4), k: view(1, 4), v: view(1, 3), grad_o: view(2, 3) };
    let [initial, arriving] = states(&race, 2);
    let state = race.import("test", &initial).unwrap();
    let mut gradient = race.import("test", &arriving).unwrap();
    let before = race.export("test", &gradient).unwrap();
    let mut sums = race.new_sums("test").unwrap();
    let call = Call {
        op: "test",
        pass: Pass::Causal,
        lengths: vec![0, 0],
        tokens: 5,
        output: DType::F32,
        gradients: DType::F32,
        into: None,
    };
    let found = race.backward(&call, &inputs, &state, &mut gradient, &mut sums).unwrap();
    assert_eq!(race.export("test", &gradient).unwrap(), before);
    let (dbeta, dplanes) = race.finish_sums("test", sums).unwrap();
    for x in [Some(dbeta), Some(dplanes), found.dq, found.dk, found.dv].into_iter().flatten() {
        assert!(x.read_blocking().unwrap().to_f32().iter().all(|&x| x == 0.0));
    }
}
