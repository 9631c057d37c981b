//! The window in pieces.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::GpuWindow;
use super::tests::{context, wave};
use crate::engine::Recording;
use crate::engine::gpu::Context;
use crate::race::config::{Gate, RaceShape};
use crate::race::executor::{Call, InputGradients, Inputs, Pass};
use crate::race::plan::{WindowBudget, window_pieces};
use crate::race::window::{Halved, RingData, WindowCall, WindowExecutor, WindowSpec};
use crate::tensor::{DType, Tensor, TensorView};
use std::sync::Arc;

fn on_gpu(ctx: &Arc<Context>, x: &[f32], shape: &[usize]) -> Tensor {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let buffer = ctx.buffer_with("test", "test", bytemuck::cast_slice(x), usage).unwrap();
    Tensor::gpu(ctx.clone(), DType::F32, shape.to_vec(), buffer)
}

/// However small the pieces, o, the ring and all gradients are those of one piece.
#[test]
fn pieces_add_up_to_the_whole_window() {
    let ctx = context();
    let shape = RaceShape { num_q_heads: 6, num_kv_heads: 3, head_dim: 8, value_dim: 10, dtype: DType::F32 };
    let (batch, tokens, lengths, seen) = (4, 150, vec![150, 64, 0, 129], [7, 100, 3, 0]);
    for window in [5, 40, 200] {
        let gate = Gate::PerHead(vec![0.1, 0.9, 0.5, 1.0, 0.0, 0.4]);
        let spec = WindowSpec { shape, tokens: window, scale: 0.7, gate };
        let mut executor = GpuWindow::new(ctx.clone(), spec).unwrap();
        let of = |heads, dim| [batch, tokens, heads, dim];
        let (q, k) = (wave(batch * tokens * 6 * 8, 0.37), wave(batch * tokens * 3 * 8, 0.71));
        let (v, g) = (wave(batch * tokens * 3 * 10, 0.13), wave(batch * tokens * 6 * 10, 0.53));
        let inputs = Inputs {
            q: Some(TensorView::f32(&q, of(6, 8))),
            k: Some(TensorView::f32(&k, of(3, 8))),
            v: Some(TensorView::f32(&v, of(3, 10))),
            grad_o: Some(TensorView::f32(&g, of(6, 10))),
        };
        let call = Call {
            op: "test",
            pass: Pass::Causal,
            lengths: lengths.clone(),
            tokens,
            output: DType::F32,
            gradients: DType::F32,
            into: None,
        };
        let rows = batch * window * 3;
        let of_ring = |step| RingData { k: wave(rows * 8, step), v: wave(rows * 10, step * 0.7) };
        let mut run = |pairs: usize| -> Vec<Vec<f32>> {
            executor.budget.pairs = pairs;
            let at = WindowCall { call: &call, seen: &seen };
            let before = executor.import("test", &of_ring(0.9), &seen, false).unwrap();
            let mut ring = executor.fork("test", &before).unwrap();
            let prepared = executor.prepare(at, &inputs, &ring).unwrap();
            let o = prepared.run(Recording::Run, &mut ring, None).unwrap().unwrap();
            let race = on_gpu(&ctx, &wave(g.len(), 0.29), &of(6, 10));
            let Halved { race, kept, d_gate } = executor.halve(at, &inputs, &before, race).unwrap();
            let mut grad_ring = executor.import("test", &of_ring(1.3), &seen, true).unwrap();
            let gradients = InputGradients {
                dq: Some(on_gpu(&ctx, &wave(q.len(), 0.2), &of(6, 8))),
                dk: Some(on_gpu(&ctx, &wave(k.len(), 0.3), &of(3, 8))),
                dv: Some(on_gpu(&ctx, &wave(v.len(), 0.4), &of(3, 10))),
            };
            let sums = executor.backward(at, &inputs, &before, kept, &mut grad_ring, gradients).unwrap();
            let (ring, grads) = (executor.export("test", &ring).unwrap(), executor.export("test", &grad_ring).unwrap());
            let tensors = [Some(o), Some(race), Some(d_gate), sums.dq, sums.dk, sums.dv];
            let mut all: Vec<_> = tensors.map(|x| x.unwrap().read_blocking().unwrap().to_f32()).into();
            all.extend([ring.k, ring.v, grads.k, grads.v]);
            all
        };
        let whole = run(1 << 28);
        // Tokens of a piece: 32, and 64 or more.
        for pairs in [1, 6 * (window + 32) * 40, 6 * (window + 32) * 100] {
            for (i, (got, want)) in run(pairs).iter().zip(&whole).enumerate() {
                let far =
                    |(a, b): (&f32, &f32)| (a - b).abs() > 1e-5 * b.abs().max(1.0) * if i == 2 { 10.0 } else { 1.0 };
                assert_eq!(got.iter().zip(want).position(far), None, "window {window}, {pairs} pairs, result {i}");
            }
        }
    }
}

#[test]
fn pieces_of_a_window_cover_each_token_once_and_can_be_bound() {
    for (heads, window, widest) in [(1, 1, 1), (32, 256, 32 * 130), (64, 65536, 64 * 514), (6, 3, 700)] {
        for (batch, tokens) in [(1, 1), (3, 64), (7, 65), (2, 100_000), (300, 1), (5, 4097)] {
            for pairs in [1, 1 << 20, 1 << 28] {
                let budget = WindowBudget { binding: (4 << 30) - 4, pairs };
                let ring = (window * widest * 2) as u64;
                let Ok(pieces) = window_pieces(heads, window, widest, ring, budget, batch, tokens) else {
                    assert!(window * widest * 4 + 512 > (4 << 30) - 4);
                    continue;
                };
                let mut next = vec![0; batch];
                for piece in pieces {
                    // The queries' rows of a piece, or the keys' with those before them.
                    let rows = piece.sequences.len() * (piece.tokens.len() + window - 1).min(tokens);
                    assert!((rows * widest * 4 + 512) as u64 <= budget.binding);
                    assert!(piece.sequences.len() == 1 || piece.sequences.len() as u64 * ring <= budget.binding);
                    for b in piece.sequences {
                        assert_eq!(next[b], piece.tokens.start);
                        next[b] = piece.tokens.end;
                    }
                }
                assert!(next.iter().all(|&n| n == tokens));
            }
        }
    }
}
