//! Every variant of every shader.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::GpuExecutor;
use super::kernels::{Kernel, Key};
use super::merge::MergeKey;
use super::params::{Entry, Item, Params, Row};
use crate::engine::Recording;
use crate::engine::gpu::KernelKey;
use crate::engine::gpu::shader_tests::{same_layout, stays_in_limits, structs, validates_and_translates};
use crate::socket::config::{Budget, CacheShape, Rule, Scoring, SelectionScope, SocketConfig};
use crate::socket::executor::Executor;
use crate::socket::plan::Geometry;
use crate::socket::problem::{AppendRow, AttendProblem, CacheSpec, Kind, SeqState, query_rows};
use crate::tensor::{DType, TensorView};

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
            for (q, sparse) in [DType::F32, DType::F16, DType::Bf16].into_iter().flat_map(|q| [(q, true), (q, false)]) {
                add(Kernel::Attend { q, chunk, sparse });
            }
        }
    }
    keys.sort_by_key(|key| key.label());
    for pair in keys.windows(2).filter(|pair| pair[0].label() == pair[1].label()) {
        assert!(pair[0].source().wgsl == pair[1].source().wgsl, "{} names two shaders", pair[0].label());
    }
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
            tokens,
            first_token,
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

/// What lies in memory that a call has not written must not matter: NaN in all scratch space and in the index of pages
/// that hold nothing, other tokens' numbers in their keys and values. Bit for bit the same as from memory full of zeros.
#[test]
fn stale_memory_changes_nothing() {
    let name = std::env::var("SOFTHASH_DEVICE").unwrap_or_else(|_| "llvmpipe".into());
    let device = crate::Device::by_name(&name).unwrap();
    let ctx = device.context().unwrap().clone();
    let shape = CacheShape { num_q_heads: 4, num_kv_heads: 2, head_dim: 20, value_dim: 12, dtype: DType::F32 };
    let wave = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<_>>();
    let (k, v, q) = (wave(150 * 2 * 20, 0.37), wave(150 * 2 * 12, 0.61), wave(4 * 20, 0.83));
    let (k, v) = (TensorView::f32(&k, [1, 150, 2, 20]), TensorView::f32(&v, [1, 150, 2, 12]));
    let q = TensorView::f32(&q, [1, 1, 4, 20]);
    for base in [SocketConfig::paper(), SocketConfig { center: Some(32), ..SocketConfig::fast() }] {
        let config = SocketConfig { sink: 2, window: 4, budget: Budget::Tokens(20), ..base };
        let spec = CacheSpec { config: config.clone(), shape, page_tokens: 64 };
        let fill = |buffer: &wgpu::Buffer, word: u32| {
            ctx.write("poison", buffer, 0, bytemuck::cast_slice(&vec![word; (buffer.size() / 4) as usize])).unwrap();
        };
        let run = |poisoned: bool| {
            let mut executor = GpuExecutor::new(ctx.clone(), &spec).unwrap();
            if poisoned {
                fill(&executor.state, u32::MAX);
            }
            executor.fork(None, SeqState::default()).unwrap();
            executor.reserve(300).unwrap();
            if poisoned {
                for slab in &executor.pool.slabs {
                    fill(&slab.k, 999f32.to_bits());
                    fill(&slab.v, (-999f32).to_bits());
                    fill(&slab.index, u32::MAX);
                }
            }
            let row = AppendRow::new(&config, 0, 0, SeqState::default(), 150);
            let seqs = vec![row.after(SeqState::default())];
            executor.append(Recording::Run, &k, &v, &[row]).unwrap();
            let mut found = Vec::new();
            // The first round makes the scratch space that is poisoned for the second.
            for _ in 0..2 {
                for kind in [Kind::Sparse, Kind::Dense, Kind::Prefill] {
                    if poisoned {
                        executor.workspace.buffers().for_each(|buffer| fill(buffer, u32::MAX));
                    }
                    let rows = query_rows(&config, kind, &seqs, 1);
                    let want_selection = kind == Kind::Sparse;
                    let (seqs, output) = (seqs.clone(), DType::F32);
                    let problem =
                        AttendProblem { kind, op: "decode", tq: 1, rows, seqs, scale: 0.3, output, want_selection };
                    let attended = executor.attend(Recording::Run, &q, &problem).unwrap();
                    let selection = attended.selection.map(|s| [s.indices, s.scores]).into_iter().flatten();
                    for tensor in [attended.o, attended.lse].into_iter().chain(selection) {
                        found.push(tensor.read_blocking().unwrap());
                    }
                }
            }
            found
        };
        let (clean, poisoned) = (run(false), run(true));
        assert_eq!(clean.len(), 16);
        assert!(clean.iter().all(|tensor| tensor.to_f32().iter().all(|x| x.is_finite())));
        for (i, (clean, poisoned)) in clean.iter().zip(&poisoned).enumerate() {
            assert_eq!(clean, poisoned, "{:?}, result {i}", config.scoring);
        }
    }
}
