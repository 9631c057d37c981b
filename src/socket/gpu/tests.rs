//! Every variant of every shader.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::GpuExecutor;
use super::blocks::{Blocks, Scratch};
use super::kernels::{Kernel, Key};
use super::merge::MergeKey;
use super::params::{Entry, Item, Params, Row};
use crate::engine::Recording;
use crate::engine::gpu::KernelKey;
use crate::engine::gpu::shader_tests::{same_layout, stays_in_limits, structs, validates_and_translates};
use crate::engine::gpu::tests::context;
use crate::socket::config::{Budget, CacheShape, Rule, Scoring, SelectionScope, SocketConfig, Temperature};
use crate::socket::executor::Executor;
use crate::socket::pages::{local_of, slab_of};
use crate::socket::plan::{
    BINS, CANDIDATES, Geometry, HISTOGRAM_ROW, MOST_WORKGROUP_MEMORY, RESCORE_SLICES, WORKGROUP_MEMORY,
};
use crate::socket::problem::{AppendRow, AttendProblem, CacheSpec, Kind, SeqState, query_rows};
use crate::tensor::{DType, TensorView};

fn geometries() -> Vec<Geometry> {
    let mut all = Vec::new();
    let mut add = |config: SocketConfig, heads: (usize, usize), dims: (usize, usize), dtype, page_tokens| {
        let shape =
            CacheShape { num_q_heads: heads.0, num_kv_heads: heads.1, head_dim: dims.0, value_dim: dims.1, dtype };
        let geometry = Geometry::new(&CacheSpec { config, shape, page_tokens });
        all.push(geometry);
        let offered = Geometry { workgroup_memory: MOST_WORKGROUP_MEMORY, allow_coarse: true, ..geometry };
        all.extend([8, 32].map(|subgroup| Geometry { subgroup, ..offered }));
        all.push(Geometry { allow_coarse: true, ..geometry });
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
    keys_of(&geometries())
}

fn keys_of(geometries: &[Geometry]) -> Vec<Box<dyn KernelKey>> {
    let mut keys: Vec<Box<dyn KernelKey>> = Vec::new();
    let dtypes = [DType::F32, DType::F16, DType::Bf16];
    for (o1, o2) in dtypes.iter().flat_map(|a| dtypes.map(|b| (*a, b))) {
        keys.push(Box::new(MergeKey { o1, o2 }));
    }
    for &geometry in geometries {
        let mut add = |kernel| keys.push(Box::new(Key { kernel, geometry }));
        use Kernel::*;
        [StoreKv, MeanKeys, HashKeys, HashStep, Threshold { rescore: false }, Collect].into_iter().for_each(&mut add);
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            add(Kernel::HashQuery { q: dtype });
            add(Kernel::MergePartials { output: dtype, split: 1 });
            add(Kernel::MergePartials { output: dtype, split: geometry.merge_split() });
            add(Kernel::Prefill { q: dtype });
        }
        if geometry.coarse() {
            [Rescore { slices: RESCORE_SLICES }, Threshold { rescore: true }].into_iter().for_each(&mut add);
        }
        for chunk in geometry.chunks() {
            for coarse in [false, geometry.coarse()] {
                add(Kernel::Score { chunk: geometry.score_chunk(chunk), coarse });
                add(Kernel::Bounds { coarse });
                add(Kernel::Candidates { chunk: geometry.score_chunk(chunk), coarse });
            }
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
    for memory in [WORKGROUP_MEMORY, MOST_WORKGROUP_MEMORY] {
        let with: Vec<_> = geometries().into_iter().filter(|g| g.workgroup_memory == memory).collect();
        keys_of(&with).iter().for_each(|key| stays_in_limits(key.as_ref(), memory as u32));
    }
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

/// Asserts that `buffer` holds `word` all over from byte `from` to byte `to`.
#[track_caller]
fn untouched(executor: &GpuExecutor, buffer: &wgpu::Buffer, from: u64, to: u64, word: u32) {
    let bytes = executor.ctx.read_buffer_blocking("untouched", buffer, from, to - from).unwrap();
    let words: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
    let at = words.iter().position(|&w| w != word);
    assert_eq!(at, None, "words after byte {from} of {} were written to", buffer.size());
}

/// Scratch space past the call's plan, where the shaders could write: all of it is bound.
fn scratch_ends_where_planned(executor: &GpuExecutor, problem: &AttendProblem, word: u32) {
    let (g, sparse) = (&executor.geometry, problem.kind == Kind::Sparse);
    let plan = Blocks::new(g, problem, sparse, 1 << 27, |_| 0);
    let mut planned = plan.blocks[0].load.bytes(g, sparse);
    if problem.kind == Kind::Prefill {
        planned[4] = (problem.tq * g.num_q_heads * g.part_stride() * 4) as u64;
    }
    let buffers: Vec<_> = executor.workspace.buffers().collect();
    assert_eq!(buffers.len(), planned.len());
    for (buffer, planned) in buffers.into_iter().zip(planned) {
        assert!(buffer.size() > planned, "some room to see");
        untouched(executor, buffer, planned, buffer.size(), word);
    }
}

/// Pages and states of nobody, and rows after the last token of the only sequence.
fn storage_of_others_is_left_alone(executor: &GpuExecutor, len: usize, k: u32, v: u32, other: u32) {
    let g = &executor.geometry;
    let owned = &executor.sequences[0].pages;
    let slot = u64::from(executor.sequences[0].slot + 1) * executor.slot_bytes();
    untouched(executor, &executor.state, slot, executor.state.size(), other);
    let [k_page, v_page, index_page] = g.page_bytes();
    for (number, slab) in executor.pool.slabs.iter().enumerate() {
        let buffers = [(&slab.k, k_page, k), (&slab.v, v_page, v), (&slab.index, index_page, other)];
        for (buffer, bytes, word) in buffers {
            for page in 0..buffer.size() / bytes {
                let mine = owned.iter().any(|&p| slab_of(p) == number && u64::from(local_of(p)) == page);
                if !mine {
                    untouched(executor, buffer, page * bytes, (page + 1) * bytes, word);
                }
            }
        }
    }
    let last = *owned.last().unwrap();
    let slab = &executor.pool.slabs[slab_of(last)];
    for (buffer, bytes, word) in [(&slab.k, k_page, k), (&slab.v, v_page, v)] {
        let per_head = bytes / g.num_kv_heads as u64;
        let used = per_head / g.page as u64 * (len % g.page) as u64;
        for head in 0..g.num_kv_heads as u64 {
            let at = u64::from(local_of(last)) * bytes + head * per_head;
            untouched(executor, buffer, at + used, at + per_head, word);
        }
    }
}

/// What lies in memory that a call has not written must not matter: NaN in all scratch space and in the index of pages
/// that hold nothing, other tokens' numbers in their keys and values. Bit for bit the same as from memory full of zeros.
/// And all of it that is not the call's to write is as it was afterwards.
#[test]
fn stale_memory_changes_nothing() {
    let ctx = context(true);
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
            for round in 0..2 {
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
                    if poisoned && round == 1 {
                        scratch_ends_where_planned(&executor, &problem, u32::MAX);
                    }
                    let selection = attended.selection.map(|s| [s.indices, s.scores]).into_iter().flatten();
                    for tensor in [attended.o, attended.lse].into_iter().chain(selection) {
                        found.push(tensor.read_blocking().unwrap());
                    }
                }
            }
            if poisoned {
                let (k, v) = (999f32.to_bits(), (-999f32).to_bits());
                storage_of_others_is_left_alone(&executor, 150, k, v, u32::MAX);
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

/// Rows that go through scratch space block by block give the same bits as all at once: sequences by themselves, and
/// query tokens of one sequence by themselves.
#[test]
fn blocks_of_rows_give_the_same_bits() {
    let ctx = context(true);
    let shape = CacheShape { num_q_heads: 4, num_kv_heads: 2, head_dim: 20, value_dim: 12, dtype: DType::F32 };
    let wave = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<_>>();
    let (batch, tokens, tq) = (3, 150, 2);
    let (k, v) = (wave(batch * tokens * 2 * 20, 0.37), wave(batch * tokens * 2 * 12, 0.61));
    let q = wave(batch * tq * 4 * 20, 0.83);
    let k = TensorView::f32(&k, [batch, tokens, 2, 20]);
    let v = TensorView::f32(&v, [batch, tokens, 2, 12]);
    let q = TensorView::f32(&q, [batch, tq, 4, 20]);
    let config = SocketConfig { sink: 2, window: 4, budget: Budget::Tokens(20), ..SocketConfig::paper() };
    let spec = CacheSpec { config: config.clone(), shape, page_tokens: 64 };
    let mut found = Vec::new();
    // A row of 4 heads takes 512 KiB of candidates: all rows at once, one sequence's two, one.
    for (limit, blocks) in [(1 << 27, 1), (1040 << 10, 3), (600 << 10, 6)] {
        let mut executor = GpuExecutor::new(ctx.clone(), &spec).unwrap();
        executor.scratch_limit = limit;
        // Several chunks a workgroup of scoring, across sequences; then one.
        executor.score_groups = if found.is_empty() { 1 } else { 1 << 20 };
        executor.attend_groups = 1;
        let rows: Vec<_> = (0..batch)
            .map(|b| {
                executor.fork(None, SeqState::default()).unwrap();
                AppendRow::new(&config, b, b, SeqState::default(), tokens - 10 * b)
            })
            .collect();
        let seqs: Vec<_> = rows.iter().map(|row| row.after(SeqState::default())).collect();
        executor.append(Recording::Run, &k, &v, &rows).unwrap();
        let rows = query_rows(&config, Kind::Sparse, &seqs, tq);
        let (kind, output) = (Kind::Sparse, DType::F32);
        let problem = AttendProblem { kind, op: "decode", tq, rows, seqs, scale: 0.3, output, want_selection: true };
        let plan = Blocks::new(&executor.geometry, &problem, true, limit, |_| 0);
        assert_eq!(plan.blocks.len(), blocks);
        let attended = executor.attend(Recording::Run, &q, &problem).unwrap();
        let selection = attended.selection.unwrap();
        let tensors = [attended.o, attended.lse, selection.indices, selection.scores];
        found.push(tensors.map(|tensor| tensor.read_blocking().unwrap()));
    }
    for other in &found[1..] {
        assert_eq!(&found[0], other);
    }
}

/// Workgroups that attend runs of chunks give what those that take one chunk give, and a sequence in a batch what it gives
/// alone, bit for bit.
#[test]
fn runs_of_chunks_are_attended_as_chunks_are() {
    let ctx = context(true);
    let shape = CacheShape { num_q_heads: 6, num_kv_heads: 2, head_dim: 20, value_dim: 12, dtype: DType::F32 };
    let wave = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<_>>();
    // Less than a page, whole runs of 8 pages of 64 tokens, one token more, several runs.
    let lens = [1, 63, 1024, 1025, 2047, 130, 3000];
    let most = 3000;
    let (k, v) = (wave(most * 2 * 20, 0.37), wave(most * 2 * 12, 0.61));
    let q = wave(lens.len() * 6 * 20, 0.83);
    let config = SocketConfig { sink: 2, window: 4, budget: Budget::Tokens(90), ..SocketConfig::fast() };
    let spec = CacheSpec { config: config.clone(), shape, page_tokens: 64 };
    // Outputs of some of the sequences; every second gets its pages after the others.
    let attend = |which: &[usize], kind, attend_groups| -> Vec<Vec<f32>> {
        let mut executor = GpuExecutor::new(ctx.clone(), &spec).unwrap();
        executor.attend_groups = attend_groups;
        assert!(executor.geometry.attend_rows(64, kind == Kind::Sparse).is_some());
        let mut seqs = vec![SeqState::default(); which.len()];
        which.iter().for_each(|_| executor.fork(None, SeqState::default()).unwrap());
        for later in [0, 1] {
            for b in (0..which.len()).filter(|b| b % 2 == later) {
                let len = lens[which[b]];
                let row = AppendRow::new(&config, b, 0, SeqState::default(), len);
                seqs[b] = row.after(SeqState::default());
                let k = TensorView::f32(&k[..len * 40], [1, len, 2, 20]);
                let v = TensorView::f32(&v[..len * 24], [1, len, 2, 12]);
                executor.append(Recording::Run, &k, &v, &[row]).unwrap();
            }
        }
        let q: Vec<f32> = which.iter().flat_map(|&i| q[i * 120..(i + 1) * 120].to_vec()).collect();
        let q = TensorView::f32(&q, [which.len(), 1, 6, 20]);
        let mut once = || {
            let rows = query_rows(&config, kind, &seqs, 1);
            let (op, seqs, output, want_selection) = ("decode", seqs.clone(), DType::F32, false);
            let problem = AttendProblem { kind, op, tq: 1, rows, seqs, scale: 0.3, output, want_selection };
            let attended = executor.attend(Recording::Run, &q, &problem).unwrap();
            let read = [attended.o, attended.lse].map(|tensor| tensor.read_blocking().unwrap().to_f32());
            // What is left there would outweigh everything.
            for buffer in executor.workspace.buffers() {
                let words = vec![900f32.to_bits(); (buffer.size() / 4) as usize];
                ctx.write("poison", buffer, 0, bytemuck::cast_slice(&words)).unwrap();
            }
            read
        };
        let first = once();
        assert_eq!(once(), first, "{kind:?}");
        let [o, lse] = first;
        let one = |i| [&o[i * 72..(i + 1) * 72], &lse[i * 6..(i + 1) * 6]].concat();
        (0..which.len()).map(one).collect()
    };
    let all: Vec<usize> = (0..lens.len()).collect();
    for kind in [Kind::Dense, Kind::Sparse] {
        let chunks = attend(&all, kind, u64::MAX);
        let runs = attend(&all, kind, 1);
        for (i, (chunks, runs)) in chunks.iter().zip(&runs).enumerate() {
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 2e-6 * a.abs().max(1.0);
            assert!(chunks.iter().zip(runs).all(near), "{kind:?}, {} tokens: {runs:?} for {chunks:?}", lens[i]);
        }
        // Runs of one length in both.
        for alone in [4, 6] {
            assert_eq!(attend(&[alone], kind, 1)[0], runs[alone], "{kind:?}, {} tokens alone", lens[alone]);
        }
    }
}

/// One case of [`coarse_scores_select_the_same_keys`].
struct Coarse {
    config: SocketConfig,
    tokens: usize,
    /// Keys are one key and this much noise.
    spread: f32,
    /// Whether more keys contest the threshold than a row's list holds.
    overflows: bool,
}

/// Coarse scores first and exact ones near the threshold select what exact scores select: bit for bit the same output.
/// With one set of tables and several, with more digits, with a bias, and where more keys contest the threshold than the
/// list of candidates holds.
#[test]
fn coarse_scores_select_the_same_keys() {
    let ctx = context(true);
    let shape = CacheShape { num_q_heads: 8, num_kv_heads: 2, head_dim: 32, value_dim: 32, dtype: DType::F32 };
    let mut state = 1u64;
    let mut noise = |n: usize| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next() + next() + next()).collect()
    };
    let q = noise(256);
    let center = Some(32);
    let paper = SocketConfig::paper;
    let fast = || SocketConfig { center, ..SocketConfig::fast() };
    let usual = |config| Coarse { config, tokens: 3000, spread: 1.0, overflows: false };
    let crowded = |config| Coarse { config, tokens: 20_000, spread: 1e-3, overflows: true };
    let cases = [
        usual(paper()),
        usual(SocketConfig { temperature: Temperature::Beta(6.0), ..paper() }),
        usual(SocketConfig { tables: 300, ..paper() }),
        usual(SocketConfig { tables: 100, planes: 13, ..paper() }),
        usual(fast()),
        usual(SocketConfig { value_norm: true, ..fast() }),
        usual(SocketConfig { center, ..SocketConfig::sign_projection(1024) }),
        crowded(SocketConfig { value_norm: false, ..paper() }),
        crowded(SocketConfig { center: None, ..fast() }),
    ];
    for Coarse { config, tokens, spread, overflows } in cases {
        let k: Vec<f32> =
            noise(tokens * 64).iter().enumerate().map(|(i, x)| spread * x + (1.0 - spread) * q[i % 32]).collect();
        let v = noise(tokens * 64);
        let (k, v) = (TensorView::f32(&k, [1, tokens, 2, 32]), TensorView::f32(&v, [1, tokens, 2, 32]));
        let q = TensorView::f32(&q, [1, 1, 8, 32]);
        let config = SocketConfig { sink: 4, window: 4, budget: Budget::Tokens(100), ..config };
        let spec = CacheSpec { config: config.clone(), shape, page_tokens: 1024 };
        let mut executor = GpuExecutor::new(ctx.clone(), &spec).unwrap();
        executor.geometry.allow_coarse = true;
        assert!(executor.geometry.coarse(), "{config:?}");
        executor.fork(None, SeqState::default()).unwrap();
        executor.reserve(tokens).unwrap();
        let row = AppendRow::new(&config, 0, 0, SeqState::default(), tokens);
        let seqs = vec![row.after(SeqState::default())];
        executor.append(Recording::Run, &k, &v, &[row]).unwrap();
        let mut found = Vec::new();
        // One chunk a workgroup of scoring, then several.
        for (want_selection, fused_keys, score_groups) in [(true, 0, 1 << 20), (false, 0, 1 << 20), (false, 1 << 20, 1)]
        {
            (executor.fused_keys, executor.score_groups) = (fused_keys, score_groups);
            let rows = query_rows(&config, Kind::Sparse, &seqs, 1);
            let (kind, seqs, output) = (Kind::Sparse, seqs.clone(), DType::F32);
            let problem = AttendProblem { kind, op: "decode", tq: 1, rows, seqs, scale: 0.3, output, want_selection };
            let attended = executor.attend(Recording::Run, &q, &problem).unwrap();
            found.push([attended.o, attended.lse].map(|tensor| tensor.read_blocking().unwrap()));
        }
        assert_eq!(found[0], found[1], "{config:?}");
        assert_eq!(found[0], found[2], "{config:?}, scored again by the search");
        let histogram = executor.workspace.buffers().nth(Scratch::Histogram as usize).unwrap();
        let words = executor.ctx.read_buffer_blocking("candidates", histogram, 0, histogram.size()).unwrap();
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&words);
        let most = words.chunks_exact(HISTOGRAM_ROW).take(8).map(|row| row[BINS] as usize).max();
        assert_eq!(most > Some(CANDIDATES), overflows, "{most:?} candidates: {config:?}");
    }
}
