//! Blocks of queries against blocks of keys: what the window computes, forward and backward.

use super::tile::{Source, Transpose};
use crate::engine::cpu::gemm::{Band, Mat, Product, multiply_add};
use crate::engine::cpu::product;
use crate::engine::cpu::simd::{Kernel, Lanes, Level, ROW};
use crate::engine::cpu::softmax::{Partial, rescale, soften};
use crate::race::window::WindowCall;
use std::ops::Range;

/// Keys of a block.
pub(super) const KEYS: usize = 64;
/// Rows of queries whose logits are held at a time.
const STRIP: usize = 6;
/// Tokens of a span of a backward pass at least.
pub(super) const SPAN: usize = 256;

/// Sizes of rows.
#[derive(Clone, Copy)]
pub(super) struct Dims {
    pub group: usize,
    pub dim: usize,
    pub dim_row: usize,
    pub value_dim: usize,
    pub value_row: usize,
    /// Tokens of a block of queries, whole rows of lanes.
    pub queries: usize,
}

/// A call's inputs.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub level: Level,
    pub window: usize,
    pub scale: f32,
    pub at: WindowCall<'a>,
    pub q: Source<'a>,
    pub k: Source<'a>,
    pub v: Source<'a>,
    pub ring: [Source<'a>; 2],
    pub dims: Dims,
}

/// A block of queries or a span.
#[derive(Clone, Debug)]
pub(super) struct Task {
    pub b: usize,
    pub kv_head: usize,
    pub tokens: Range<usize>,
}

/// A block of keys and values, as rows and transposed.
struct Block {
    k: Vec<f32>,
    k_t: Vec<f32>,
    v: Vec<f32>,
    v_t: Vec<f32>,
}

impl Block {
    fn new(d: &Dims) -> Self {
        // Reading zeroes up to a whole block of rows after the last.
        let rows = |row| vec![0.0; (KEYS + ROW) * row];
        Self { k: rows(d.dim_row), k_t: rows(d.dim_row), v: rows(d.value_row), v_t: rows(d.value_row) }
    }
}

impl<'a> Call<'a> {
    /// Tasks of `step` tokens each.
    pub fn tasks(&self, kv_heads: usize, step: usize) -> Vec<Task> {
        let mut tasks = Vec::new();
        for (b, &length) in self.at.call.lengths.iter().enumerate() {
            for kv_head in 0..kv_heads {
                for first in (0..length).step_by(step) {
                    tasks.push(Task { b, kv_head, tokens: first..length.min(first + step) });
                }
            }
        }
        tasks
    }

    /// Multiply-adds of all tasks, about.
    pub fn work(&self, tasks: &[Task]) -> u64 {
        let tokens = tasks.iter().map(|task| task.tokens.len()).sum();
        product([tokens, self.dims.group, self.window.min(self.at.call.tokens + self.window / 2), self.dims.dim])
    }

    /// The first position that queries of sequence `b` from token `first` on see; negative in the ring.
    fn first_key(&self, b: usize, first: usize) -> isize {
        let past = self.at.past(b, self.window);
        (first as isize + 1 - self.window as isize).max(-(past as isize))
    }

    /// Slot of a position before the call's tokens.
    pub fn slot_before(&self, task: &Task, position: isize) -> usize {
        (self.at.slot(task.b, self.window) + self.window - position.unsigned_abs()) % self.window
    }

    /// Reads `n` keys or values from position `first` on.
    fn read(&self, values: bool, task: &Task, first: isize, n: usize, to: &mut [f32], row: usize) {
        let (input, ring) = if values { (&self.v, &self.ring[1]) } else { (&self.k, &self.ring[0]) };
        let level = self.level;
        let mut done = 0;
        while done < n {
            let position = first + done as isize;
            let to = &mut to[done * row..];
            if position >= 0 {
                input.read(level, [task.b, position as usize, task.kv_head], n - done, 0, to, row);
                return;
            }
            let slot = self.slot_before(task, position);
            let run = position.unsigned_abs().min(n - done).min(self.window - slot);
            ring.read(level, [task.b, slot, task.kv_head], run, 0, to, row);
            done += run;
        }
    }

    fn load(&self, task: &Task, first: isize, n: usize, block: &mut Block) {
        let d = &self.dims;
        self.read(false, task, first, n, &mut block.k, d.dim_row);
        self.read(true, task, first, n, &mut block.v, d.value_row);
        let transpose = Transpose { rows: KEYS, columns: d.dim_row, from: &block.k, to: &mut block.k_t };
        self.level.run(transpose);
    }

    /// Rows of a tensor of query heads, `[head of the group, queries, row]`.
    pub fn of_queries(&self, x: &Source<'_>, task: &Task, to: &mut [f32], row: usize) {
        for (g, to) in to.chunks_exact_mut(self.dims.queries * row).enumerate() {
            let head = task.kv_head * self.dims.group + g;
            x.read(self.level, [task.b, task.tokens.start, head], task.tokens.len(), 0, to, row);
        }
    }

