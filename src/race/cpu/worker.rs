//! One thread's work on one kv head: chunk by chunk, in scratch memory of its own.
//!
//! Tiles of inputs are read as rows and transposed, `[channel, token]`; everything of the hash is `[bucket, token]`, so
//! that lanes hold tokens. A tile has as many columns as its tokens need, in whole vectors.

use crate::engine::cpu::gemm::{Band, Mat, Product};
use crate::engine::cpu::memory::Buffer;
use crate::engine::cpu::product;
use crate::engine::cpu::simd::{ROW, padded};
use crate::error::{Error, Result};
use crate::race::cpu::hash::{Slopes, Soften};
use crate::race::cpu::mass::{Center, Flush, Norm, Prefixes, Shift, Totals, Weigh};
use crate::race::cpu::plan::{Hash, Plan};
use crate::race::cpu::tile::{Rows, Source, Transpose};
use std::ops::Range;

/// The inputs of a pass.
#[derive(Clone, Copy, Default)]
pub(super) struct Tensors<'a> {
    pub q: Option<Source<'a>>,
    pub k: Option<Source<'a>>,
    pub v: Option<Source<'a>>,
    pub grad_o: Option<Source<'a>>,
}

/// A and B of one kv head, or their gradients, in f64: `[ensembles, buckets]` and that times `value_dim`.
pub(super) struct Wide<'a> {
    pub a: &'a mut [f64],
    pub b: &'a mut [f64],
}

impl Wide<'_> {
    pub fn reborrow(&mut self) -> Wide<'_> {
        Wide { a: self.a, b: self.b }
    }

    pub fn copy_from(&mut self, (a, b): (&[f64], &[f64])) {
        self.a.copy_from_slice(a);
        self.b.copy_from_slice(b);
    }

    pub fn add(&mut self, (a, b): (&[f64], &[f64])) {
        self.a.iter_mut().zip(a).for_each(|(x, y)| *x += y);
        self.b.iter_mut().zip(b).for_each(|(x, y)| *x += y);
    }
}

/// What a call's scratch memory must hold.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Needs {
    pub backward: bool,
    /// Chunks of a block, whose states are held at once.
    pub block: usize,
    /// Blocks of a span, at whose starts states are kept in f64.
    pub blocks: usize,
}

