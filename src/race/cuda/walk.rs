//! Passes on the tensor cores: one block walks through a span of one head, tile by tile, with the sums on the chip.
//!
//! Forward: the keys of each span are summed, a scan adds the spans up (in doubles, from and back to the state), then
//! each span's queries read. Backward: the same sums without moving the state; queries in the order of time, which also
//! sum what they give to the gradient of the sums; a scan from the end; keys against the order of time. Beside inputs
//! and results there are (S + 1)·(Dv + 1) floats for each span and head, 8 bytes a query, and t of each key and query: a
//! call hashes each of them once.
//!
//! Computed operands of products are rounded to bf16 in as many parts as the call's output needs: with an output of 16
//! bits that is one part, or two where the inputs are f16, so gradients (and states) have the relative error of bf16,
//! which shrinks in sums; with f32 output it is three (some 24 bits), or two where shared memory has no room for them.
//! Inputs of f32, and what is computed of them, are multiplied as two parts of TF32, and sums over tiles are added up
//! outside the tensor cores: that is the precision of f32.

use super::CudaRace;
use super::kernels::Kernel;
use super::params::{Scan, Shares, Walk};
use super::shared::{self, Fit};
use super::state::{CudaParameterSums, CudaState};
use crate::engine::cuda::{Bind, Buffer, Grid, Input, Passes, Ready, bytes_of, stage};
use crate::error::Result;
use crate::race::executor::{Call, InputGradients, Inputs, Pass, needed};
use crate::tensor::{DType, Tensor};

/// Threads of the kernels that walk, and tokens of a tile.
const THREADS: u32 = 256;
const TILE: usize = 64;
/// Tokens of a span at most: sums over one are plain floats.
const SPAN: usize = 8192;
/// Threads of the scan, and columns that a block of them takes.
const SCAN_THREADS: u32 = 512;
const SCAN_COLUMNS: usize = 8;

/// How a call walks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gait {
    /// Parts of computed operands.
    pub terms: usize,
    /// Of the forward kernel, or of both backward ones.
    pub fit: Fit,
}

/// Inputs of a pass on the device.
pub(super) struct Staged {
    pub q: Option<Input>,
    pub k: Option<Input>,
    pub v: Option<Input>,
    pub grad_o: Option<Input>,
}

impl Staged {
    /// Whether all can be read sixteen bytes at a time, as kernels that walk do.
    pub fn aligned(&self) -> bool {
        [&self.q, &self.k, &self.v, &self.grad_o].into_iter().flatten().all(|input| input.alignment >= 16)
    }
}

fn strides(input: Option<&Input>) -> crate::engine::cuda::Strides {
    input.map(|input| input.strides).unwrap_or_default()
}

fn bind(input: Option<&Input>) -> Bind {
    input.map_or_else(Bind::null, |input| input.bind.clone())
}

impl CudaRace {
    /// What a pass takes, whole.
    pub(super) fn staged(&self, call: &Call, inputs: &Inputs<'_>, backward: bool) -> Result<Staged> {
        let (batch, tokens) = (0..call.batch(), 0..call.tokens);
        let take = |tensor, view, wanted: bool| -> Result<Option<Input>> {
            if !wanted {
                return Ok(None);
            }
            let view = needed(call.op, tensor, view)?;
            stage(&self.ctx, call.op, tensor, &view, batch.clone(), tokens.clone()).map(Some)
        };
        let (reads, absorbs) = (call.pass.reads(), call.pass.absorbs());
        Ok(Staged {
            q: take("q", inputs.q, reads)?,
            k: take("k", inputs.k, absorbs)?,
            v: take("v", inputs.v, absorbs)?,
            grad_o: take("grad_o", inputs.grad_o, reads && backward)?,
        })
    }