    /// Where what is kept of a token's first query head of the task stands.
    pub fn kept_at(&self, task: &Task, token: usize) -> usize {
        let kv_heads = self.k.heads();
        ((task.b * self.at.call.tokens + token) * kv_heads + task.kv_head) * self.dims.group
    }

    /// o `[head of the group, queries, value_row]` and lse of a block of queries.
    pub fn attend(&self, task: &Task) -> (Vec<f32>, Vec<f32>) {
        let d = &self.dims;
        let rows = d.group * d.queries;
        let mut q = vec![0.0; rows * d.dim_row];
        self.of_queries(&self.q, task, &mut q, d.dim_row);
        let mut partial = Partial::empty(rows, d.value_row);
        let mut block = Block::new(d);
        let end = task.tokens.end as isize;
        for first in (self.first_key(task.b, task.tokens.start)..end).step_by(KEYS) {
            let n = KEYS.min((end - first) as usize);
            self.load(task, first, n, &mut block);
            for g in 0..d.group {
                let sight = Sight { query: task.tokens.start as isize - first, window: self.window, n };
                let rows = g * d.queries..g * d.queries + task.tokens.len();
                self.level.run(Attend {
                    d,
                    scale: self.scale,
                    sight,
                    q: &q[rows.start * d.dim_row..],
                    block: &block,
                    max: &mut partial.max[rows.clone()],
                    sum: &mut partial.sum[rows.clone()],
                    o: &mut partial.o[rows.start * d.value_row..],
                });
            }
        }
        let (mut o, mut lse) = (vec![0.0; rows * d.value_row], vec![0.0; rows]);
        partial.finish(d.value_row, &mut o, &mut lse);
        (o, lse)
    }
}

/// Which keys of a block the queries see.
#[derive(Clone, Copy)]
struct Sight {
    /// The first query's token, counted from the block's first key.
    query: isize,
    window: usize,
    /// Keys of the block.
    n: usize,
}

impl Sight {
    /// Keys that query `i` sees.
    fn of(&self, i: usize) -> Range<usize> {
        let token = self.query + i as isize;
        let end = (token + 1).clamp(0, self.n as isize) as usize;
        let start = (token + 1 - self.window as isize).clamp(0, end as isize) as usize;
        start..end
    }
}

/// Queries of one head against a block of keys.
struct Attend<'a> {
    d: &'a Dims,
    scale: f32,
    sight: Sight,
    q: &'a [f32],
    block: &'a Block,
    max: &'a mut [f32],
    sum: &'a mut [f32],
    o: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { d, scale, sight, q, block, max, sum, o } = self;
        let mut logits = [0.0; STRIP * KEYS];
        let rows = max.len();
        for row in (0..rows).step_by(STRIP) {
            let count = STRIP.min(rows - row);
            if (row..row + count).all(|i| sight.of(i).is_empty()) {
                continue;
            }
            let logits = &mut logits[..count * KEYS];
            logits.fill(0.0);
            let (a, b) =
                (Mat { data: &q[row * d.dim_row..], stride: d.dim_row }, Mat { data: &block.k_t, stride: KEYS });
            multiply_add(simd, [count, KEYS, d.dim], a, b, logits, KEYS);
            for (i, logits) in (row..).zip(logits.chunks_exact_mut(KEYS)) {
                let seen = sight.of(i);
                logits[..seen.start].fill(f32::NEG_INFINITY);
                logits[seen.end..].fill(f32::NEG_INFINITY);
                let shrink = soften(simd, logits, scale, &mut max[i], &mut sum[i]);
                rescale(simd, &mut o[i * d.value_row..][..d.value_row], shrink);
            }
            let (a, b) = (Mat { data: logits, stride: KEYS }, Mat { data: &block.v, stride: d.value_row });
            multiply_add(simd, [count, d.value_row, sight.n], a, b, &mut o[row * d.value_row..], d.value_row);
        }
    }
}

/// Turns logits into weights, and the gradients of weights into those of scaled products q·k.
struct Slopes<'a> {
    sight: Sight,
    scale: f32,
    /// lse and g·grad_o·o of each query.
    kept: &'a [[f32; 2]],
    weights: &'a mut [f32],
    slopes: &'a mut [f32],
}