macro_rules! tiles {
    (|$p:ident, $n:ident| $($(#[$doc:meta])* $name:ident: $size:expr,)*) => {
        /// Scratch memory, reused from chunk to chunk.
        pub(super) struct Scratch<'a> {
            $($(#[$doc])* pub $name: &'a mut [f32],)*
        }

        impl<'a> Scratch<'a> {
            /// f32 elements.
            fn len($p: &Plan, $n: Needs) -> u64 {
                [$($size),*].iter().fold(0, |sum: u64, size| sum.saturating_add(size.saturating_add(ROW as u64)))
            }

            fn carve($p: &Plan, $n: Needs, rest: &'a mut [f32]) -> Self {
                $(let ($name, rest) = rest.split_at_mut(padded($size as usize));)*
                let _ = rest;
                Self { $($name),* }
            }
        }
    };
}

tiles! { |p, n|
    /// Rows of k, `[token, dim_row]`, and their transpose.
    k: product([p.chunk, p.dim_row]),
    k_t: product([p.chunk, p.dim_row]),
    v: product([p.chunk, p.value_row]),
    /// v less c.
    vc: product([p.chunk, p.value_row]),
    vc_t: product([p.chunk, p.value_row, usize::from(n.backward)]),
    q: product([p.chunk, p.dim_row]),
    q_t: product([p.chunk, p.dim_row]),
    g: product([p.chunk, p.value_row, usize::from(n.backward)]),
    g_t: product([p.chunk, p.value_row, usize::from(n.backward)]),
    /// o, or dv.
    o: product([p.chunk, p.value_row]),
    /// dq, or dk.
    dx: product([p.chunk, p.dim_row, usize::from(n.backward)]),
    /// Projections, and their gradients.
    u: product([p.bits, p.chunk]),
    /// φ(k) of all ensembles.
    phi: product([p.ensembles, p.buckets, p.chunk]),
    /// The masses that each token reads, of all ensembles.
    mass: product([p.ensembles, p.buckets, p.chunk]),
    /// φ(q), then ψ.
    psi: product([p.buckets, p.chunk]),
    /// Σ ψ·A of each token.
    whole: product([p.chunk]),
    /// grad_o·c of each token.
    common: product([p.chunk]),
    /// ψ_i·φ(k_j), at `[j, i]`.
    scores: product([p.chunk, p.chunk]),
    /// grad_o_i·(v_j − c), at `[j, i]` and at `[i, j]`.
    z_t: product([p.chunk, p.chunk, usize::from(n.backward)]),
    z: product([p.chunk, p.chunk, usize::from(n.backward)]),
    y: product([p.buckets, p.chunk, usize::from(n.backward)]),
    dmass: product([p.buckets, p.chunk, usize::from(n.backward)]),
    dphi: product([p.ensembles, p.buckets, p.chunk, usize::from(n.backward)]),
    k_slopes: product([p.ensembles, 3, p.bits, p.chunk, usize::from(n.backward)]),
    q_slopes: product([3, p.bits, p.chunk, usize::from(n.backward)]),
    /// What a chunk adds to A and B of all ensembles, or to their gradients.
    delta_a: product([p.ensembles, p.buckets]),
    delta_b: product([p.ensembles, p.buckets, p.value_row]),
    /// The state, rounded: A, the mean value c, and B less A·c; `[ensembles, buckets]` and that times `value_row`.
    a: product([p.ensembles, p.buckets]),
    c: product([p.value_row]),
    b: product([p.ensembles, p.buckets, p.value_row]),
    /// The gradient of the state, rounded: that of A with B less A·c held, and that of B.
    ra: product([p.ensembles, p.buckets, usize::from(n.backward)]),
    rb: product([p.ensembles, p.buckets, p.value_row, usize::from(n.backward)]),
    /// What a chunk adds to the gradients of the hyperplanes.
    dw: product([p.ensembles, p.bits, p.dim_row, usize::from(n.backward)]),
    /// States at the starts of a block's chunks.
    chunk_a: product([n.block, p.ensembles, p.buckets]),
    chunk_c: product([n.block, p.value_row]),
    chunk_b: product([n.block, p.ensembles, p.buckets, p.value_row]),
}

/// Memory of one thread.
pub(super) struct Memory {
    tiles: Buffer,
    /// A state in f64, and those at the starts of blocks.
    wide: Buffer,
}

impl Memory {
    pub fn new(op: &'static str, plan: &Plan, needs: Needs) -> Result<Self> {
        let states = if needs.block == 0 { 0 } else { needs.blocks.saturating_add(1) };
        let state = plan.masses().saturating_mul(plan.value_dim + 1);
        let tiles = usize::try_from(Scratch::len(plan, needs));
        let tiles = tiles.map_err(|_| Error::out_of_memory(op, u64::MAX))?;
        Ok(Self {
            tiles: Buffer::zeroed::<f32>(op, tiles)?,
            wide: Buffer::zeroed::<f64>(op, states.saturating_mul(state))?,
        })
    }
}

/// See the module.
pub(super) struct Worker<'a> {
    pub plan: &'a Plan,
    pub hash: Hash<'a>,
    pub tensors: Tensors<'a>,
    pub sequence: usize,
    pub kv_head: usize,
    pub s: Scratch<'a>,
    pub wide: &'a mut [f64],
    /// Tokens from a chunk to the one that will be read next.
    pub ahead: isize,
}

impl<'a> Worker<'a> {
    pub fn new(
        plan: &'a Plan,
        needs: Needs,
        hash: Hash<'a>,
        tensors: Tensors<'a>,
        [sequence, kv_head]: [usize; 2],
        memory: &'a mut Memory,
    ) -> Self {
        let s = Scratch::carve(plan, needs, memory.tiles.slice_mut());
        Self { plan, hash, tensors, sequence, kv_head, s, wide: memory.wide.slice_mut(), ahead: plan.chunk as isize }
    }

    pub fn norm(&self, np: usize) -> Norm {
        let shares = self.plan.share * self.plan.tables as f32;
        Norm { ratio: self.plan.ratio, share: self.plan.share, shares, np }
    }

    /// Chunks of a range of tokens: first token and count.
    pub fn chunks(&self, tokens: &Range<usize>) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (chunk, end) = (self.plan.chunk, tokens.end);
        tokens.clone().step_by(chunk).map(move |first| (first, chunk.min(end - first)))
    }

    /// Takes the state into f32, for queries to read.
    pub fn narrow(&mut self, (a, b): (&[f64], &[f64])) {
        let Self { plan, s, .. } = self;
        let (buckets, dim, row) = (plan.buckets, plan.value_dim, plan.value_row);
        plan.level.run(Center { buckets, dim, row, a, b, to_a: s.a, c: s.c, to_b: s.b });
    }

    /// Reads a chunk of k and v and hashes the former; what lies past the last token weighs nothing.
    pub fn read_keys(&mut self, first: usize, n: usize, with_slopes: bool) {
        let Self { plan, hash, tensors, sequence, kv_head, s, ahead, .. } = self;
        let (level, np, at) = (plan.level, padded(n), [*sequence, first, *kv_head]);
        if let Some(v) = tensors.v {
            v.read(level, at, n, *ahead, s.v, plan.value_row);
        }
        let Some(k) = tensors.k else { return };
        k.read(level, at, n, *ahead, s.k, plan.dim_row);
        level.run(Transpose { rows: np, columns: plan.dim_row, from: s.k, to: s.k_t });
        let (one, bits) = (plan.buckets * np, plan.bits * np);
        for m in 0..plan.ensembles {
            let phi = &mut s.phi[m * one..(m + 1) * one];
            let slopes = with_slopes.then(|| Slopes::of(&mut s.k_slopes[3 * m * bits..], bits));
            soften(plan, *hash, m, np, s.k_t, s.u, phi, slopes);
            if n < np {
                phi.chunks_exact_mut(np).for_each(|row| row[n..].fill(0.0));
            }
        }
    }

    /// The chunk's values less the mean.
    pub fn shift_values(&mut self, np: usize) {
        let Self { plan, s, .. } = self;
        let row = plan.value_row;
        plan.level.run(Shift { x: &s.v[..np * row], c: &s.c[..row], out: s.vc });
    }

    /// The masses that each token of the chunk reads. Gives what the chunk adds to A in `delta_a`.
    pub fn prefix_masses(&mut self, np: usize) {
        let Self { plan, s, .. } = self;
        let (one, len) = (plan.buckets, plan.masses());
        for m in 0..plan.ensembles {
            let (rows, tile) = (m * one..(m + 1) * one, m * one * np..(m + 1) * one * np);
            plan.level.run(Prefixes {
                np,
                phi: &s.phi[tile.clone()],
                start: &s.a[..len][rows.clone()],
                out: &mut s.mass[tile],
                total: &mut s.delta_a[rows],
            });
        }
    }

    /// Every token reads the whole state's masses.
    pub fn common_masses(&mut self, np: usize) {
        let len = self.plan.masses();
        for (row, a) in self.s.mass.chunks_exact_mut(np).zip(&self.s.a[..len]) {
            row.fill(*a);
        }
    }

    /// Adds the chunk's keys and values to the state in f64. `delta_a` holds their weights where `summed`.
    pub fn absorb(&mut self, n: usize, state: Wide<'_>, summed: bool) {
        let Self { plan, s, .. } = self;
        let (level, np, row) = (plan.level, padded(n), plan.value_row);
        let rows = plan.masses();
        if !summed {
            s.delta_a[..rows].fill(0.0);
            level.run(Totals { np, x: &s.phi[..rows * np], total: &mut s.delta_a[..rows] });
        }
        // The ensembles' rows lie one after the other.
        level.run(Product {
            size: [rows, row, n],
            a: Mat { data: s.phi, stride: np },
            transposed: false,
            b: Mat { data: s.v, stride: row },
            c: s.delta_b,
            c_stride: row,
            fresh: true,
            band: Band::Full,
        });
        let dim = plan.value_dim;
        level.run(Flush { dim: rows, row: rows, wide: state.a, delta: &s.delta_a[..rows] });
        level.run(Flush { dim, row, wide: state.b, delta: s.delta_b });
    }

    /// Reads a chunk of one query head's queries.
    pub fn read_queries(&mut self, g: usize, first: usize, n: usize) {
        let Self { plan, tensors, sequence, kv_head, s, ahead, .. } = self;
        let Some(q) = tensors.q else { return };
        q.read(plan.level, [*sequence, first, *kv_head * plan.group + g], n, *ahead, s.q, plan.dim_row);
        plan.level.run(Transpose { rows: padded(n), columns: plan.dim_row, from: s.q, to: s.q_t });
    }

    /// ψ of the queries read, for one ensemble.
    pub fn weigh_queries(&mut self, m: usize, np: usize, with_slopes: bool) {
        let norm = self.norm(np);
        let Self { plan, hash, s, .. } = self;
        let one = plan.buckets * np;
        let slopes = with_slopes.then(|| Slopes::of(s.q_slopes, plan.bits * np));
        soften(plan, *hash, m, np, s.q_t, s.u, &mut s.psi[..one], slopes);
        let mass = &s.mass[m * one..(m + 1) * one];
        plan.level.run(Weigh { norm, psi: &mut s.psi[..one], mass, whole: s.whole });
    }

    /// ψ_i·φ(k_j) of the chunk's own keys, for j ≤ i.
    pub fn score(&mut self, m: usize, n: usize) {
        let Self { plan, s, .. } = self;
        let np = padded(n);
        plan.level.run(Product {
            size: [n, np, plan.buckets],
            a: Mat { data: &s.phi[m * plan.buckets * np..], stride: np },
            transposed: true,
            b: Mat { data: s.psi, stride: np },
            c: s.scores,
            c_stride: np,
            fresh: true,
            band: Band::UpperC,
        });
        clear_later(s.scores, n, np);
    }

    /// Forward over a range of tokens: o where `out` is given, the state moved on where k and v are.
    pub fn forward(&mut self, tokens: &Range<usize>, mut state: Option<Wide<'_>>, out: Option<&Rows<'_>>) {
        let own = self.tensors.k.is_some();
        for (chunk, (first, n)) in self.chunks(tokens).enumerate() {
            let np = padded(n);
            if own {
                self.read_keys(first, n, false);
            }
            if let Some(out) = out {
                match own {
                    true => {
                        self.shift_values(np);
                        self.prefix_masses(np);
                    }
                    // Fewer columns than before only move the rows; the last chunk may have.
                    false if chunk == 0 || n < self.plan.chunk => self.common_masses(np),
                    false => {}
                }
                for g in 0..self.plan.group {
                    self.attend(g, first, n, own, out);
                }
            }
            if let (true, Some(state)) = (own, &mut state) {
                self.absorb(n, state.reborrow(), out.is_some());
                if out.is_some() {
                    self.narrow((state.a, state.b));
                }
            }
        }
    }

    /// o of one query head's chunk.
    fn attend(&mut self, g: usize, first: usize, n: usize, own: bool, out: &Rows<'_>) {
        let np = padded(n);
        self.read_queries(g, first, n);
        for m in 0..self.plan.ensembles {
            self.weigh_queries(m, np, false);
            if own {
                self.score(m, n);
            }
            let Self { plan, s, .. } = self;
            let row = plan.value_row;
            let state = Product {
                size: [n, row, plan.buckets],
                a: Mat { data: s.psi, stride: np },
                transposed: true,
                b: Mat { data: &s.b[m * plan.buckets * row..], stride: row },
                c: s.o,
                c_stride: row,
                fresh: m == 0,
                band: Band::Full,
            };
            plan.level.run(state);
            plan.level.run(Product {
                size: [n, row, 1],
                a: Mat { data: s.whole, stride: np },
                transposed: true,
                b: Mat { data: s.c, stride: row },
                c: s.o,
                c_stride: row,
                fresh: false,
                band: Band::Full,
            });
            if own {
                plan.level.run(Product {
                    size: [n, row, n],
                    a: Mat { data: s.scores, stride: np },
                    transposed: true,
                    b: Mat { data: s.vc, stride: row },
                    c: s.o,
                    c_stride: row,
                    fresh: false,
                    band: Band::LowerA,
                });
            }
        }
        let Self { plan, sequence, kv_head, s, .. } = self;
        let o = &mut s.o[..n * plan.value_row];
        if plan.ensembles > 1 {
            let weight = 1.0 / plan.ensembles as f32;
            o.iter_mut().for_each(|o| *o *= weight);
        }
        // SAFETY: spans of one unit share no tokens, and units share no heads.
        unsafe { out.write(plan.level, [*sequence, first, *kv_head * plan.group + g], n, o, plan.value_row) };
    }
}

/// Rows `[j, i]` of a chunk's pairs, i < j set to zero: a query reads no later key.
pub(super) fn clear_later(pairs: &mut [f32], n: usize, np: usize) {
    for (j, row) in pairs.chunks_exact_mut(np).take(n).enumerate() {
        row[..j].fill(0.0);
    }
}

/// Projects a transposed tile and hashes it.
#[allow(clippy::too_many_arguments, reason = "tiles of one scratch memory, borrowed apart")]
fn soften(
    plan: &Plan,
    hash: Hash<'_>,
    m: usize,
    np: usize,
    x_t: &[f32],
    u: &mut [f32],
    phi: &mut [f32],
    slopes: Option<Slopes<'_>>,
) {
    plan.level.run(Product {
        size: [plan.bits, np, plan.dim],
        a: Mat { data: hash.ensemble(plan, m), stride: plan.dim_row },
        transposed: false,
        b: Mat { data: x_t, stride: np },
        c: u,
        c_stride: np,
        fresh: true,
        band: Band::Full,
    });
    plan.level.run(Soften { tables: plan.tables, planes: plan.planes, np, beta: hash.beta, u, phi, slopes });
}
