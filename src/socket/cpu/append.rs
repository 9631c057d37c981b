//! Storing keys and values, taking the mean, and hashing.

use crate::engine::cpu::gemm::{Mat, multiply_add};
use crate::engine::cpu::simd::{Element, Kernel, Lanes, Level, padded};
use crate::engine::cpu::{map, product};
use crate::lsh::{BitLayout, Planes};
use crate::socket::config::{Scoring, SocketConfig};
use crate::socket::cpu::storage::{Geometry, Page, Sequence};
use crate::socket::problem::AppendRow;
use std::sync::Arc;

/// Keys projected together.
const BLOCK: usize = 48;

/// Hyperplanes as the projections read them: transposed, columns in the order of the packed bits, so that the signs
/// of 32 neighbouring columns are one word. Seeded Hadamard rows go this way too: at up to a few hundred bits the
/// matrix product over many keys is faster than transforms of single keys.
#[derive(Debug)]
pub(crate) struct Projection {
    /// `[set][head_dim][columns]`.
    transposed: Vec<f32>,
    sets: usize,
    head_dim: usize,
    pub columns: usize,
    /// Bits in use of each word.
    used: Vec<u32>,
}

impl Projection {
    pub fn new(planes: &Planes, layout: BitLayout) -> Self {
        let columns = layout.words() * 32;
        let mut transposed = vec![0.0; planes.sets * planes.head_dim * columns];
        let mut used = vec![0u32; layout.words()];
        for (set, out) in transposed.chunks_mut(planes.head_dim * columns).enumerate() {
            let rows = planes.of_head(set);
            for l in 0..layout.tables {
                for p in 0..layout.planes {
                    let (word, bit) = layout.position(l, p);
                    used[word] |= 1 << bit;
                    let row = &rows[(l * layout.planes + p) * planes.head_dim..][..planes.head_dim];
                    for (d, x) in row.iter().enumerate() {
                        out[d * columns + word * 32 + bit] = *x;
                    }
                }
            }
        }
        Self { transposed, sets: planes.sets, head_dim: planes.head_dim, columns, used }
    }

    /// `[head_dim][columns]` of a kv head.
    pub fn of_head(&self, kv_head: usize) -> Mat<'_> {
        let one = self.head_dim * self.columns;
        let set = if self.sets == 1 { 0 } else { kv_head };
        Mat { data: &self.transposed[set * one..][..one], stride: self.columns }
    }

    pub fn bytes(&self) -> u64 {
        (self.transposed.len() * 4 + self.used.len() * 4) as u64
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim
    }
}

/// Elements of a view and where its rows are.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a, E> {
    pub data: &'a [E],
    pub strides: [usize; 4],
    pub dim: usize,
}

impl<'a, E: Element> Source<'a, E> {
    pub fn row(&self, b: usize, t: usize, h: usize) -> &'a [E] {
        &self.data[b * self.strides[0] + t * self.strides[1] + h * self.strides[2]..][..self.dim]
    }
}

struct Store<'a, E> {
    to: &'a mut [E],
    stride: usize,
    from: Source<'a, E>,
    row: usize,
    first: usize,
    head: usize,
}

/// Copies the tokens of `rows` into their pages, which are there and not shared.
pub(crate) fn store<E: Element>(
    g: &Geometry,
    seqs: &mut [Sequence],
    rows: &[AppendRow],
    k: Source<'_, E>,
    v: Source<'_, E>,
) {
    let mut tasks = Vec::new();
    let mut work = 0;
    for (row, pages) in pages_of(seqs, rows) {
        let tokens = row.start..row.start + row.count;
        work += product([row.count, g.kv_heads, g.dk + g.dv]);
        for (index, page) in pages.iter_mut().enumerate().take(g.pages(tokens.end)).skip(tokens.start / g.page_tokens) {
            let part = g.within(index, &tokens);
            let first = index * g.page_tokens + part.start - row.start;
            let page = Arc::make_mut(page);
            for (buffer, from, stride) in [(&mut page.k, k, g.dk), (&mut page.v, v, g.dv)] {
                for (head, to) in buffer.slice_mut::<E>().chunks_mut(g.page_tokens * stride).enumerate() {
                    let to = &mut to[part.start * stride..part.end * stride];
                    tasks.push(Store { to, stride, from, row: row.row, first, head });
                }
            }
        }
    }
    map(tasks, work, |task: Store<'_, E>| {
        for (t, to) in task.to.chunks_mut(task.stride).enumerate() {
            to[..task.from.dim].copy_from_slice(task.from.row(task.row, task.first + t, task.head));
        }
    });
}

