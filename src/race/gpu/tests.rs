//! Every variant of every shader.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::kernels::{Kernel, Key};
use super::params::Params;
use crate::engine::gpu::KernelKey;
use crate::engine::gpu::shader_tests::{same_layout, stays_in_limits, structs, validates_and_translates};
use crate::race::plan::Geometry;
use crate::tensor::DType;

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
        add(Kernel::Project { per_head: 1 });
        add(Kernel::Project { per_head: geometry.group });
        add(Kernel::ChunkSums);
        add(Kernel::StepMass);
        [DType::F32, DType::F16, DType::Bf16].map(|output| add(Kernel::Step { output }));
        for flag in [true, false] {
            add(Kernel::Scan { reverse: flag });
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                add(Kernel::Output { output: dtype, read: flag });
                add(Kernel::Statistics { grad: dtype, read: flag });
            }
        }
    }
    keys.sort_by_key(KernelKey::label);
    keys.dedup_by_key(|key| key.label());
    keys
}

#[test]
fn every_variant_validates_and_translates() {
    keys().iter().for_each(|key| validates_and_translates(key));
}

#[test]
fn bindings_and_workgroup_memory_stay_in_limits() {
    keys().iter().for_each(|key| stays_in_limits(key));
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
