//! Attention of many query tokens: tiles of keys, widened and transposed once, against a block of query rows.

use crate::engine::cpu::gemm::{Mat, multiply_add};
use crate::engine::cpu::simd::{Element, Kernel, Lanes};
use crate::engine::cpu::softmax::{Partial, rescale, soften};
use crate::socket::cpu::storage::{Geometry, Sequence};

/// Keys of a tile: K and V of a tile stay in the nearest cache.
const KEYS: usize = 64;
/// Query rows whose logits are held at a time.
const STRIP: usize = 6;
/// Query rows of a block: enough to make the transposition of a tile cheap.
pub(crate) const ROWS: usize = 384;

/// A block of query rows against all keys that any of them sees.
pub(crate) struct Tile<'a> {
    pub g: &'a Geometry,
    pub seq: &'a Sequence,
    pub kv_head: usize,
    /// `[row][dk]`.
    pub q: &'a [f32],
    /// Visible keys of each row, ascending.
    pub visible: &'a [usize],
    pub scale: f32,
}

/// What [`Tile`] is with the element type named.
pub(crate) struct TileOf<'a, E>(pub Tile<'a>, pub std::marker::PhantomData<E>);

impl<E: Element> Kernel for TileOf<'_, E> {
    type Output = Partial;

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) -> Partial {
        let Tile { g, seq, kv_head, q, visible, scale } = self.0;
        let (dk, dv) = (g.dk, g.dv);
        let rows = visible.len();
        let mut state = Partial::empty(rows, dv);
        let mut keys = vec![0.0; dk * KEYS];
        let mut values = vec![0.0; KEYS * dv];
        let mut logits = [0.0; STRIP * KEYS];
        let end = visible.last().copied().unwrap_or(0);
        for first in (0..end).step_by(KEYS) {
            let n = KEYS.min(end - first);
            let page = &seq.pages[first / g.page_tokens];
            let at = first % g.page_tokens;
            transpose(simd, &page.k::<E>(g, kv_head)[at * dk..][..n * dk], dk, &mut keys);
            widen(simd, &page.v::<E>(g, kv_head)[at * dv..][..n * dv], &mut values);
            // Rows before see none of these keys.
            let mut row = visible.partition_point(|v| *v <= first);
            while row < rows {
                let count = STRIP.min(rows - row);
                let logits = &mut logits[..count * KEYS];
                logits.fill(0.0);
                let a = Mat { data: &q[row * dk..], stride: dk };
                multiply_add(simd, [count, KEYS, g.head_dim], a, Mat { data: &keys, stride: KEYS }, logits, KEYS);
                for (i, logits) in logits.chunks_exact_mut(KEYS).enumerate() {
                    let seen = (visible[row + i] - first).min(n);
                    logits[seen..].fill(f32::NEG_INFINITY);
                    let (max, sum) = (&mut state.max[row + i], &mut state.sum[row + i]);
                    let shrink = soften(simd, logits, scale, max, sum);
                    rescale(simd, &mut state.o[(row + i) * dv..][..dv], shrink);
                }
                let (a, b) = (Mat { data: logits, stride: KEYS }, Mat { data: &values, stride: dv });
                multiply_add(simd, [count, dv, n], a, b, &mut state.o[row * dv..], dv);
                row += count;
            }
        }
        state
    }
}

/// Keys `[n][dk]` as `[dk][KEYS]`; columns past n keep finite leftovers, which are masked.
#[inline(always)]
fn transpose<S: Lanes, E: Element>(simd: S, keys: &[E], dk: usize, out: &mut [f32]) {
    let mut wide = [0.0f32; 4 * crate::engine::cpu::simd::ROW];
    const W: usize = crate::engine::cpu::simd::ROW;
    for (i, four) in keys.chunks(4 * dk).enumerate() {
        for d in (0..dk).step_by(W) {
            for (r, key) in four.chunks_exact(dk).enumerate() {
                for l in (0..W).step_by(S::F32_LANES) {
                    simd.store(&mut wide[r * W + l..], E::load(simd, &key[d + l..]));
                }
            }
            for l in 0..W {
                let column = &mut out[(d + l) * KEYS + 4 * i..][..4];
                for (r, x) in column.iter_mut().enumerate() {
                    *x = wide[r * W + l];
                }
            }
        }
    }
}

#[inline(always)]
fn widen<S: Lanes, E: Element>(simd: S, from: &[E], to: &mut [f32]) {
    for i in (0..from.len()).step_by(S::F32_LANES) {
        simd.store(&mut to[i..], E::load(simd, &from[i..]));
    }
}
