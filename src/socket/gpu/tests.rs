//! Every variant of every shader.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::kernels::{Kernel, Key};
use super::merge::MergeKey;
use super::params::{Entry, Item, Params, Row};
use crate::engine::gpu::KernelKey;
use crate::engine::gpu::shader_tests::{same_layout, stays_in_limits, structs, validates_and_translates};
use crate::socket::config::{CacheShape, Rule, Scoring, SelectionScope, SocketConfig};
use crate::socket::plan::Geometry;
use crate::socket::problem::CacheSpec;
use crate::tensor::DType;

fn geometries() -> Vec<Geometry> {
    let mut all = Vec::new();
    let mut add = |config: SocketConfig, heads: (usize, usize), dims: (usize, usize), dtype, page_tokens| {
        let shape =
            CacheShape { num_q_heads: heads.0, num_kv_heads: heads.1, head_dim: dims.0, value_dim: dims.1, dtype };
        let geometry = Geometry::new(&CacheSpec { config, shape, page_tokens });
        all.push(geometry);
        all.push(Geometry { subgroups: true, ..geometry });
    };
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        add(SocketConfig::paper(), (32, 8), (128, 128), dtype, 1024);
        add(SocketConfig::fast(), (8, 1), (256, 256), dtype, 64);
    }
    for (heads, dims) in
        [((4, 4), (64, 80)), ((6, 2), (96, 64)), ((16, 1), (80, 128)), ((3, 1), (5, 7)), ((2, 1), (512, 512))]
    {
        add(SocketConfig::paper(), heads, dims, DType::F32, 64);
        add(SocketConfig::fast(), heads, dims, DType::Bf16, 4096);
    }
    for scoring in [Scoring::SoftCollision, Scoring::SignProjection, Scoring::HardCollision, Scoring::Hamming] {
        for scope in [SelectionScope::PerHead, SelectionScope::PerGroup] {
            for (rule, value_norm, center) in [(Rule::Disjoint, true, Some(100)), (Rule::Union, false, None)] {
                let normalize_query = value_norm;
                let config =
                    SocketConfig { scoring, scope, rule, value_norm, center, normalize_query, ..SocketConfig::paper() };
                add(config, (32, 8), (128, 128), DType::Bf16, 1024);
            }
        }
    }
    for planes in 1..=16 {
        let config = SocketConfig { planes, tables: 480 / planes, ..SocketConfig::paper() };
        add(config, (8, 2), (64, 64), DType::F16, 256);
    }
    all
}

fn keys() -> Vec<Box<dyn KernelKey>> {
    let mut keys: Vec<Box<dyn KernelKey>> = Vec::new();
    let dtypes = [DType::F32, DType::F16, DType::Bf16];
    for (o1, o2) in dtypes.iter().flat_map(|a| dtypes.map(|b| (*a, b))) {
        keys.push(Box::new(MergeKey { o1, o2 }));
    }
    for geometry in geometries() {
        let mut add = |kernel| keys.push(Box::new(Key { kernel, geometry }));
        use Kernel::*;
        [StoreKv, MeanKeys, HashKeys, HashStep, Candidates, Threshold, Collect].into_iter().for_each(&mut add);
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            add(Kernel::HashQuery { q: dtype });
            add(Kernel::MergePartials { output: dtype });
            add(Kernel::Prefill { q: dtype });
        }
        for chunk in geometry.chunks() {
            add(Kernel::Score { chunk });
            add(Kernel::Attend { q: DType::Bf16, chunk, sparse: true });
            add(Kernel::Attend { q: DType::F32, chunk, sparse: false });
        }
    }
    keys.sort_by_key(|key| key.label());
    keys.dedup_by_key(|key| key.label());
    keys
}

#[test]
fn every_variant_validates_and_translates() {
    keys().iter().for_each(|key| validates_and_translates(key.as_ref()));
}

#[test]
fn bindings_and_workgroup_memory_stay_in_limits() {
    keys().iter().for_each(|key| stays_in_limits(key.as_ref()));
}

#[test]
fn structs_have_the_offsets_of_their_rust_twins() {
    let seen = structs(keys().iter().map(|key| key.as_ref()));
    same_layout!(
        seen,
        "Params",
        Params,
        [
            groups,
            group_width,
            batch,
            tq,
            entries,
            first_entry,
            slab,
            max_count,
            scale,
            beta,
            planes_stride,
            items,
            sink,
            window,
            header,
            width,
            first_row,
            row_shift,
        ],
        input.offset => "in_offset",
        input.batch => "in_batch",
        input.token => "in_token",
        input.head => "in_head",
        input2.offset => "in2_offset",
        input2.head => "in2_head",
    );
    same_layout!(seen, "Row", Row, [visible, heavy, slot, unindexed, score_base, part_base, part_count, reserved]);
    same_layout!(seen, "Item", Item, [batch_row, start, count, first_page, pages_at, slot, hash_start, hash_end]);
    same_layout!(seen, "Entry", Entry, [sequence, logical, page, reserved]);
}
