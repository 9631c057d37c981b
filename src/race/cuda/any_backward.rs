//! The backward passes for any shape: [`super::any`]'s pieces, from the last to the first, after one ascending sweep over
//! the keys for the state before each.

use super::CudaRace;
use super::any::{ADD, Block, Room, Working, column_tiles, grid, matrix_tiles, row_tiles, tiles, with};
use super::kernels::Kernel;
use super::params::PieceParams;
use super::state::{CudaParameterSums, CudaState};
use crate::engine::cuda::{Bind, Buffer, Input, Passes, bytes_of};
use crate::error::Result;
use crate::race::executor::{Call, InputGradients, Inputs, Pass};
use crate::race::plan::{CHUNK, Piece};
use crate::tensor::{DType, Tensor, TensorView};

/// Where a call's results go.
struct Results {
    dq: Option<Buffer>,
    dk: Option<Buffer>,
    dv: Option<Buffer>,
}

impl CudaRace {
    /// A backward pass.
    pub(super) fn any_backward(
        &mut self,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &CudaState,
        gradient: &CudaState,
        sums: &CudaParameterSums,
    ) -> Result<InputGradients> {
        let (op, ctx) = (call.op, self.ctx.clone());
        let gradient_of = |view: Option<TensorView<'_>>| -> Result<Option<Buffer>> {
            let bytes = |view: TensorView<'_>| bytes_of(&view.shape()).saturating_mul(4);
            view.map(|view| ctx.buffer(op, bytes(view))).transpose()
        };
        let results = Results { dq: gradient_of(inputs.q)?, dk: gradient_of(inputs.k)?, dv: gradient_of(inputs.v)? };
        let all = self.any_pieces(call)?;
        let of_state = Working::new(op, &gradient.buffer, &all)?;
        let of_sums = Working::new(op, &sums.totals, &all)?;
        let into_state = CudaState { buffer: of_state.buffer.clone(), pending: gradient.pending.clone() };
        let into_sums = CudaParameterSums { totals: of_sums.buffer.clone(), ..*sums };
        for some in all.chunk_by(|a, b| a.sequences == b.sequences) {
            let mut entries = self.entries(call, inputs, state, some)?;
            for piece in some.iter().rev() {
                let mut passes = Passes::new(&ctx, op);
                let (entry, first) = match entries.pop() {
                    Some(entry) => (entry, 0),
                    None => (state.buffer.clone(), piece.sequences.start),
                };
                let (gradient, sums) = (&into_state, &into_sums);
                self.backward_piece(&mut passes, call, inputs, (&entry, first), piece, &results, gradient, sums)?;
                passes.ready()?.run(&ctx, op)?;
            }
        }
        of_state.finish(op, &gradient.buffer)?;
        of_sums.finish(op, &sums.totals)?;
        let tensor = |view: Option<TensorView<'_>>, buffer: Option<Buffer>| {
            let (view, buffer) = (view?, buffer?);
            Some(Tensor::cuda(DType::F32, view.shape().to_vec(), buffer))
        };
        let Results { dq, dk, dv } = results;
        Ok(InputGradients { dq: tensor(inputs.q, dq), dk: tensor(inputs.k, dk), dv: tensor(inputs.v, dv) })
    }

    /// Of a causal pass, the states of the pieces' sequences before each piece: one ascending sweep over the keys.
    fn entries(
        &mut self,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &CudaState,
        pieces: &[Piece],
    ) -> Result<Vec<Buffer>> {
        let (op, ctx) = (call.op, self.ctx.clone());
        let mut entries: Vec<Buffer> = Vec::new();
        if call.pass != Pass::Causal {
            return Ok(entries);
        }
        for (i, piece) in pieces.iter().enumerate() {
            let one = self.geometry.state_bytes();
            let bytes = piece.sequences.len() as u64 * one;
            let next = ctx.uninit(op, bytes)?;
            let from = match entries.last() {
                Some(last) => Bind::from(last),
                None => Bind::at(&state.buffer, piece.sequences.start as u64 * one),
            };
            let mut passes = Passes::new(&ctx, op);
            passes.copy(from, Bind::from(&next), bytes);
            if let Some(done) = i.checked_sub(1).and_then(|i| pieces.get(i)) {
                let k = self.piece_input(call, done, "k", inputs.k)?;
                let v = self.piece_input(call, done, "v", inputs.v)?;
                let room = self.room(op, done, true)?;
                let lengths = Self::piece_lengths(&mut passes, call, done);
                for heads in self.head_blocks(done) {
                    for ensemble in 0..self.geometry.ensembles {
                        let block = self.any_block(done, &lengths, heads.clone(), ensemble);
                        self.hashes(&mut passes, &block, &k, false, &room)?;
                        self.chunk_sums(&mut passes, &block, &v, &room)?;
                        self.any_scan(&mut passes, &block, &next, 0, &room, false, false, false)?;
                    }
                }
            }
            passes.ready()?.run(&ctx, op)?;
            entries.push(next);
        }
        Ok(entries)
    }

    #[allow(clippy::too_many_arguments, reason = "one piece's inputs and outputs, all different")]
    fn backward_piece(
        &mut self,
        passes: &mut Passes<'_>,
        call: &Call,
        inputs: &Inputs<'_>,
        entry: (&Buffer, usize),
        piece: &Piece,
        results: &Results,
        gradient: &CudaState,
        sums: &CudaParameterSums,
    ) -> Result<()> {
        let (op, g) = (call.op, self.geometry);
        let take = |tensor, view, wanted: bool| -> Result<Option<Input>> {
            if wanted { self.piece_input(call, piece, tensor, view).map(Some) } else { Ok(None) }
        };
        let (reads, absorbs) = (call.pass.reads(), call.pass.absorbs());
        let (q, grad_o) = (take("q", inputs.q, reads)?, take("grad_o", inputs.grad_o, reads)?);
        let (k, v) = (take("k", inputs.k, absorbs)?, take("v", inputs.v, absorbs)?);
        let grad = inputs.grad_o.map_or(DType::F32, |view| view.dtype());
        let room = self.room(op, piece, true)?;
        let lengths = Self::piece_lengths(passes, call, piece);
        for heads in self.head_blocks(piece) {
            for ensemble in 0..g.ensembles {
                let mut block = self.any_block(piece, &lengths, heads.clone(), ensemble);
                block.params.scale = self.weight / g.ensembles as f32;
                let keys = k.as_ref().zip(v.as_ref());
                if let Some((k, _)) = keys {
                    self.hashes(passes, &block, k, false, &room)?;
                }
                if let (Some(q), Some(grad_o)) = (&q, &grad_o) {
                    self.hashes(passes, &block, q, true, &room)?;
                    if let Some((_, v)) = keys {
                        self.chunk_sums(passes, &block, v, &room)?;
                    }
                    self.any_scan(passes, &block, entry.0, entry.1, &room, false, true, keys.is_none())?;
                    let mut of_read = block.params;
                    if keys.is_none() {
                        of_read.slots = 1;
                    }
                    self.backward_read(passes, &block, of_read, grad_o, keys.map(|(_, v)| v), grad, &room)?;
                    self.backward_hash(passes, call, &block, q, true, results.dq.as_ref(), &room, sums)?;
                    self.query_sums(passes, &block, grad_o, grad, &room)?;
                    let first = piece.sequences.start;
                    self.any_scan(passes, &block, &gradient.buffer, first, &room, true, false, false)?;
                }
                let Some((k, v)) = keys else { continue };
                let absorb = grad_o.is_none();
                if absorb {
                    let first = piece.sequences.start;
                    self.any_scan(passes, &block, &gradient.buffer, first, &room, true, true, true)?;
                    block.params.slots = 1;
                }
                self.backward_keys(passes, call, &block, v, grad_o.as_ref(), grad, results.dv.as_ref(), &room)?;
                self.backward_hash(passes, call, &block, k, false, results.dk.as_ref(), &room, sums)?;
            }
        }
        Ok(())
    }

    /// From queries to the gradients of their weights, and what they give to those of the sums.
    #[allow(clippy::too_many_arguments, reason = "one block's inputs, all different")]
    fn backward_read(
        &self,
        passes: &mut Passes<'_>,
        block: &Block<'_>,
        params: PieceParams,
        grad_o: &Input,
        v: Option<&Input>,
        grad: DType,
        room: &Room,
    ) -> Result<()> {
        let g = &self.geometry;
        let queries = block.chunks() * g.group;
        let read = v.is_none();
        let lengths = block.lengths.clone();
        let [keys, psi, matrices, statistics, gains, values, masses] =
            [&room.alpha_k, &room.alpha_q, &room.matrices, &room.statistics, &room.gains, &room.values, &room.masses]
                .map(Bind::from);
        let with_grad = with(params, Some(grad_o), v);
        if let Some(v) = v {
            let binds = vec![grad_o.bind.clone(), v.bind.clone(), lengths.clone(), gains.clone()];
            passes.dispatch(self.key(Kernel::Gains { grad }), with_grad, tiles(queries), binds)?;
        }
        let binds = vec![grad_o.bind.clone(), gains, keys.clone(), matrices.clone(), lengths.clone(), values.clone()];
        let grid = tiles(queries * column_tiles(g.buckets() + 1));
        passes.dispatch(self.key(Kernel::Values { grad, read }), with_grad, grid, binds)?;
        let heads = Bind::from(&self.heads);
        let binds = vec![keys, matrices, heads, lengths, values, psi, masses, statistics];
        passes.dispatch(self.key(Kernel::Query { read }), params, tiles(queries), binds)
    }

    fn query_sums(
        &self,
        passes: &mut Passes<'_>,
        block: &Block<'_>,
        grad_o: &Input,
        grad: DType,
        room: &Room,
    ) -> Result<()> {
        let grid = tiles(block.chunks() * matrix_tiles(&self.geometry));
        let mut binds = vec![grad_o.bind.clone()];
        binds.extend([&room.alpha_q, &room.masses, &room.statistics].map(Bind::from));
        binds.extend([block.lengths.clone(), Bind::from(&room.matrices)]);
        let params = with(block.params, Some(grad_o), None);
        passes.dispatch(self.key(Kernel::QuerySums { grad }), params, grid, binds)
    }

    /// Gradients of keys' weights, and dv.
    #[allow(clippy::too_many_arguments, reason = "one block's inputs and outputs, all different")]
    fn backward_keys(
        &self,
        passes: &mut Passes<'_>,
        call: &Call,
        block: &Block<'_>,
        v: &Input,
        grad_o: Option<&Input>,
        grad: DType,
        dv: Option<&Buffer>,
        room: &Room,
    ) -> Result<()> {
        let g = &self.geometry;
        let keys = block.chunks();
        let absorb = grad_o.is_none();
        let lengths = block.lengths.clone();
        let mut binds = vec![v.bind.clone()];
        let arrays = [&room.alpha_k, &room.gains, &room.alpha_q, &room.masses, &room.matrices];
        binds.extend(arrays.map(Bind::from));
        binds.extend([Bind::from(&self.heads), lengths.clone(), Bind::from(&room.w)]);
        let params = with(block.params, Some(v), None);
        passes.dispatch(self.key(Kernel::Key { absorb }), params, tiles(keys * column_tiles(g.buckets())), binds)?;
        let Some(dv) = dv else { return Ok(()) };
        if !absorb {
            let mut binds: Vec<Bind> = [&room.alpha_q, &room.alpha_k, &room.statistics].map(Bind::from).into();
            binds.extend([lengths.clone(), Bind::from(&room.products)]);
            passes.dispatch(self.key(Kernel::Products), block.params, tiles(keys * g.group), binds)?;
        }
        let params = with(block.params, grad_o, None);
        let (out, params) = self.rows_of(call, block.piece, dv, 4, g.num_kv_heads * g.value_dim, params);
        let params = PieceParams { flags: if block.ensemble > 0 { ADD } else { 0 }, ..params };
        let mut binds = vec![grad_o.map_or_else(Bind::null, |input| input.bind.clone())];
        binds.extend([&room.alpha_k, &room.products, &room.matrices].map(Bind::from));
        binds.extend([lengths, out]);
        let grid = tiles(keys * column_tiles(g.value_dim));
        passes.dispatch(self.key(Kernel::Value { grad, absorb }), params, grid, binds)
    }

    /// From gradients of weights to those of `x` (q or k), of hyperplanes and of β.
    #[allow(clippy::too_many_arguments, reason = "one block's inputs and outputs, all different")]
    fn backward_hash(
        &self,
        passes: &mut Passes<'_>,
        call: &Call,
        block: &Block<'_>,
        x: &Input,
        queries: bool,
        dx: Option<&Buffer>,
        room: &Room,
        sums: &CudaParameterSums,
    ) -> Result<()> {
        let g = &self.geometry;
        let per_head = if queries { g.group } else { 1 };
        let rows = block.rows() * per_head;
        let (w, t) = if queries { (&room.values, &room.t_q) } else { (&room.w, &room.t_k) };
        let binds = vec![Bind::from(w), Bind::from(t), Bind::from(&self.heads), Bind::from(&room.du)];
        passes.dispatch(self.key(Kernel::ThroughHash { queries }), block.params, grid(rows * g.bits()), binds)?;
        if let Some(dx) = dx {
            let row = g.num_kv_heads * per_head * g.head_dim;
            let (out, params) = self.rows_of(call, block.piece, dx, 4, row, block.params);
            let params = PieceParams { flags: if block.ensemble > 0 { ADD } else { 0 }, ..params };
            let binds = vec![Bind::from(&room.du), block.planes.clone(), block.lengths.clone(), out];
            let grid = tiles(block.chunks() * per_head * column_tiles(g.head_dim));
            passes.dispatch(self.key(Kernel::HashInputs { queries }), params, grid, binds)?;
        }
        let heads = block.heads.len();
        let parts = room.parts;
        let params = PieceParams { share: (room.share * CHUNK) as u32, ..with(block.params, Some(x), None) };
        let binds = vec![x.bind.clone(), Bind::from(&room.du), block.lengths.clone(), Bind::from(&room.shares)];
        let grid = tiles(parts * heads * row_tiles(g.bits()) * column_tiles(g.head_dim));
        passes.dispatch(self.key(Kernel::HashParameters { queries }), params, grid, binds)?;
        self.add_shares(passes, &room.shares, parts, heads, 1, block.heads.start, block.ensemble, sums)
    }
}
