//! Forward passes.

use super::kernels::Kernel;
use super::params::Params;
use super::state::GpuState;
use super::sweep::Block;
use super::{GpuRace, too_large};
use crate::engine::Recording;
use crate::engine::gpu::{Bind, Input, Passes, ResultBuffer, stage};
use crate::error::{Error, Result};
use crate::race::executor::{Call, Inputs, Pass, needed};
use crate::race::plan::{Budget, Piece, pieces};
use crate::tensor::{DType, Tensor};
use std::sync::Arc;

/// Pieces of one submission: what a driver keeps of a call stays bounded however long it is.
const PIECES: usize = 8;

/// A result, and where its pieces are bound.
pub(super) struct Output {
    pub result: Arc<ResultBuffer>,
    pub dtype: DType,
}

impl GpuRace {
    pub(super) fn run_forward(
        &mut self,
        rec: Recording<'_>,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &mut GpuState,
    ) -> Result<Option<Tensor>> {
        let op = call.op;
        self.ctx.check_alive(op)?;
        self.own(op, state)?;
        let g = self.geometry;
        let output = if call.pass.reads() { Some(self.output(call)?) } else { None };
        let shape = vec![call.batch(), call.tokens, g.num_q_heads, g.value_dim];
        if let (Recording::Into(_), Some(output)) = (&rec, &output) {
            output.result.lend();
        }
        if let (Some(output), Pass::Causal, 1) = (&output, call.pass, call.tokens) {
            self.step(rec, call, inputs, state, output)?;
            return Ok(Some(Tensor::result(output.dtype, shape, output.result.clone())));
        }
        let limit = self.budget.binding;
        let all = pieces(&g, &self.budget, call.batch(), call.tokens).map_err(|value| too_large(op, value, limit))?;
        let has_work = |piece: &Piece| piece.sequences.clone().any(|b| call.lengths[b] > piece.tokens.start);
        let all: Vec<Piece> = all.into_iter().filter(has_work).collect();
        match rec {
            Recording::Run if all.len() > PIECES => {
                // Several submissions: on a copy, for the state to stay as it was if a later one fails.
                let mut moved = if call.pass.absorbs() { Some(self.copy_state(op, state)?) } else { None };
                for some in all.chunks(PIECES) {
                    let on = moved.as_ref().unwrap_or(state);
                    self.forward_pieces(Recording::Run, call, inputs, on, some, output.as_ref())?;
                }
                if let Some(moved) = moved.take() {
                    *state = moved;
                }
            }
            rec => self.forward_pieces(rec, call, inputs, state, &all, output.as_ref())?,
        }
        Ok(output.map(|o| Tensor::result(o.dtype, shape, o.result)))
    }

    /// A result of zeros.
    fn output(&self, call: &Call) -> Result<Output> {
        let (op, g, dtype) = (call.op, &self.geometry, call.output);
        if let Some(buffer) = call.into.as_ref().and_then(Tensor::as_buffer) {
            return Ok(Output { result: ResultBuffer::of_caller(self.ctx.clone(), buffer.clone()), dtype });
        }
        if dtype != DType::F32 && !g.value_dim.is_multiple_of(2) {
            let why = format!("16-bit outputs of an odd value_dim = {} on a GPU; ask for F32 output", g.value_dim);
            return Err(Error::Unsupported { op, why });
        }
        let bytes = (call.batch() * call.tokens * g.num_q_heads) as u64 * (g.value_dim * dtype.size()) as u64;
        Ok(Output { result: ResultBuffer::zeros(&self.ctx, op, bytes)?, dtype })
    }

    /// The rows of a piece in a result of `row` elements a token, as a binding with the first element in it.
    pub(super) fn bind_rows(&self, output: &Output, call: &Call, piece: &Piece, row: usize) -> (Bind, u32) {
        let size = output.dtype.size() as u64;
        let at = |b: usize, token: usize| (b * call.tokens + token) as u64 * row as u64 * size;
        let start = at(piece.sequences.start, piece.tokens.start);
        let end = at(piece.sequences.end - 1, piece.tokens.end);
        Bind::range(&self.ctx, output.result.buffer(), start..end, size as usize)
    }

