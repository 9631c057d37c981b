//! Backward passes.
//!
//! The gradient of a causal pass needs the sums before each chunk and the gradients of the sums after it. An ascending
//! sweep over the pieces, of keys alone, leaves the state before each of them; then the pieces are worked on from the
//! last to the first, and the gradient of the state is carried from one to the next in a private copy. A piece is a
//! submission of its own, so that neither its time nor its parameters grow with the call; what the caller holds changes
//! only after the last.
//!
//! In a piece, for each block of kv heads and ensemble:
//!
//! | kernel | gives |
//! |---|---|
//! | project, chunk sums, scan | the sums before each chunk, as in the forward pass |
//! | backward query | the gradient of each query's hash, and what the query's part in other gradients takes |
//! | query sums, scan reversed | the gradient of the sums after each chunk |
//! | backward key, backward value | the gradient of each key's hash; dv |
//! | hash inputs, hash parameters | dq, dk; the gradients of hyperplanes and β, as shares and then sums |
//!
//! # Memory
//! Beyond inputs and results, a call holds scratch buffers of one piece, however long it is: with S buckets, L·P bits, and
//! G query heads to a kv head, bytes per token and kv head of the piece
//!
//! | buffer | bytes |
//! |---|---|
//! | hashes | 4·(G + 1)·L·P |
//! | gradients of hashes | 4·G·L·P, twice that under [`crate::Normalization::Ratio`] |
//! | readings of queries | 8·G under [`crate::Normalization::Ratio`], else 8·G·(S + 1) |
//! | matrices of chunks and of their runs | (S + 1)·(Dv + 1)·5/64, and little for sums of segments |
//!
//! besides up to [`SHARES`] bytes of shares of the parameters' gradients, and for a causal call the state (8·S·(Dv + 1)
//! bytes per sequence, kv head and ensemble) before each of its pieces. With the default S = 64, G = 1 and Dv = 64 that
//! is about 560 bytes per token and kv head of a piece.

use super::backward_kernels::BackwardKernel;
use super::forward::Output;
use super::kernels::{Kernel, Key};
use super::params::Params;
use super::state::GpuState;
use super::sweep::{Block, KEEP_STATE, Matrices};
use super::{GpuRace, STORAGE, too_large};
use crate::engine::Recording;
use crate::engine::gpu::{Bind, Context, Input, Passes, ResultBuffer, stage};
use crate::error::{Error, Result};
use crate::race::executor::{Call, InputGradients, Inputs, Pass, needed};
use crate::race::plan::{Budget, CHUNK, Piece, pieces};
use crate::tensor::{DType, Tensor, TensorView};
use std::ops::Range;
use std::sync::Arc;

/// Flag of the kernels that write dq, dk and dv: add to what is there.
const ADD: u32 = 1;
/// Bytes of the scratch buffers whose size grows with a piece's tokens, each.
const SCRATCH: u64 = 128 << 20;
/// Bytes of the shares of the gradients of hyperplanes, and rows of a share at least.
const SHARES: u64 = 32 << 20;
const SHARE_ROWS: usize = 512;

/// Gradients of β and hyperplanes on a GPU: pairs of f32, `[set, ensemble, bits, head_dim + 1]`, in the last column
/// what the bit gives to β's.
#[derive(Debug)]
pub(crate) struct GpuParameterSums {
    ctx: Arc<Context>,
    totals: wgpu::Buffer,
    plane_sets: usize,
    betas: usize,
}

impl GpuParameterSums {
    /// One set per kv head where hyperplanes or β have one each.
    fn sets(&self) -> usize {
        self.plane_sets.max(self.betas)
    }
}

/// Where a call's results go.
struct Results {
    dq: Option<Output>,
    dk: Option<Output>,
    dv: Option<Output>,
}

/// A piece's inputs, as kernels see them.
struct Staged {
    /// q and grad_o.
    queries: Option<(Input, Input)>,
    /// k and v.
    keys: Option<(Input, Input)>,
    grad: DType,
}

/// The state before a piece: some sequences of a state.
struct Entry {
    state: GpuState,
    sequences: Range<usize>,
}