/// The rows with the pages of their sequences.
fn pages_of<'a>(
    seqs: &'a mut [Sequence],
    rows: &'a [AppendRow],
) -> impl Iterator<Item = (&'a AppendRow, &'a mut Vec<Arc<Page>>)> {
    let mut of_seq = vec![None; seqs.len()];
    for row in rows {
        of_seq[row.seq] = Some(row);
    }
    seqs.iter_mut().zip(of_seq).filter_map(|(seq, row)| Some((row?, &mut seq.pages)))
}

/// The mean of the first `count` stored keys, `[kv_head][dk]`.
pub(crate) fn mean<E: Element>(g: &Geometry, seq: &Sequence, count: usize) -> Arc<[f32]> {
    let mut mean = Vec::with_capacity(g.kv_heads * g.dk);
    for head in 0..g.kv_heads {
        let mut sum = vec![0.0f64; g.dk];
        for (index, page) in seq.pages.iter().enumerate().take(g.pages(count)) {
            let part = g.within(index, &(0..count));
            for key in page.k::<E>(g, head)[..part.end * g.dk].chunks(g.dk) {
                sum.iter_mut().zip(key).for_each(|(s, x)| *s += f64::from(x.to_f32()));
            }
        }
        mean.extend(sum.iter().map(|s| (s / count as f64) as f32));
    }
    mean.into()
}

struct Hash<'a, E> {
    k: &'a [E],
    v: &'a [E],
    bits: &'a mut [u32],
    gain: &'a mut [f32],
    bias: &'a mut [f32],
    mean: Option<&'a [f32]>,
    planes: Mat<'a>,
    tokens: std::ops::Range<usize>,
}

/// Hashes the stored tokens that `rows` name.
pub(crate) fn hash<E: Element>(
    config: &SocketConfig,
    g: &Geometry,
    projection: &Projection,
    seqs: &mut [Sequence],
    rows: &[AppendRow],
) {
    let means: Vec<_> = rows.iter().map(|r| (r.seq, seqs[r.seq].mean.clone())).collect();
    let mean_of = |seq| means.iter().find(|(s, _)| *s == seq).and_then(|(_, m)| m.as_deref());
    let mut tasks = Vec::new();
    let mut work = 0;
    for (row, pages) in pages_of(seqs, rows) {
        let mean = mean_of(row.seq);
        work += product([row.hash.len(), g.kv_heads, g.head_dim, projection.columns]);
        for (index, page) in
            pages.iter_mut().enumerate().take(g.pages(row.hash.end)).skip(row.hash.start / g.page_tokens)
        {
            let tokens = g.within(index, &row.hash);
            let Page { k, v, bits, gain, bias } = Arc::make_mut(page);
            let mut gain = gain.slice_mut().chunks_mut(g.page_tokens);
            let mut bias = bias.slice_mut().chunks_mut(g.page_tokens);
            for (head, bits) in bits.slice_mut().chunks_mut(g.page_tokens * g.words).enumerate() {
                tasks.push(Hash {
                    k: &k.slice::<E>()[head * g.page_tokens * g.dk..][..g.page_tokens * g.dk],
                    v: &v.slice::<E>()[head * g.page_tokens * g.dv..][..g.page_tokens * g.dv],
                    bits,
                    gain: gain.next().unwrap_or_default(),
                    bias: bias.next().unwrap_or_default(),
                    mean: mean.map(|m| &m[head * g.dk..][..g.dk]),
                    planes: projection.of_head(head),
                    tokens: tokens.clone(),
                });
            }
        }
    }
    map(tasks, work, |task| Level::best().run(HashKernel { config, g, projection, task }));
}

struct HashKernel<'a, E> {
    config: &'a SocketConfig,
    g: &'a Geometry,
    projection: &'a Projection,
    task: Hash<'a, E>,
}

