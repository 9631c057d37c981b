//! Every variant of every shader.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::GpuRace;
use super::kernels::{Kernel, Key};
use super::params::Params;
use super::window_kernels::{WindowKernel, WindowKey, WindowParams};
use crate::engine::Recording;
use crate::engine::gpu::shader_tests::{
    WORKGROUP_MEMORY, same_layout, stays_in_limits, structs, validates_and_translates,
};
use crate::engine::gpu::{Context, KernelKey};
use crate::race::config::{Parameters, RaceConfig, RaceShape};
use crate::race::executor::{Call, Inputs, Pass, RaceExecutor};
use crate::race::plan::Geometry;
use crate::race::window::WindowGeometry;
use crate::tensor::{DType, TensorView};
use std::sync::Arc;

fn geometries() -> Vec<Geometry> {
    let mut all = Vec::new();
    for (heads, dims, (ensembles, tables, planes)) in [
        ((32, 8), (128, 128), (1, 4, 4)),
        ((8, 1), (256, 256), (2, 2, 2)),
        ((4, 4), (64, 80), (1, 1, 1)),
        ((3, 1), (5, 7), (1, 3, 3)),
        ((6, 2), (96, 64), (1, 64, 6)),
        ((2, 1), (512, 512), (1, 16, 8)),
        ((16, 1), (80, 1), (3, 20, 5)),
        ((1, 1), (1, 129), (1, 2, 7)),
    ] {
        for ratio in [true, false] {
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                all.push(Geometry {
                    num_q_heads: heads.0,
                    num_kv_heads: heads.1,
                    group: heads.0 / heads.1,
                    head_dim: dims.0,
                    value_dim: dims.1,
                    dtype,
                    tables,
                    planes,
                    ensembles,
                    ratio,
                });
            }
        }
    }
    all
}

fn keys() -> Vec<Key> {
    let mut keys = Vec::new();
    for geometry in geometries() {
        let mut add = |kernel| keys.push(Key { kernel, geometry });
        super::backward_kernels::every(&geometry).into_iter().for_each(|kernel| add(Kernel::Backward(kernel)));
        for wide in [false, geometry.head_dim.is_multiple_of(4)] {
            add(Kernel::Project { per_head: 1, wide });
            add(Kernel::Project { per_head: geometry.group, wide });
        }
        add(Kernel::ChunkSums { wide: false });
        add(Kernel::ChunkSums { wide: geometry.value_dim.is_multiple_of(4) });
        add(Kernel::StepMass);
        for flag in [true, false] {
            add(Kernel::Scan { reverse: flag });
            add(Kernel::ScanParts { reverse: flag });
            add(Kernel::ScanSpread { reverse: flag });
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                add(Kernel::Step { output: dtype });
                add(Kernel::Output { output: dtype, read: flag });
                for wide in [false, geometry.value_dim.is_multiple_of(4)] {
                    if geometry.ratio {
                        add(Kernel::OutputRatio { output: dtype, read: flag, wide, wide_out: wide });
                    }
                }
            }
        }
    }
    keys.sort_by_key(KernelKey::label);
    keys.dedup_by_key(|key| key.label());
    keys
}

fn window_keys() -> Vec<WindowKey> {
    let mut keys = Vec::new();
    for (num_q_heads, num_kv_heads, head_dim, value_dim) in
        [(32, 8, 128, 128), (4, 4, 64, 80), (3, 1, 5, 7), (2, 1, 512, 512), (16, 1, 1, 129)]
    {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let geometry = WindowGeometry { num_q_heads, num_kv_heads, head_dim, value_dim, dtype };
            keys.extend(WindowKernel::every(&geometry).into_iter().map(|kernel| WindowKey { kernel, geometry }));
        }
    }
    keys.sort_by_key(KernelKey::label);
    keys.dedup_by_key(|key| key.label());
    keys
}

#[test]
fn every_variant_validates_and_translates() {
    keys().iter().for_each(|key| validates_and_translates(key));
    window_keys().iter().for_each(|key| validates_and_translates(key));
}

#[test]
fn bindings_and_workgroup_memory_stay_in_limits() {
    keys().iter().for_each(|key| stays_in_limits(key, WORKGROUP_MEMORY));
    window_keys().iter().for_each(|key| stays_in_limits(key, WORKGROUP_MEMORY));
}