    /// How the kernels that walk take the call, where they do.
    pub(super) fn walks(&self, call: &Call, inputs: &Inputs<'_>, backward: bool) -> Option<Gait> {
        let g = &self.geometry;
        let fits = g.ratio
            && g.ensembles == 1
            && g.head_dim.is_multiple_of(32)
            && g.head_dim <= 256
            && [32, 64, 128].contains(&g.value_dim)
            && g.buckets() <= 64
            && g.planes <= 6;
        let of_queries = inputs.grad_o.is_none_or(|view| view.dtype() == g.dtype);
        let pass = call.pass == Pass::Causal || (call.pass == Pass::Absorb && !backward);
        if !fits || !of_queries || !pass {
            return None;
        }
        let most = self.ctx.caps().shared_memory as usize;
        let gait = |terms: usize| {
            let fit = if backward { shared::backward(g, terms, most) } else { shared::forward(g, terms, most) };
            fit.filter(|_| shared::sums(g, terms) <= most).map(|fit| Gait { terms, fit })
        };
        let least = if g.dtype == DType::F16 { 2 } else { 1 };
        let wanted: &[usize] = match call.output {
            _ if g.dtype == DType::F32 => &[2],
            DType::F32 => &[3, 2],
            _ if least == 2 => &[2],
            _ => &[1],
        };
        wanted.iter().find_map(|&terms| gait(terms))
    }

    fn walk(&self, call: &Call, staged: &Staged) -> Walk {
        let g = &self.geometry;
        // Two blocks a multiprocessor at a time, four times or more; whole times, so that none waits for the last.
        let at_once = 2 * self.ctx.caps().multiprocessors.max(1) as usize;
        let heads = call.batch() * g.num_kv_heads;
        let times = (call.tokens * heads).div_ceil(SPAN * at_once).max(4);
        let spans = (times * at_once / heads).max(1);
        let span = call.tokens.div_ceil(spans).next_multiple_of(TILE).clamp(TILE, SPAN);
        Walk {
            q: strides(staged.q.as_ref()),
            k: strides(staged.k.as_ref()),
            v: strides(staged.v.as_ref()),
            g: strides(staged.grad_o.as_ref()),
            planes_stride: self.planes_stride,
            batch: call.batch() as u32,
            tokens: call.tokens as u32,
            q_heads: g.num_q_heads as u32,
            kv_heads: g.num_kv_heads as u32,
            span: span as u32,
            spans: call.tokens.div_ceil(span) as u32,
        }
    }

    fn walk_grid(walk: &Walk, heads: u32, bytes: usize) -> Grid {
        let blocks = u64::from(walk.batch) * u64::from(walk.spans) * u64::from(heads);
        Grid::new(blocks, THREADS).shared(bytes as u32)
    }

    /// Bytes of a matrix for each span of `heads` heads.
    fn matrices_bytes(&self, walk: &Walk, heads: usize) -> u64 {
        u64::from(walk.batch) * u64::from(walk.spans) * (heads * self.geometry.matrix() * 4) as u64
    }

    /// Bytes of t of each token of `heads` heads, and of a mark for each of their spans.
    fn bits_bytes(&self, walk: &Walk, heads: usize) -> u64 {
        let spans = u64::from(walk.batch) * u64::from(walk.spans) * heads as u64;
        spans * (u64::from(walk.span) * self.geometry.bits() as u64 + 1) * 4
    }

    /// Sums of each span's keys, then of all before it; the state moves on but with `keep`. The keys' t goes to
    /// `key_bits`, if anywhere.
    #[allow(clippy::too_many_arguments, reason = "one launch's arguments, all different")]
    fn walk_sums(
        &mut self,
        passes: &mut Passes<'_>,
        walk: &Walk,
        staged: &Staged,
        lengths: &Bind,
        state: &CudaState,
        terms: usize,
        keep: bool,
        key_bits: Bind,
    ) -> Result<Buffer> {
        let g = self.geometry;
        let bytes = self.matrices_bytes(walk, g.num_kv_heads);
        let matrices = self.workspace.matrices.get(&self.ctx, passes.op(), bytes)?;
        let binds = vec![
            bind(staged.k.as_ref()),
            bind(staged.v.as_ref()),
            Bind::from(&self.planes),
            Bind::from(&self.heads),
            lengths.clone(),
            Bind::from(&matrices),
            key_bits,
        ];
        let grid = Self::walk_grid(walk, walk.kv_heads, shared::sums(&g, terms));
        passes.dispatch(self.key(Kernel::Sums { terms }), *walk, grid, binds)?;
        let scan = Scan {
            state_batch: (g.num_kv_heads * g.state_unit()) as u64,
            state_head: g.state_unit() as u64,
            spans: walk.spans,
            slots: walk.spans,
            group: 1,
            heads: walk.kv_heads,
            keep: u32::from(keep),
            reserved: 0,
        };
        let units = call_units(walk);
        self.scan(passes, scan, units, [&matrices, &matrices], 0, Bind::from(&state.buffer), false)?;
        Ok(matrices)
    }