impl Entry {
    /// The block, its sequences numbered as in this state.
    fn numbered(&self, block: &Block) -> Block {
        Block { sequences: self.sequences.clone(), ..block.clone() }
    }
}

/// The scratch buffers of a piece.
struct Room {
    hashes: wgpu::Buffer,
    matrices: Matrices,
    hash_gradients: wgpu::Buffer,
    readings: Option<wgpu::Buffer>,
    shares: wgpu::Buffer,
    /// Rows of a share.
    share: usize,
}

/// What a call moves on from piece to piece, private until it is done.
struct Moving {
    gradient: GpuState,
    sums: GpuParameterSums,
}

impl GpuRace {
    fn backward_key(&self, kernel: BackwardKernel) -> Key {
        self.key(Kernel::Backward(kernel))
    }

    pub(super) fn zero_sums(&self, op: &'static str) -> Result<GpuParameterSums> {
        let g = &self.geometry;
        let plane_sets = if self.planes_stride == 0 { 1 } else { g.num_kv_heads };
        let bytes = plane_sets.max(self.betas) * g.ensembles * g.bits() * (g.head_dim + 1) * 8;
        let totals = self.ctx.buffer(op, "sums of parameter gradients", bytes as u64, STORAGE)?;
        Ok(GpuParameterSums { ctx: self.ctx.clone(), totals, plane_sets, betas: self.betas })
    }

    /// A copy that goes its own way.
    fn copy_sums(&self, op: &'static str, sums: &GpuParameterSums) -> Result<GpuParameterSums> {
        if !Arc::ptr_eq(&self.ctx, &sums.ctx) {
            let (got, expected) = ("another GPU device", "this GPU device");
            return Err(Error::WrongDevice { op, tensor: "parameter sums", got, expected });
        }
        let totals = self.ctx.buffer(op, "sums of parameter gradients", sums.totals.size(), STORAGE)?;
        self.ctx.copy_whole(op, &sums.totals, &totals)?;
        Ok(GpuParameterSums { ctx: sums.ctx.clone(), totals, ..*sums })
    }

    /// Gradients of β and of the hyperplanes.
    pub(super) fn total(&self, op: &'static str, sums: &GpuParameterSums) -> Result<(Tensor, Tensor)> {
        let g = &self.geometry;
        let shape = vec![sums.plane_sets, g.ensembles * g.bits(), g.head_dim];
        let elements = shape.iter().product::<usize>();
        let planes = self.ctx.buffer(op, "output", (elements * 4) as u64, STORAGE)?;
        let betas = self.ctx.buffer(op, "output", (sums.betas * 4) as u64, STORAGE)?;
        let mut passes = Passes::new(&self.ctx, op);
        // The kernel asks for no sequence.
        let info = passes.part(&[0u32]);
        let params = Params {
            slots: sums.sets() as u32,
            chunks: sums.plane_sets as u32,
            heads: sums.betas as u32,
            ..Params::default()
        };
        let groups = (elements.div_ceil(256) + sums.betas) as u64;
        let binds = vec![info, Bind::from(&sums.totals), Bind::from(&planes), Bind::from(&betas)];
        passes.dispatch(self.backward_key(BackwardKernel::FinishParameters), params, groups, binds)?;
        passes.ready()?.run(&self.ctx, op, Recording::Run)?;
        let tensor = |shape, buffer| Tensor::gpu(self.ctx.clone(), DType::F32, shape, buffer);
        Ok((tensor(vec![sums.betas], betas), tensor(shape, planes)))
    }

    /// What a piece of a backward pass may take: its scratch buffers stay below [`SCRATCH`] where one chunk does.
    fn backward_budget(&self) -> Budget {
        let g = &self.geometry;
        let limit = SCRATCH.min(self.budget.binding);
        let row = g.group * g.reading().max(g.hash_gradient(true)) * 4;
        let rows = (limit / row as u64) as usize / CHUNK * CHUNK;
        Budget { rows: self.budget.rows.min(rows), ..self.budget }
    }