#[test]
fn structs_have_the_offsets_of_their_rust_twins() {
    let keys = keys();
    let seen = structs(keys.iter().map(|key| key as &dyn KernelKey));
    same_layout!(
        seen,
        "Params",
        Params,
        [
            groups,
            group_width,
            batch,
            tokens,
            head,
            heads,
            chunks,
            slots,
            planes_at,
            planes_stride,
            q_at,
            k_at,
            out_at,
            out_batch,
            state_at,
            flags,
            scale,
            zero,
            parts_at,
        ],
        input.offset => "in_offset",
        input.batch => "in_batch",
        input.token => "in_token",
        input.head => "in_head",
        input2.offset => "in2_offset",
        input2.batch => "in2_batch",
        input2.token => "in2_token",
        input2.head => "in2_head",
        input3.offset => "in3_offset",
        input3.batch => "in3_batch",
        input3.token => "in3_token",
        input3.head => "in3_head",
    );
    let keys = window_keys();
    let seen = structs(keys.iter().map(|key| key as &dyn KernelKey));
    same_layout!(
        seen,
        "Params",
        WindowParams,
        [
            groups,
            group_width,
            batch,
            tokens,
            first,
            in_first,
            in2_first,
            flags,
            out_at,
            out_batch,
            out2_at,
            out2_batch,
            ring_at,
            keep_at,
            keep_batch,
            scale,
            zero,
            window,
        ],
        input.offset => "in_offset",
        input.batch => "in_batch",
        input.token => "in_token",
        input.head => "in_head",
        input2.offset => "in2_offset",
        input2.batch => "in2_batch",
        input2.token => "in2_token",
        input2.head => "in2_head",
        input3.offset => "in3_offset",
        input3.batch => "in3_batch",
        input3.token => "in3_token",
        input3.head => "in3_head",
    );
}

pub(super) fn context() -> Arc<Context> {
    // With run-time checks: what reaches outside a buffer reads zero, and shows.
    crate::engine::gpu::tests::context(false)
}

pub(super) fn wave(count: usize, step: f32) -> Vec<f32> {
    (0..count).map(|i| (i as f32 * step).sin()).collect()
}

/// However small the pieces, on whichever blocks of heads, results are those of one piece.
#[test]
fn pieces_add_up_to_the_whole() {
    let ctx = context();
    let shape = RaceShape { num_q_heads: 6, num_kv_heads: 3, head_dim: 8, value_dim: 10, dtype: DType::F32 };
    for (causal, ensembles) in [(true, 1), (false, 1), (true, 2)] {
        let config = RaceConfig { tables: 2, planes: 3, causal, ensembles, ..RaceConfig::default() };
        let parameters = Parameters::new(&config, &shape).unwrap();
        let mut race = GpuRace::new(ctx.clone(), &config, &shape, &parameters).unwrap();
        let (batch, tokens) = (3, 330);
        let lengths = vec![330, 64, 129];
        let q = wave(batch * tokens * 6 * 8, 0.37);
        let k = wave(batch * tokens * 3 * 8, 0.71);
        let v = wave(batch * tokens * 3 * 10, 0.13);
        let (q, k) = (TensorView::f32(&q, [batch, tokens, 6, 8]), TensorView::f32(&k, [batch, tokens, 3, 8]));
        let v = TensorView::f32(&v, [batch, tokens, 3, 10]);
        let mut run = |rows: usize| {
            race.budget.rows = rows;
            let passes = if causal { vec![Pass::Causal] } else { vec![Pass::Absorb, Pass::Read] };
            let mut state = race.new_state("test", batch).unwrap();
            let mut o = None;
            for pass in passes {
                let call = Call {
                    op: "test",
                    pass,
                    lengths: lengths.clone(),
                    tokens,
                    output: DType::F32,
                    gradients: DType::F32,
                    into: None,
                };
                let inputs = Inputs { q: Some(q), k: Some(k), v: Some(v), grad_o: None };
                o = race.forward(Recording::Run, &call, &inputs, &mut state).unwrap();
            }
            let o = o.unwrap().read_blocking().unwrap().to_f32();
            (o, race.export("test", &state).unwrap())
        };
        let whole = run(1 << 16);
        // A chunk of one head, of two heads, of all; several chunks; several sequences.
        for rows in [64, 128, 192, 400, 64 * 3 * 6 * 2] {
            let (o, state) = run(rows);
            let far = |a: f64, b: f64| (a - b).abs() > 1e-5;
            let wrong = o.iter().zip(&whole.0).position(|(a, b)| far((*a).into(), (*b).into()));
            assert_eq!(wrong, None, "{rows} rows, causal {causal}: o");
            let wrong = state.b.iter().zip(&whole.1.b).position(|(a, b)| far(*a, *b));
            assert_eq!(wrong, None, "{rows} rows, causal {causal}: B");
            let wrong = state.a.iter().zip(&whole.1.a).position(|(a, b)| far(*a, *b));
            assert_eq!(wrong, None, "{rows} rows, causal {causal}: A");
        }
    }
}