    /// One scan over the spans or chunks of `units` heads, the first being kv head `head`.
    #[allow(clippy::too_many_arguments, reason = "one launch's arguments, all different")]
    pub(super) fn scan(
        &self,
        passes: &mut Passes<'_>,
        scan: Scan,
        units: u64,
        [sums, before]: [&Buffer; 2],
        head: usize,
        state: Bind,
        reverse: bool,
    ) -> Result<()> {
        let grid = Grid::new(units * self.geometry.columns().div_ceil(SCAN_COLUMNS) as u64, SCAN_THREADS);
        let binds = vec![Bind::from(sums), Bind::from(before), Bind::at(&self.heads, head as u64 * 8), state];
        passes.dispatch(self.key(Kernel::Scan { reverse }), scan, grid, binds)
    }

    /// Makes a forward pass ready; o where it reads.
    pub(super) fn walk_forward(
        &mut self,
        call: &Call,
        staged: &Staged,
        state: &CudaState,
        gait: Gait,
    ) -> Result<(Ready, Option<Tensor>)> {
        let (op, g, ctx) = (call.op, self.geometry, self.ctx.clone());
        let Gait { terms, fit } = gait;
        let walk = self.walk(call, staged);
        let mut passes = Passes::new(&ctx, op);
        let lengths = lengths(&mut passes, call);
        let mut key_bits = Bind::null();
        if call.pass.reads() {
            let bytes = self.bits_bytes(&walk, g.num_kv_heads);
            key_bits = Bind::from(&self.workspace.key_bits.get(&ctx, op, bytes)?);
        }
        let matrices = self.walk_sums(&mut passes, &walk, staged, &lengths, state, terms, false, key_bits.clone())?;
        let mut o = None;
        if call.pass.reads() {
            let size = call.output.size();
            let buffer = ctx.uninit(op, bytes_of(&[call.batch(), call.tokens, g.num_q_heads, g.value_dim, size]))?;
            let binds = vec![
                bind(staged.q.as_ref()),
                bind(staged.v.as_ref()),
                Bind::from(&self.planes),
                Bind::from(&self.heads),
                lengths,
                Bind::from(&matrices),
                key_bits,
                Bind::from(&buffer),
            ];
            let grid = Self::walk_grid(&walk, walk.q_heads, fit.bytes);
            passes.dispatch(self.key(Kernel::Forward { terms, fit, output: call.output }), walk, grid, binds)?;
            let shape = vec![call.batch(), call.tokens, g.num_q_heads, g.value_dim];
            o = Some(Tensor::cuda(call.output, shape, buffer));
        }
        Ok((passes.ready()?, o))
    }