    pub(super) fn run_backward(
        &mut self,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &GpuState,
        grad_state: &mut GpuState,
        sums: &mut GpuParameterSums,
    ) -> Result<InputGradients> {
        let op = call.op;
        self.ctx.check_alive(op)?;
        self.own(op, state)?;
        call.wide_gradients("the path through wgpu")?;
        let budget = self.backward_budget();
        let all = pieces(&self.geometry, &budget, call.batch(), call.tokens)
            .map_err(|value| too_large(op, value, budget.binding))?;
        let has_work = |piece: &Piece| piece.sequences.clone().any(|b| call.lengths[b] > piece.tokens.start);
        let all: Vec<Piece> = all.into_iter().filter(has_work).collect();
        let gradient_of = |view: Option<TensorView<'_>>| -> Result<Option<Output>> {
            let Some(view) = view else { return Ok(None) };
            let bytes = view.shape().iter().product::<usize>() as u64 * 4;
            Ok(Some(Output { result: ResultBuffer::zeros(&self.ctx, op, bytes)?, dtype: DType::F32 }))
        };
        let results = Results { dq: gradient_of(inputs.q)?, dk: gradient_of(inputs.k)?, dv: gradient_of(inputs.v)? };
        let moving = Moving { gradient: self.copy_state(op, grad_state)?, sums: self.copy_sums(op, sums)? };
        for pieces in all.chunk_by(|a, b| a.sequences == b.sequences) {
            let mut entries = self.entry_states(call, inputs, state, pieces)?;
            for piece in pieces.iter().rev() {
                // Each is let go after its piece; passes that are not causal have one for all.
                let entry = if call.pass == Pass::Causal { entries.pop() } else { None };
                let whole;
                let entry = match &entry {
                    Some(entry) => entry,
                    None => {
                        whole = self.whole(state, piece);
                        &whole
                    }
                };
                self.backward_piece(call, inputs, entry, piece, &results, &moving)?;
            }
        }
        let Moving { gradient, sums: moved } = moving;
        *grad_state = gradient;
        *sums = moved;
        let tensor = |view: Option<TensorView<'_>>, output: Option<Output>| {
            let (view, output) = (view?, output?);
            Some(Tensor::result(DType::F32, view.shape().to_vec(), output.result))
        };
        let Results { dq, dk, dv } = results;
        Ok(InputGradients { dq: tensor(inputs.q, dq), dk: tensor(inputs.k, dk), dv: tensor(inputs.v, dv) })
    }

    /// A state as the one before a piece.
    fn whole(&self, state: &GpuState, piece: &Piece) -> Entry {
        let state = GpuState { ctx: state.ctx.clone(), buffer: state.buffer.clone(), batch: state.batch };
        Entry { state, sequences: piece.sequences.clone() }
    }

    /// The states before each of the pieces of some sequences: one ascending sweep over all keys but the last piece's.
    fn entry_states(
        &mut self,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &GpuState,
        pieces: &[Piece],
    ) -> Result<Vec<Entry>> {
        let (op, ctx) = (call.op, self.ctx.clone());
        if call.pass != Pass::Causal {
            return Ok(Vec::new());
        }
        let mut entries: Vec<Entry> = Vec::with_capacity(pieces.len());
        for (i, piece) in pieces.iter().enumerate() {
            let Some(last) = i.checked_sub(1).and_then(|i| entries.get(i)) else {
                entries.push(self.whole(state, piece));
                continue;
            };
            let done = &pieces[i - 1];
            let sequences = 0..piece.sequences.len();
            let one = self.geometry.state_bytes();
            let bytes = sequences.len() as u64 * one;
            let buffer = ctx.buffer(op, "RACE state", bytes, STORAGE)?;
            let next = GpuState { ctx: ctx.clone(), buffer, batch: sequences.len() };
            let mut passes = Passes::new(&ctx, op);
            let from = last.sequences.start as u64 * one;
            passes.copy((&last.state.buffer, from), (&next.buffer, 0), bytes);
            let next = Entry { state: next, sequences };
            let staged = self.staged(call, inputs, done, Pass::Absorb)?;
            let (hashes, matrices) = self.scratch(op, done)?;
            let info = self.info(&mut passes, done, &call.lengths);
            for heads in self.head_blocks(done) {
                for ensemble in 0..self.geometry.ensembles {
                    let block = self.block(done, &info, heads.clone(), ensemble);
                    if let Some((k, v)) = &staged.keys {
                        self.project(&mut passes, &block, k, false, &hashes)?;
                        self.chunk_sums(&mut passes, &block, v, &hashes, &matrices, false)?;
                        self.advance(&mut passes, &next.numbered(&block), &next.state, &matrices, false)?;
                    }
                }
            }
            passes.ready()?.run(&ctx, op, Recording::Run)?;
            entries.push(next);
        }
        Ok(entries)
    }

    fn staged(&self, call: &Call, inputs: &Inputs<'_>, piece: &Piece, pass: Pass) -> Result<Staged> {
        let staged = |tensor, view| -> Result<Input> {
            stage(&self.ctx, call.op, &needed(call.op, tensor, view)?, piece.sequences.clone(), piece.tokens.clone())
        };
        let reads = || Ok::<_, Error>((staged("q", inputs.q)?, staged("grad_o", inputs.grad_o)?));
        let absorbs = || Ok::<_, Error>((staged("k", inputs.k)?, staged("v", inputs.v)?));
        Ok(Staged {
            queries: if pass.reads() { Some(reads()?) } else { None },
            keys: if pass.absorbs() { Some(absorbs()?) } else { None },
            grad: inputs.grad_o.map_or(DType::F32, |view| view.dtype()),
        })
    }

    fn room(&mut self, op: &'static str, piece: &Piece, reads: bool) -> Result<Room> {
        let (g, ctx) = (self.geometry, self.ctx.clone());
        let (hashes, matrices) = self.scratch(op, piece)?;
        let keys = piece.sequences.len() * piece.tokens.len() * piece.heads;
        let queries = if reads { keys * g.group } else { 0 };
        let gradients = (queries * g.hash_gradient(true)).max(keys * g.hash_gradient(false)) * 4;
        let w = &mut self.workspace;
        let hash_gradients = w.hash_gradients.get(&ctx, op, "bytes of gradients of hashes", gradients as u64)?;
        let readings = if reads {
            Some(w.readings.get(&ctx, op, "bytes of readings", (queries * g.reading() * 4) as u64)?)
        } else {
            None
        };
        let rows = queries.max(keys) / piece.heads;
        let one = piece.heads * g.bits() * (g.head_dim + 1) * 4;
        let most = (SHARES as usize / one).max(1);
        let share = rows.div_ceil(most).max(SHARE_ROWS).next_multiple_of(32);
        let shares = (rows.div_ceil(share) * one) as u64;
        let shares = self.workspace.shares.get(&ctx, op, "bytes of parameter gradients", shares)?;
        Ok(Room { hashes, matrices, hash_gradients, readings, shares, share })
    }

    fn backward_piece(
        &mut self,
        call: &Call,
        inputs: &Inputs<'_>,
        entry: &Entry,
        piece: &Piece,
        results: &Results,
        moving: &Moving,
    ) -> Result<()> {
        let (op, ctx) = (call.op, self.ctx.clone());
        let staged = self.staged(call, inputs, piece, call.pass)?;
        let room = self.room(op, piece, call.pass.reads())?;
        let mut passes = Passes::new(&ctx, op);
        let info = self.info(&mut passes, piece, &call.lengths);
        for heads in self.head_blocks(piece) {
            for ensemble in 0..self.geometry.ensembles {
                let block = self.block(piece, &info, heads.clone(), ensemble);
                self.backward_block(&mut passes, call, piece, &block, &staged, entry, &room, results, moving)?;
            }
        }
        passes.ready()?.run(&ctx, op, Recording::Run)
    }

    #[allow(clippy::too_many_arguments, reason = "one block's inputs and outputs, all different")]
    fn backward_block(
        &self,
        passes: &mut Passes<'_>,
        call: &Call,
        piece: &Piece,
        block: &Block,
        staged: &Staged,
        entry: &Entry,
        room: &Room,
        results: &Results,
        moving: &Moving,
    ) -> Result<()> {
        let g = &self.geometry;
        let matrices = &room.matrices;
        let tiles = block.units() * (block.params.tokens as usize).div_ceil(32);
        let scaled = |params: Params| Params { scale: self.weight / g.ensembles as f32, ..params };
        if let Some((k, _)) = &staged.keys {
            self.project(passes, block, k, false, &room.hashes)?;
        }
        if let (Some((q, grad_o)), Some(readings)) = (&staged.queries, &room.readings) {
            self.project(passes, block, q, true, &room.hashes)?;
            let mut binds = vec![block.info.clone(), grad_o.bind.clone()];
            binds.extend([&room.hashes, &matrices.sums, &room.hash_gradients, readings].map(Bind::from));
            let mut params = Params { input: grad_o.strides, ..scaled(block.params) };
            let numbered = entry.numbered(block);
            match &staged.keys {
                Some((_, v)) => {
                    self.chunk_sums(passes, block, v, &room.hashes, matrices, true)?;
                    self.scan(passes, &numbered, KEEP_STATE, &entry.state, matrices, false)?;
                    binds.push(v.bind.clone());
                    params.input2 = v.strides;
                }
                None => {
                    let one = self.read_state(passes, &numbered, &entry.state, matrices, false)?.params;
                    (params.slots, params.parts_at) = (one.slots, one.parts_at);
                }
            }
            let read = staged.keys.is_none();
            let (kernel, groups) = if g.chunk_hashes(false) && !read {
                (self.hash_chunk(false, staged.grad, &params), block.units() * block.chunks * g.group)
            } else {
                (BackwardKernel::Query { grad: staged.grad, read }, tiles * g.group)
            };
            passes.dispatch(self.backward_key(kernel), params, groups as u64, binds)?;
            self.backward_hash(passes, call, piece, block, q, true, results.dq.as_ref(), room, moving)?;

            let params = Params { input: grad_o.strides, ..scaled(block.params) };
            let groups = block.units() * block.runs() * g.bucket_tiles() * g.channel_blocks();
            let mut binds = vec![block.info.clone(), grad_o.bind.clone()];
            binds.extend([&room.hashes, &matrices.sums, readings].map(Bind::from));
            let wide = grad_o.strides.in_fours() && g.value_dim.is_multiple_of(4);
            let kernel = BackwardKernel::QuerySums { grad: staged.grad, wide };
            passes.dispatch(self.backward_key(kernel), params, groups as u64, binds)?;
            self.scan(passes, block, 0, &moving.gradient, matrices, true)?;
        }
        let Some((k, v)) = &staged.keys else { return Ok(()) };
        let absorb = staged.queries.is_none();
        let block =
            &if absorb { self.read_state(passes, block, &moving.gradient, matrices, true)? } else { block.clone() };
        let grad = if absorb { DType::F32 } else { staged.grad };
        let params = scaled(block.params);
        let of_queries = staged.queries.as_ref().zip(room.readings.as_ref());

        let mut binds = vec![block.info.clone(), v.bind.clone()];
        binds.extend([&room.hashes, &matrices.sums, &room.hash_gradients].map(Bind::from));
        let mut key = Params { input: v.strides, ..params };
        if let Some(((_, grad_o), readings)) = of_queries {
            key.input2 = grad_o.strides;
            binds.extend([grad_o.bind.clone(), Bind::from(readings)]);
        }
        let (kernel, groups) = if g.chunk_hashes(true) && !absorb {
            (self.hash_chunk(true, grad, &key), block.units() * block.chunks)
        } else {
            (BackwardKernel::Key { grad, absorb }, tiles * g.bucket_blocks())
        };
        passes.dispatch(self.backward_key(kernel), key, groups as u64, binds)?;
        self.backward_hash(passes, call, piece, block, k, false, results.dk.as_ref(), room, moving)?;

        let Some(dv) = &results.dv else { return Ok(()) };
        let (bind, value) = self.written(call, piece, block, dv, g.num_kv_heads * g.value_dim);
        // Where there are no queries nothing reads the input, and any will do.
        let input = of_queries.map_or(v, |((_, grad_o), _)| grad_o);
        let value = Params { input: input.strides, ..scaled(value) };
        let mut binds = vec![block.info.clone(), input.bind.clone()];
        binds.extend([&room.hashes, &matrices.sums].map(Bind::from));
        binds.push(bind);
        binds.extend(of_queries.map(|(_, readings)| Bind::from(readings)));
        let fours = g.value_dim.is_multiple_of(4);
        let (wide, wide_out) = (fours && value.input.in_fours(), fours && value.out_in_fours());
        let kernel = BackwardKernel::Value { grad, absorb, wide, wide_out };
        let groups = block.units() * block.chunks * g.channel_blocks();
        passes.dispatch(self.backward_key(kernel), value, groups as u64, binds)
    }

    /// The kernel of gradients of hashes of whole chunks.
    fn hash_chunk(&self, keys: bool, grad: DType, params: &Params) -> BackwardKernel {
        let fours = self.geometry.value_dim.is_multiple_of(4);
        let (wide, wide2) = (fours && params.input.in_fours(), fours && params.input2.in_fours());
        BackwardKernel::HashChunk { keys, grad, wide, wide2 }
    }

    /// A piece of a result with `row` elements a token, to be written by the first ensemble and added to by others.
    fn written(&self, call: &Call, piece: &Piece, block: &Block, output: &Output, row: usize) -> (Bind, Params) {
        let (bind, out_at) = self.bind_rows(output, call, piece, row);
        let flags = if block.ensemble > 0 { ADD } else { 0 };
        (bind, Params { out_at, out_batch: (call.tokens * row) as u32, flags, ..block.params })
    }

    /// From gradients of hashes to those of `x` (q or k), of hyperplanes and of β.
    #[allow(clippy::too_many_arguments, reason = "one block's inputs and outputs, all different")]
    fn backward_hash(
        &self,
        passes: &mut Passes<'_>,
        call: &Call,
        piece: &Piece,
        block: &Block,
        x: &Input,
        queries: bool,
        dx: Option<&Output>,
        room: &Room,
        moving: &Moving,
    ) -> Result<()> {
        let g = &self.geometry;
        let (per_head, t_at) = if queries { (g.group, block.params.q_at) } else { (1, block.params.k_at) };
        let rows = block.sequences.len() * block.params.tokens as usize * per_head;
        let (hashes, gradients) = (Bind::from(&room.hashes), Bind::from(&room.hash_gradients));
        if let Some(dx) = dx {
            let (bind, params) = self.written(call, piece, block, dx, g.num_kv_heads * per_head * g.head_dim);
            let params = Params { k_at: t_at, ..params };
            let groups = (g.head_dim.div_ceil(64 * g.head_pairs()) * block.heads.len() * rows.div_ceil(64)) as u64;
            let wide_out = params.out_in_fours() && g.head_dim.is_multiple_of(4);
            let binds = vec![block.info.clone(), hashes.clone(), gradients.clone(), Bind::from(&self.planes), bind];
            passes.dispatch(
                self.backward_key(BackwardKernel::HashInputs { queries, wide_out }),
                params,
                groups,
                binds,
            )?;
        }
        let shares = rows.div_ceil(room.share);
        let params = Params { input: x.strides, k_at: t_at, chunks: room.share as u32, ..block.params };
        let groups = (g.head_dim.div_ceil(128) * g.bits().div_ceil(16) * block.heads.len() * shares) as u64;
        let wide = x.strides.in_fours() && g.head_dim.is_multiple_of(4);
        let binds = vec![block.info.clone(), x.bind.clone(), hashes, gradients, Bind::from(&room.shares)];
        passes.dispatch(self.backward_key(BackwardKernel::HashParameters { queries, wide }), params, groups, binds)?;

        let sets = moving.sums.sets();
        let one = g.bits() * (g.head_dim + 1);
        let params =
            Params { slots: sets as u32, chunks: shares as u32, out_at: (block.ensemble * one) as u32, ..block.params };
        let elements = one * if sets > 1 { block.heads.len() } else { 1 };
        let binds = vec![block.info.clone(), Bind::from(&room.shares), Bind::from(&moving.sums.totals)];
        passes.dispatch(self.backward_key(BackwardKernel::AddParameters), params, elements.div_ceil(16) as u64, binds)
    }
}