    /// One token of each sequence.
    fn step(
        &self,
        rec: Recording<'_>,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &GpuState,
        output: &Output,
    ) -> Result<()> {
        let (op, g, ctx) = (call.op, &self.geometry, &self.ctx);
        // No scratch, so bindings alone bound a piece.
        let budget = Budget { matrices: u64::MAX, rows: usize::MAX, ..self.budget };
        let all = pieces(g, &budget, call.batch(), 1).map_err(|value| too_large(op, value, budget.binding))?;
        let mut passes = Passes::new(ctx, op);
        for piece in &all {
            let staged = |tensor, view| -> Result<Input> {
                stage(ctx, op, &needed(op, tensor, view)?, piece.sequences.clone(), 0..1)
            };
            let (q, k, v) = (staged("q", inputs.q)?, staged("k", inputs.k)?, staged("v", inputs.v)?);
            let info = self.info(&mut passes, piece, &call.lengths);
            let row = g.num_q_heads * g.value_dim;
            let (bind, out_at) = self.bind_rows(output, call, piece, row);
            let (state, state_at) = self.bind_state(state, &piece.sequences);
            let params = Params {
                input: k.strides,
                input2: q.strides,
                input3: v.strides,
                out_at,
                out_batch: row as u32,
                state_at,
                scale: self.weight,
                ..self.block(piece, &info, 0..g.num_kv_heads, 0).params
            };
            let units = (piece.sequences.len() * g.num_kv_heads) as u64;
            let planes = Bind::from(&self.planes);
            let binds = vec![info.clone(), k.bind.clone(), planes.clone(), state.clone(), q.bind, v.bind, bind];
            let kernel = Kernel::Step { output: output.dtype };
            passes.dispatch(self.key(kernel), params, units * g.value_dim.div_ceil(32) as u64, binds)?;
            let binds = vec![info, k.bind, planes, state];
            passes.dispatch(self.key(Kernel::StepMass), params, units * g.ensembles as u64, binds)?;
        }
        passes.ready()?.run(ctx, op, rec)
    }

    fn forward_pieces(
        &mut self,
        rec: Recording<'_>,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &GpuState,
        pieces: &[Piece],
        output: Option<&Output>,
    ) -> Result<()> {
        let op = call.op;
        let ctx = self.ctx.clone();
        let mut passes = Passes::new(&ctx, op);
        for piece in pieces {
            self.forward_piece(&mut passes, call, inputs, state, piece, output)?;
        }
        passes.ready()?.run(&ctx, op, rec)
    }

    fn forward_piece(
        &mut self,
        passes: &mut Passes<'_>,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &GpuState,
        piece: &Piece,
        output: Option<&Output>,
    ) -> Result<()> {
        let (op, g, ctx) = (call.op, self.geometry, self.ctx.clone());
        let staged = |tensor, view| -> Result<Input> {
            stage(&ctx, op, &needed(op, tensor, view)?, piece.sequences.clone(), piece.tokens.clone())
        };
        let keys = if call.pass.absorbs() { Some((staged("k", inputs.k)?, staged("v", inputs.v)?)) } else { None };
        let queries = if call.pass.reads() { Some(staged("q", inputs.q)?) } else { None };
        let (hashes, matrices) = self.scratch(op, piece)?;
        let sums = if g.ensembles > 1 && output.is_some() {
            let rows = piece.sequences.len() * piece.tokens.len() * piece.heads * g.group;
            Some(self.workspace.sums.get(&ctx, op, "bytes of sums over ensembles", (rows * g.value_dim * 4) as u64)?)
        } else {
            None
        };
        let info = self.info(passes, piece, &call.lengths);
        for heads in self.head_blocks(piece) {
            for ensemble in 0..g.ensembles {
                let block = self.block(piece, &info, heads.clone(), ensemble);
                if let Some((k, v)) = &keys {
                    self.project(passes, &block, k, false, &hashes)?;
                    self.chunk_sums(passes, &block, v, &hashes, &matrices, queries.is_some())?;
                }
                let Some(q) = &queries else {
                    self.advance(passes, &block, state, &matrices, false)?;
                    continue;
                };
                self.project(passes, &block, q, true, &hashes)?;
                let (block, values) = match &keys {
                    Some((_, v)) => {
                        self.scan(passes, &block, 0, state, &matrices, false)?;
                        (block, v)
                    }
                    None => (self.read_state(passes, &block, state, &matrices, false)?, q),
                };
                let Some(output) = output else { continue };
                let row = g.num_q_heads * g.value_dim;
                let (bind, out_at) = self.bind_rows(output, call, piece, row);
                let params = Params {
                    input: values.strides,
                    out_at,
                    out_batch: (call.tokens * row) as u32,
                    scale: self.weight,
                    flags: u32::from(ensemble > 0) | (u32::from(ensemble + 1 == g.ensembles) << 1),
                    ..block.params
                };
                let (read, in_fours) = (keys.is_none(), values.strides.in_fours());
                let kernel = self.output_kernel(output.dtype, read, in_fours, params.out_in_fours());
                let mut binds =
                    vec![info.clone(), values.bind.clone(), Bind::from(&hashes), Bind::from(&matrices.sums), bind];
                binds.extend(sums.as_ref().map(Bind::from));
                passes.dispatch(self.key(kernel), params, self.query_groups(kernel, &block), binds)?;
            }
        }
        Ok(())
    }

    /// Workgroups of the kernels that tile queries.
    fn query_groups(&self, kernel: Kernel, block: &Block) -> u64 {
        let g = &self.geometry;
        let tiles = if matches!(kernel, Kernel::Output { .. }) { 2 } else { 1 };
        (block.units() * block.chunks * g.group * tiles * g.channel_blocks()) as u64
    }
}