impl<E: Element> Kernel for HashKernel<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { config, g, projection, task } = self;
        let columns = projection.columns;
        let block = BLOCK.min(task.tokens.len());
        let mut centred = vec![0.0; block * g.dk];
        let mut projected = vec![0.0; block * columns];
        let mut first = task.tokens.start;
        while first < task.tokens.end {
            let count = block.min(task.tokens.end - first);
            for (t, out) in centred.chunks_exact_mut(g.dk).enumerate().take(count) {
                let key = &task.k[(first + t) * g.dk..][..g.dk];
                for d in (0..g.dk).step_by(S::F32_LANES) {
                    let mut x = E::load(simd, &key[d..]);
                    if let Some(mean) = task.mean {
                        x = simd.sub_f32s(x, simd.load(&mean[d..]));
                    }
                    simd.store(&mut out[d..], x);
                }
            }
            projected[..count * columns].fill(0.0);
            let a = Mat { data: &centred, stride: g.dk };
            multiply_add(simd, [count, columns, g.head_dim], a, task.planes, &mut projected, columns);
            for t in 0..count {
                let signs = &projected[t * columns..][..columns];
                for (word, (signs, used)) in signs.chunks_exact(32).zip(&projection.used).enumerate() {
                    task.bits[word * g.page_tokens + first + t] = pack(simd, signs) & used;
                }
                let value = &task.v[(first + t) * g.dv..][..g.dv];
                if config.scoring == Scoring::SignProjection {
                    let key = &centred[t * g.dk..][..g.dk];
                    let spread = sum_of_magnitudes(simd, signs);
                    let square = sum_of_squares(simd, key);
                    task.gain[first + t] = if spread > 0.0 { square / spread } else { 0.0 };
                    if config.value_norm {
                        task.bias[first + t] = norm(simd, value).max(f32::MIN_POSITIVE).ln();
                    }
                } else if config.value_norm {
                    task.gain[first + t] = norm(simd, value);
                }
            }
            first += count;
        }
    }
}

/// Sign bits of 32 projections; zero counts as positive.
#[inline(always)]
pub(crate) fn pack<S: Lanes>(simd: S, projected: &[f32]) -> u32 {
    let zero = simd.splat_f32s(0.0);
    let mut word = 0;
    for i in (0..32).step_by(S::F32_LANES) {
        word |= simd.at_least(simd.load(&projected[i..]), zero) << i;
    }
    word
}

#[inline(always)]
fn sum_of_magnitudes<S: Lanes>(simd: S, row: &[f32]) -> f32 {
    let mut sum = simd.splat_f32s(0.0);
    for i in (0..row.len()).step_by(S::F32_LANES) {
        sum = simd.add_f32s(sum, simd.magnitude(simd.load(&row[i..])));
    }
    simd.reduce_sum_f32s(sum)
}

#[inline(always)]
fn sum_of_squares<S: Lanes, E: Element>(simd: S, row: &[E]) -> f32 {
    let mut sum = simd.splat_f32s(0.0);
    for i in (0..row.len()).step_by(S::F32_LANES) {
        let x = E::load(simd, &row[i..]);
        sum = simd.mul_add_e_f32s(x, x, sum);
    }
    simd.reduce_sum_f32s(sum)
}

#[inline(always)]
fn norm<S: Lanes, E: Element>(simd: S, row: &[E]) -> f32 {
    sum_of_squares(simd, row).sqrt()
}

/// Projects rows `[n][dk]` (padded) on the planes of a kv head: `[n][columns]`.
pub(crate) fn project(projection: &Projection, kv_head: usize, rows: &[f32]) -> Vec<f32> {
    struct Project<'a>(&'a Projection, usize, &'a [f32]);
    impl Kernel for Project<'_> {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) -> Vec<f32> {
            let Self(projection, kv_head, rows) = self;
            let stride = padded(projection.head_dim());
            let n = rows.len() / stride;
            let mut out = vec![0.0; n * projection.columns];
            let shape = [n, projection.columns, projection.head_dim()];
            let a = Mat { data: rows, stride };
            multiply_add(simd, shape, a, projection.of_head(kv_head), &mut out, projection.columns);
            out
        }
    }
    Level::best().run(Project(projection, kv_head, rows))
}