    /// Makes a causal backward pass ready.
    pub(super) fn walk_backward(
        &mut self,
        call: &Call,
        staged: &Staged,
        state: &CudaState,
        gradient: &CudaState,
        sums: &CudaParameterSums,
        gait: Gait,
    ) -> Result<(Ready, InputGradients)> {
        let (op, g, ctx) = (call.op, self.geometry, self.ctx.clone());
        let Gait { terms, fit } = gait;
        let walk = self.walk(call, staged);
        let mut passes = Passes::new(&ctx, op);
        let lengths = lengths(&mut passes, call);
        let gradients = call.gradients;
        let [key_bytes, query_bytes] = [g.num_kv_heads, g.num_q_heads].map(|heads| self.bits_bytes(&walk, heads));
        let key_bits = self.workspace.key_bits.get(&ctx, op, key_bytes)?;
        let query_bits = self.workspace.query_bits.get(&ctx, op, query_bytes)?;
        let of_keys = Bind::from(&key_bits);
        let matrices = self.walk_sums(&mut passes, &walk, staged, &lengths, state, terms, true, of_keys)?;
        let result = |heads: usize, width: usize| -> Result<(Buffer, Tensor)> {
            let buffer = ctx.uninit(op, bytes_of(&[call.batch(), call.tokens, heads, width, gradients.size()]))?;
            let shape = vec![call.batch(), call.tokens, heads, width];
            Ok((buffer.clone(), Tensor::cuda(gradients, shape, buffer)))
        };
        let (dq, dq_tensor) = result(g.num_q_heads, g.head_dim)?;
        let (dk, dk_tensor) = result(g.num_kv_heads, g.head_dim)?;
        let (dv, dv_tensor) = result(g.num_kv_heads, g.value_dim)?;
        let of_queries = self.matrices_bytes(&walk, g.num_q_heads);
        let w = &mut self.workspace;
        let of_queries = w.of_queries.get(&ctx, op, of_queries)?;
        let rows = (call.batch() * call.tokens * g.num_q_heads) as u64;
        let readings = w.readings.get(&ctx, op, rows * 8)?;
        let one = g.bits() * (g.head_dim + 1);
        let parts = u64::from(walk.batch) * u64::from(walk.spans);
        let shares = w.shares.get(&ctx, op, parts * (g.num_q_heads * one * 4) as u64)?;
        let inputs = |of: &Option<Input>, with: [&Buffer; 6]| {
            let mut binds = vec![
                bind(of.as_ref()),
                bind(staged.v.as_ref()),
                bind(staged.grad_o.as_ref()),
                Bind::from(&self.planes),
                Bind::from(&self.heads),
                lengths.clone(),
                Bind::from(&matrices),
            ];
            binds.extend(with.map(Bind::from));
            binds
        };

        let binds = inputs(&staged.q, [&key_bits, &dq, &of_queries, &readings, &query_bits, &shares]);
        let grid = Self::walk_grid(&walk, walk.q_heads, fit.bytes);
        passes.dispatch(self.key(Kernel::BackwardQuery { terms, fit, gradients }), walk, grid, binds)?;
        self.add_shares(&mut passes, &shares, parts as usize, g.num_q_heads, g.group, 0, 0, sums)?;
        let scan = Scan {
            state_batch: (g.num_kv_heads * g.state_unit()) as u64,
            state_head: g.state_unit() as u64,
            spans: walk.spans,
            slots: walk.spans,
            group: g.group as u32,
            heads: walk.kv_heads,
            keep: 0,
            reserved: 0,
        };
        let moving = Bind::from(&gradient.buffer);
        self.scan(&mut passes, scan, call_units(&walk), [&of_queries, &matrices], 0, moving, true)?;
        let binds = inputs(&staged.k, [&readings, &query_bits, &key_bits, &dk, &dv, &shares]);
        let grid = Self::walk_grid(&walk, walk.kv_heads, fit.bytes);
        passes.dispatch(self.key(Kernel::BackwardKey { terms, fit, gradients }), walk, grid, binds)?;
        self.add_shares(&mut passes, &shares, parts as usize, g.num_kv_heads, 1, 0, 0, sums)?;
        Ok((passes.ready()?, InputGradients { dq: Some(dq_tensor), dk: Some(dk_tensor), dv: Some(dv_tensor) }))
    }

    /// Adds shares `[part, head, bits, head_dim + 1]` to the sums of `ensemble`; the first head belongs to kv head
    /// `head`, and `per_head` to each.
    #[allow(clippy::too_many_arguments, reason = "one launch's arguments, all different")]
    pub(super) fn add_shares(
        &self,
        passes: &mut Passes<'_>,
        shares: &Buffer,
        parts: usize,
        heads: usize,
        per_head: usize,
        head: usize,
        ensemble: usize,
        sums: &CudaParameterSums,
    ) -> Result<()> {
        let g = &self.geometry;
        let one = g.bits() * (g.head_dim + 1);
        let set_step = g.ensembles * one;
        let (sets, heads_of_set, first) =
            if sums.sets() > 1 { (heads / per_head, per_head, head) } else { (1, heads, 0) };
        let params = Shares {
            parts: parts as u32,
            heads: heads as u32,
            heads_of_set: heads_of_set as u32,
            elements: one as u32,
            set_step: set_step as u64,
        };
        let at = ((first * set_step + ensemble * one) * 8) as u64;
        let grid = Grid::new((sets * one.div_ceil(32)) as u64, 256);
        let binds = vec![Bind::from(shares), Bind::at(&sums.totals, at)];
        passes.dispatch(self.key(Kernel::AddParameters), params, grid, binds)
    }
}

fn call_units(walk: &Walk) -> u64 {
    u64::from(walk.batch) * u64::from(walk.kv_heads)
}

/// The tokens of each sequence.
pub(super) fn lengths(passes: &mut Passes<'_>, call: &Call) -> Bind {
    let lengths: Vec<u32> = call.lengths.iter().map(|&length| length as u32).collect();
    passes.part(&lengths)
}