impl Kernel for Slopes<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { sight, scale, kept, weights, slopes } = self;
        let rows = weights.chunks_exact_mut(KEYS).zip(slopes.chunks_exact_mut(KEYS));
        for (i, ([lse, mean], (weights, slopes))) in kept.iter().zip(rows).enumerate() {
            let seen = sight.of(i);
            if !seen.is_empty() {
                let (factor, lse, mean) = (simd.splat_f32s(scale), simd.splat_f32s(*lse), simd.splat_f32s(*mean));
                let pairs = S::as_mut_simd_f32s(weights).0.iter_mut().zip(S::as_mut_simd_f32s(slopes).0);
                for (weight, slope) in pairs {
                    let least = simd.min_f32s(simd.sub_f32s(simd.mul_f32s(*weight, factor), lse), simd.splat_f32s(0.0));
                    *weight = simd.exp(least);
                    *slope = simd.mul_f32s(simd.mul_f32s(*weight, simd.sub_f32s(*slope, mean)), factor);
                }
            }
            for x in [weights, slopes] {
                x[..seen.start].fill(0.0);
                x[seen.end..].fill(0.0);
            }
        }
    }
}

/// What a span gives: gradients of its queries, and of the keys and values that they see.
pub(super) struct Share {
    pub task: Task,
    /// `[head of the group, token of the span, dim_row]`.
    pub dq: Vec<f32>,
    /// Position of the first key.
    pub first: isize,
    /// `[key, dim_row]` and `[key, value_row]`.
    pub dk: Vec<f32>,
    pub dv: Vec<f32>,
}

impl Call<'_> {
    /// The backward pass of a span.
    pub fn span(&self, task: &Task, gates: &[f32], grad_o: &Source<'_>, kept: &[[f32; 2]]) -> Share {
        let d = &self.dims;
        let first = self.first_key(task.b, task.tokens.start);
        let keys = (task.tokens.end as isize - first) as usize;
        let mut share = Share {
            task: task.clone(),
            dq: vec![0.0; d.group * task.tokens.len() * d.dim_row],
            first,
            dk: vec![0.0; keys * d.dim_row],
            dv: vec![0.0; keys * d.value_row],
        };
        let rows = d.group * d.queries;
        let (mut q, mut g) = (vec![0.0; rows * d.dim_row], vec![0.0; rows * d.value_row]);
        let (mut weights, mut slopes) = (vec![0.0; d.queries * KEYS], vec![0.0; d.queries * KEYS]);
        let mut block = Block::new(d);
        for start in task.tokens.clone().step_by(d.queries) {
            let tile = Task { tokens: start..task.tokens.end.min(start + d.queries), ..task.clone() };
            let n = tile.tokens.len();
            self.of_queries(&self.q, &tile, &mut q, d.dim_row);
            self.of_queries(grad_o, &tile, &mut g, d.value_row);
            for (g, gate) in g.chunks_exact_mut(d.queries * d.value_row).zip(gates) {
                g.iter_mut().for_each(|x| *x *= gate);
            }
            let end = tile.tokens.end as isize;
            for key in (self.first_key(task.b, start)..end).step_by(KEYS) {
                let m = KEYS.min((end - key) as usize);
                self.load(&tile, key, m, &mut block);
                let Block { k, k_t, v, v_t } = &mut block;
                self.level.run(Transpose { rows: KEYS, columns: d.value_row, from: v, to: v_t });
                let sight = Sight { query: start as isize - key, window: self.window, n: m };
                let at = (key - first) as usize;
                for head in 0..d.group {
                    let q = Mat { data: &q[head * d.queries * d.dim_row..], stride: d.dim_row };
                    let g = Mat { data: &g[head * d.queries * d.value_row..], stride: d.value_row };
                    self.product([n, KEYS, d.dim], q, false, (k_t, KEYS), &mut weights, true);
                    self.product([n, KEYS, d.value_dim], g, false, (v_t, KEYS), &mut slopes, true);
                    let of_token = |t| kept[self.kept_at(task, t) + head];
                    let of_tile: Vec<[f32; 2]> = tile.tokens.clone().map(of_token).collect();
                    self.level.run(Slopes {
                        sight,
                        scale: self.scale,
                        kept: &of_tile,
                        weights: &mut weights,
                        slopes: &mut slopes,
                    });
                    let at_q = (head * task.tokens.len() + start - task.tokens.start) * d.dim_row;
                    let (w, s) = (Mat { data: &weights, stride: KEYS }, Mat { data: &slopes, stride: KEYS });
                    self.product([n, d.dim_row, m], s, false, (k, d.dim_row), &mut share.dq[at_q..], false);
                    self.product(
                        [m, d.dim_row, n],
                        s,
                        true,
                        (q.data, d.dim_row),
                        &mut share.dk[at * d.dim_row..],
                        false,
                    );
                    let dv = &mut share.dv[at * d.value_row..];
                    self.product([m, d.value_row, n], w, true, (g.data, d.value_row), dv, false);
                }
            }
        }
        share
    }

    fn product(
        &self,
        size: [usize; 3],
        a: Mat<'_>,
        transposed: bool,
        (b, b_stride): (&[f32], usize),
        c: &mut [f32],
        fresh: bool,
    ) {
        let b = Mat { data: b, stride: b_stride };
        self.level.run(Product { size, a, transposed, b, c, c_stride: size[1], fresh, band: Band::Full });
    }
}
