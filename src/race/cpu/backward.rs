//! Backward over a range of tokens.
//!
//! With P = tril(Ψ·Φᵀ), Z = tril(G·Vᵀ), the state (A, B) before a chunk and the gradient (RA, RB) of the state after it:
//!
//! ```text
//! y  = G·Bᵀ + Z·Φ        h_q, F = back through the normalisation (h = dφ∘φ; F: gradient of the masses read)
//! dφ(k) = Zᵀ·Ψ + V·RBᵀ + RA + (suffix sums of F)          dv = Pᵀ·G + Φ·RB
//! RB += Ψᵀ·G             RA += ΣF
//! ```
//!
//! Here B stands for B less A·c and V for V less c, with c the mean value before the chunk, and RA for the gradient of A
//! with that B held: the same gradients, in which what all values have in common need not cancel.
//!
//! The chunks are taken last to first. The state before each is summed anew, never subtracted from a total: a first
//! sweep keeps one state per block of chunks in f64; a second, block by block from the last, those of the block's
//! chunks in f32.

use crate::engine::cpu::gemm::{Band, Mat, Product};
use crate::engine::cpu::simd::padded;
use crate::race::cpu::hash::{Harden, Slopes};
use crate::race::cpu::mass::{CenterGradient, Flush, FlushGradient, Scale, Suffixes, Totals, WeighBackward};
use crate::race::cpu::tile::{Rows, Transpose};
use crate::race::cpu::worker::{Wide, Worker, clear_later};
use std::ops::Range;

/// Where gradients of inputs go.
#[derive(Clone, Copy)]
pub(super) struct Outputs<'a> {
    pub dq: Option<&'a Rows<'a>>,
    pub dk: Option<&'a Rows<'a>>,
    pub dv: Option<&'a Rows<'a>>,
}

/// Gradients of β and of one kv head's hyperplanes, `[ensembles * bits, dim]`.
pub(super) struct Sums<'a> {
    pub beta: &'a mut f64,
    pub planes: &'a mut [f64],
}

/// What a chunk's backward reads and gives.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// All.
    All,
    /// What its queries send to the state, no more.
    Sent,
}

impl Worker<'_> {
    /// Backward of the causal pass: `start` is the state before the range, `gradient` becomes that of it.
    pub fn backward_causal(
        &mut self,
        tokens: &Range<usize>,
        block: usize,
        start: (&[f64], &[f64]),
        mut gradient: Wide<'_>,
        mut sums: Sums<'_>,
        out: Outputs<'_>,
    ) {
        let (masses, of_b) = (self.plan.masses(), self.plan.sums());
        let span = block * self.plan.chunk;
        let blocks: Vec<Range<usize>> =
            tokens.clone().step_by(span).map(|first| first..tokens.end.min(first + span)).collect();
        let memory = std::mem::take(&mut self.wide);
        let (running, kept) = memory.split_at_mut(masses + of_b);
        let (a, b) = running.split_at_mut(masses);
        let mut state = Wide { a, b };
        state.copy_from(start);
        for (i, (tokens, kept)) in blocks.iter().zip(kept.chunks_exact_mut(masses + of_b)).enumerate() {
            kept[..masses].copy_from_slice(state.a);
            kept[masses..].copy_from_slice(state.b);
            if i + 1 < blocks.len() {
                self.forward(tokens, Some(state.reborrow()), None);
            }
        }
        let row = self.plan.value_row;
        for (tokens, kept) in blocks.iter().zip(kept.chunks_exact(masses + of_b)).rev() {
            let kept = kept.split_at(masses);
            state.copy_from(kept);
            self.narrow(kept);
            let chunks: Vec<_> = self.chunks(tokens).collect();
            for (i, (first, n)) in chunks.iter().enumerate() {
                self.s.chunk_a[i * masses..][..masses].copy_from_slice(&self.s.a[..masses]);
                self.s.chunk_c[i * row..][..row].copy_from_slice(&self.s.c[..row]);
                self.s.chunk_b[i * masses * row..][..masses * row].copy_from_slice(&self.s.b[..masses * row]);
                if i + 1 < chunks.len() {
                    self.forward(&(*first..first + n), Some(state.reborrow()), None);
                    self.narrow((state.a, state.b));
                }
            }
            self.ahead = -self.ahead;
            for (i, (first, n)) in chunks.iter().enumerate().rev() {
                self.s.a[..masses].copy_from_slice(&self.s.chunk_a[i * masses..][..masses]);
                self.s.c[..row].copy_from_slice(&self.s.chunk_c[i * row..][..row]);
                self.s.b[..masses * row].copy_from_slice(&self.s.chunk_b[i * masses * row..][..masses * row]);
                self.backward_chunk(*first, *n, Part::All, gradient.reborrow(), &mut sums, out);
            }
            self.ahead = -self.ahead;
        }
        self.wide = memory;
    }

    /// What a range's queries send to the state before it, added to `gradient`; `state` moves on past the range.
    pub fn sent(&mut self, tokens: &Range<usize>, mut state: Wide<'_>, mut gradient: Wide<'_>) {
        self.narrow((state.a, state.b));
        let mut sums = Sums { beta: &mut 0.0, planes: &mut [] };
        let out = Outputs { dq: None, dk: None, dv: None };
        for (first, n) in self.chunks(tokens) {
            self.backward_chunk(first, n, Part::Sent, gradient.reborrow(), &mut sums, out);
            self.absorb(n, state.reborrow(), false);
            self.narrow((state.a, state.b));
        }
    }

    /// Backward of reading a state that stays.
    pub fn backward_read(
        &mut self,
        tokens: &Range<usize>,
        state: (&[f64], &[f64]),
        mut gradient: Wide<'_>,
        mut sums: Sums<'_>,
        out: Outputs<'_>,
    ) {
        self.narrow(state);
        for (first, n) in self.chunks(tokens) {
            self.backward_chunk(first, n, Part::All, gradient.reborrow(), &mut sums, out);
        }
    }

    /// Backward of taking in keys and values; the gradient stays.
    pub fn backward_absorb(
        &mut self,
        tokens: &Range<usize>,
        state: (&[f64], &[f64]),
        gradient: (&[f64], &[f64]),
        mut sums: Sums<'_>,
        out: Outputs<'_>,
    ) {
        // The state is of no matter but for the mean value.
        self.narrow(state);
        self.narrow_gradient(gradient);
        for (first, n) in self.chunks(tokens) {
            self.read_keys(first, n, true);
            self.shift_values(padded(n));
            self.start_keys(n);
            self.finish_keys(first, n, &mut sums, out);
            self.flush_weights(&mut sums);
        }
    }

    /// Takes the gradient of the state into f32, for keys to read.
    fn narrow_gradient(&mut self, (a, b): (&[f64], &[f64])) {
        let Self { plan, s, .. } = self;
        let (dim, row) = (plan.value_dim, plan.value_row);
        plan.level.run(CenterGradient { dim, row, a, b, c: s.c, to_a: s.ra, to_b: s.rb });
    }

    /// One chunk, whose start state is in f32.
    fn backward_chunk(
        &mut self,
        first: usize,
        n: usize,
        part: Part,
        gradient: Wide<'_>,
        sums: &mut Sums<'_>,
        out: Outputs<'_>,
    ) {
        let np = padded(n);
        let own = self.tensors.k.is_some();
        if own {
            self.read_keys(first, n, part == Part::All);
            self.shift_values(np);
            self.prefix_masses(np);
            if part == Part::All {
                self.narrow_gradient((gradient.a, gradient.b));
                self.start_keys(n);
            }
        } else {
            self.common_masses(np);
        }
        let masses = self.plan.masses();
        self.s.delta_a[..masses].fill(0.0);
        for g in 0..self.plan.group {
            self.read_queries(g, first, n);
            self.read_gradients(g, first, n, own);
            for m in 0..self.plan.ensembles {
                self.backward_queries(m, n, g == 0, own, part, sums);
            }
            if let Some(dq) = out.dq {
                let at = [self.sequence, first, self.kv_head * self.plan.group + g];
                // SAFETY: spans of one unit share no tokens, and units share no heads.
                unsafe { dq.write(self.plan.level, at, n, self.s.dx, self.plan.dim_row) };
            }
        }
        if own && part == Part::All {
            self.finish_keys(first, n, sums, out);
        }
        if part == Part::All {
            self.flush_weights(sums);
        }
        let Self { plan, s, .. } = self;
        let (dim, row, Wide { a, b }) = (plan.value_dim, plan.value_row, gradient);
        let (c, delta_a, delta_b) = (&*s.c, &s.delta_a[..masses], &*s.delta_b);
        plan.level.run(FlushGradient { dim, row, a, b, c, delta_a, delta_b });
    }

    /// Reads a chunk of grad_o as the gradient of each ensemble's output, and Z.
    fn read_gradients(&mut self, g: usize, first: usize, n: usize, own: bool) {
        let Self { plan, tensors, sequence, kv_head, s, ahead, .. } = self;
        let (level, np, row) = (plan.level, padded(n), plan.value_row);
        let Some(grad_o) = tensors.grad_o else { return };
        grad_o.read(level, [*sequence, first, *kv_head * plan.group + g], n, *ahead, s.g, row);
        if plan.ensembles > 1 {
            let weight = 1.0 / plan.ensembles as f32;
            s.g[..n * row].iter_mut().for_each(|g| *g *= weight);
        }
        level.run(Transpose { rows: np, columns: row, from: s.g, to: s.g_t });
        level.run(Product {
            size: [1, np, plan.value_dim],
            a: Mat { data: s.c, stride: row },
            transposed: false,
            b: Mat { data: s.g_t, stride: np },
            c: s.common,
            c_stride: np,
            fresh: true,
            band: Band::Full,
        });
        if own {
            level.run(Product {
                size: [n, np, plan.value_dim],
                a: Mat { data: s.vc, stride: row },
                transposed: false,
                b: Mat { data: s.g_t, stride: np },
                c: s.z_t,
                c_stride: np,
                fresh: true,
                band: Band::UpperC,
            });
            clear_later(s.z_t, n, np);
            s.z_t[n * np..np * np].fill(0.0);
            level.run(Transpose { rows: np, columns: np, from: s.z_t, to: s.z });
        }
    }

    /// One ensemble's share of dq, of what the queries send to the state, and of what they send to the chunk's keys.
    fn backward_queries(&mut self, m: usize, n: usize, is_first: bool, own: bool, part: Part, sums: &mut Sums<'_>) {
        let np = padded(n);
        self.weigh_queries(m, np, true);
        if own && part == Part::All {
            self.score(m, n);
        }
        let norm = self.norm(np);
        let Self { plan, hash, s, .. } = self;
        let (level, row, buckets, one) = (plan.level, plan.value_row, plan.buckets, plan.buckets * np);
        let phi = &s.phi[m * one..(m + 1) * one];
        // y = G·Bᵀ + Z·Φ.
        level.run(Product {
            size: [buckets, np, plan.value_dim],
            a: Mat { data: &s.b[m * buckets * row..], stride: row },
            transposed: false,
            b: Mat { data: s.g_t, stride: np },
            c: s.y,
            c_stride: np,
            fresh: true,
            band: Band::Full,
        });
        if own {
            level.run(Product {
                size: [buckets, np, n],
                a: Mat { data: phi, stride: np },
                transposed: false,
                b: Mat { data: s.z_t, stride: np },
                c: s.y,
                c_stride: np,
                fresh: false,
                band: Band::Full,
            });
        }
        let mass = &s.mass[m * one..(m + 1) * one];
        let (psi, y, dmass) = (&s.psi[..one], &mut s.y[..one], &mut s.dmass[..one]);
        level.run(WeighBackward { norm, psi, mass, common: s.common, y, dmass });
        // What goes to the state.
        level.run(Product {
            size: [buckets, row, n],
            a: Mat { data: s.psi, stride: np },
            transposed: false,
            b: Mat { data: s.g, stride: row },
            c: &mut s.delta_b[m * buckets * row..],
            c_stride: row,
            fresh: is_first,
            band: Band::Full,
        });
        let total = &mut s.delta_a[m * buckets..(m + 1) * buckets];
        if !own || part == Part::Sent {
            level.run(Totals { np, x: dmass, total });
        } else {
            // What goes to the chunk's own keys and values.
            let dphi = &mut s.dphi[m * one..(m + 1) * one];
            level.run(Suffixes { np, x: dmass, out: dphi, total });
            level.run(Product {
                size: [buckets, np, n],
                a: Mat { data: s.psi, stride: np },
                transposed: false,
                b: Mat { data: s.z, stride: np },
                c: dphi,
                c_stride: np,
                fresh: false,
                band: Band::Full,
            });
            level.run(Product {
                size: [n, row, n],
                a: Mat { data: s.scores, stride: np },
                transposed: false,
                b: Mat { data: s.g, stride: row },
                c: s.o,
                c_stride: row,
                fresh: false,
                band: Band::UpperA,
            });
        }
        if part == Part::Sent {
            return;
        }
        let slopes = Slopes::of(s.q_slopes, plan.bits * np);
        let (tables, planes, beta) = (plan.tables, plan.planes, hash.beta);
        let dbeta = level.run(Harden { tables, planes, np, beta, h: &mut s.y[..one], slopes: &slopes, du: s.u });
        *sums.beta += f64::from(dbeta);
        self.through_projection(m, n, m == 0, is_first, true);
    }

    /// From du to dx = du·W, and du·x to the gradient of W. `fresh_x` and `fresh_w`: nothing was summed before.
    fn through_projection(&mut self, m: usize, n: usize, fresh_x: bool, fresh_w: bool, is_query: bool) {
        let Self { plan, hash, s, .. } = self;
        let (np, row, bits) = (padded(n), plan.dim_row, plan.bits);
        plan.level.run(Product {
            size: [n, row, bits],
            a: Mat { data: s.u, stride: np },
            transposed: true,
            b: Mat { data: hash.ensemble(plan, m), stride: row },
            c: s.dx,
            c_stride: row,
            fresh: fresh_x,
            band: Band::Full,
        });
        plan.level.run(Product {
            size: [bits, row, n],
            a: Mat { data: s.u, stride: np },
            transposed: false,
            b: Mat { data: if is_query { s.q } else { s.k }, stride: row },
            c: &mut s.dw[m * bits * row..],
            c_stride: row,
            fresh: fresh_w,
            band: Band::Full,
        });
    }

    /// dφ(k) and dv by way of the state after the chunk.
    fn start_keys(&mut self, n: usize) {
        let Self { plan, s, .. } = self;
        let (level, np, row, rows) = (plan.level, padded(n), plan.value_row, plan.masses());
        level.run(Transpose { rows: np, columns: row, from: s.vc, to: s.vc_t });
        for (dphi, ra) in s.dphi.chunks_exact_mut(np).zip(&s.ra[..rows]) {
            dphi.fill(*ra);
        }
        level.run(Product {
            size: [rows, np, plan.value_dim],
            a: Mat { data: s.rb, stride: row },
            transposed: false,
            b: Mat { data: s.vc_t, stride: np },
            c: s.dphi,
            c_stride: np,
            fresh: false,
            band: Band::Full,
        });
        level.run(Product {
            size: [n, row, rows],
            a: Mat { data: s.phi, stride: np },
            transposed: true,
            b: Mat { data: s.rb, stride: row },
            c: s.o,
            c_stride: row,
            fresh: true,
            band: Band::Full,
        });
    }

    /// dk, and dv as it stands.
    fn finish_keys(&mut self, first: usize, n: usize, sums: &mut Sums<'_>, out: Outputs<'_>) {
        let np = padded(n);
        for m in 0..self.plan.ensembles {
            let Self { plan, hash, s, tensors, .. } = self;
            let (one, bits) = (plan.buckets * np, plan.bits * np);
            let dphi = &mut s.dphi[m * one..(m + 1) * one];
            plan.level.run(Scale(dphi, &s.phi[m * one..(m + 1) * one]));
            let slopes = Slopes::of(&mut s.k_slopes[3 * m * bits..], bits);
            let (tables, planes, beta) = (plan.tables, plan.planes, hash.beta);
            let dbeta = plan.level.run(Harden { tables, planes, np, beta, h: dphi, slopes: &slopes, du: s.u });
            *sums.beta += f64::from(dbeta);
            let fresh_w = tensors.q.is_none();
            self.through_projection(m, n, m == 0, fresh_w, false);
        }
        let at = [self.sequence, first, self.kv_head];
        // SAFETY: spans of one unit share no tokens, and units share no heads.
        unsafe {
            if let Some(dk) = out.dk {
                dk.write(self.plan.level, at, n, self.s.dx, self.plan.dim_row);
            }
            if let Some(dv) = out.dv {
                dv.write(self.plan.level, at, n, self.s.o, self.plan.value_row);
            }
        }
    }

    fn flush_weights(&mut self, sums: &mut Sums<'_>) {
        let (dim, row) = (self.plan.dim, self.plan.dim_row);
        self.plan.level.run(Flush { dim, row, wide: sums.planes, delta: self.s.dw });
    }
}
