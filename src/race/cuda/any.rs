//! Passes for any shape: a call is cut into pieces ([`crate::race::plan::Piece`]), each worked on block by block of kv
//! heads and ensemble by ensemble. Sums and scans are those of [`crate::race::cuda::walk`], with chunks of 64 tokens in
//! the place of spans; what a chunk takes is products of tiles of 64 tokens, on the tensor cores at the precision of f32
//! (shaders/cuda/race/any/product.cuh).

use super::CudaRace;
use super::kernels::Kernel;
use super::params::{PieceParams, Scan};
use super::state::{CudaParameterSums, CudaState};
use crate::engine::cuda::{Bind, Buffer, Grid, Input, Passes, bytes_of, stage};
use crate::error::{Error, Result};
use crate::race::executor::{Call, InputGradients, Inputs, Pass, needed};
use crate::race::plan::{Budget, CHUNK, Geometry, Piece, pieces};
use crate::tensor::{DType, Tensor, TensorView};
use std::ops::Range;

/// Bytes of the scratch memory that grows with a piece's tokens, and of the matrices of its chunks.
const SCRATCH: usize = 256 << 20;
/// No binding has a limit here.
const NO_LIMIT: u64 = 1 << 50;
/// Rows of a share of the parameters' gradients at least, and bytes of all shares of a piece.
const SHARE_ROWS: usize = 256;
const SHARES: usize = 32 << 20;
/// Columns of a tile at most, and rows of one of buckets or bits.
const MOST_COLUMNS: usize = 128;
const MOST_ROWS: usize = 80;
/// Flags of kernels: add to what is there; write the result.
const ADD: u32 = 1;
const WRITE: u32 = 2;

/// Scratch memory of a piece, by name; all hold floats.
pub(super) struct Room {
    t_q: Buffer,
    t_k: Buffer,
    alpha_q: Buffer,
    alpha_k: Buffer,
    matrices: Buffer,
    products: Buffer,
    gains: Buffer,
    values: Buffer,
    masses: Buffer,
    statistics: Buffer,
    w: Buffer,
    du: Buffer,
    shares: Buffer,
    sums: Buffer,
    /// Rows of a share.
    share: usize,
}

/// One block of a piece's kv heads in one ensemble.
struct Block<'a> {
    piece: &'a Piece,
    heads: Range<usize>,
    ensemble: usize,
    lengths: Bind,
    planes: Bind,
    params: PieceParams,
}

impl Block<'_> {
    fn units(&self) -> usize {
        self.piece.sequences.len() * self.heads.len()
    }

    /// Chunks of all units.
    fn chunks(&self) -> usize {
        self.units() * self.piece.chunks()
    }

    /// (token, kv head) pairs.
    fn rows(&self) -> usize {
        self.units() * self.piece.tokens.len()
    }
}

/// Elements of scratch per (token, kv head) pair.
fn row_elements(g: &Geometry) -> usize {
    (g.group + 1) * (g.bits() + g.buckets())
        + g.group * (2 * CHUNK + 2 * (g.buckets() + 1) + 4 + 2 * g.bits() + g.value_dim)
        + g.buckets()
        + 2 * g.bits()
}

/// One thread an element.
fn grid(elements: usize) -> Grid {
    Grid::new(elements.div_ceil(256) as u64, 256)
}

/// One block a tile.
fn tiles(count: usize) -> Grid {
    Grid::new(count as u64, 256)
}

/// Tiles of `n` columns, and of rows that are buckets or bits: twins of shaders/cuda/race/any/product.cuh.
fn column_tiles(n: usize) -> usize {
    n.div_ceil(MOST_COLUMNS)
}

fn row_tiles(n: usize) -> usize {
    n.div_ceil(MOST_ROWS)
}

/// Tiles of the matrix of a chunk.
fn matrix_tiles(g: &Geometry) -> usize {
    row_tiles(g.buckets() + 1) * column_tiles(g.value_dim)
}

fn with(params: PieceParams, x: Option<&Input>, y: Option<&Input>) -> PieceParams {
    let strides = |input: Option<&Input>| input.map(|input| input.strides).unwrap_or_default();
    PieceParams { x: strides(x), y: strides(y), ..params }
}

impl CudaRace {
    /// Pieces that have work.
    fn any_pieces(&self, call: &Call) -> Result<Vec<Piece>> {
        let g = &self.geometry;
        let rows = (SCRATCH / (row_elements(g) * 4)) / CHUNK * CHUNK;
        let budget = Budget { binding: NO_LIMIT, matrices: SCRATCH as u64, rows: rows.clamp(CHUNK, 1 << 16) };
        let all = pieces(g, &budget, call.batch(), call.tokens).map_err(|value| Error::Limit {
            op: call.op,
            what: "bytes of one chunk's work",
            value,
            limit: NO_LIMIT,
        })?;
        let has_work = |piece: &Piece| piece.sequences.clone().any(|b| call.lengths[b] > piece.tokens.start);
        Ok(all.into_iter().filter(has_work).collect())
    }

    fn head_blocks(&self, piece: &Piece) -> Vec<Range<usize>> {
        let heads = self.geometry.num_kv_heads;
        (0..heads).step_by(piece.heads).map(|start| start..(start + piece.heads).min(heads)).collect()
    }

    fn room(&mut self, op: &'static str, piece: &Piece, backward: bool) -> Result<Room> {
        let (g, ctx) = (self.geometry, self.ctx.clone());
        let units = piece.sequences.len() * piece.heads;
        let keys = units * piece.tokens.len();
        let queries = keys * g.group;
        let w = &mut self.workspace;
        let one = piece.heads * g.bits() * (g.head_dim + 1) * 4;
        let most = (SHARES / one).max(1);
        let rows = queries / piece.heads;
        let share = rows.div_ceil(most).max(SHARE_ROWS);
        let of_backward = |elements: usize| if backward { elements } else { 0 };
        let mut get = |at: usize, elements: usize| w.any[at].get(&ctx, op, (elements * 4) as u64);
        let (t_q, t_k) = (get(0, queries * g.bits())?, get(1, keys * g.bits())?);
        let (alpha_q, alpha_k) = (get(2, queries * g.buckets())?, get(3, keys * g.buckets())?);
        let (products, statistics) = (get(4, queries * CHUNK)?, get(5, queries * 4)?);
        let sums = get(6, if g.ensembles > 1 { queries * g.value_dim } else { 0 })?;
        let wide = g.buckets() + 1;
        Ok(Room {
            gains: get(7, of_backward(queries * CHUNK))?,
            values: get(8, of_backward(queries * wide))?,
            masses: get(9, of_backward(queries * wide))?,
            w: get(10, of_backward(keys * g.buckets()))?,
            du: get(11, of_backward(queries * g.bits() * 2))?,
            shares: w.shares.get(&ctx, op, of_backward(rows.div_ceil(share) * one) as u64)?,
            matrices: w.matrices.get(&ctx, op, (units * piece.chunks() * g.matrix() * 4) as u64)?,
            t_q,
            t_k,
            alpha_q,
            alpha_k,
            products,
            statistics,
            sums,
            share,
        })
    }

    fn any_block<'a>(&self, piece: &'a Piece, lengths: &Bind, heads: Range<usize>, ensemble: usize) -> Block<'a> {
        let g = &self.geometry;
        let params = PieceParams {
            planes_step: self.planes_stride,
            batch: piece.sequences.len() as u32,
            tokens: piece.tokens.len() as u32,
            head: heads.start as u32,
            heads: heads.len() as u32,
            chunks: piece.chunks() as u32,
            slots: piece.chunks() as u32,
            scale: self.weight,
            ..PieceParams::default()
        };
        let planes = Bind::at(&self.planes, (ensemble * g.bits() * g.head_dim * 4) as u64);
        Block { piece, heads, ensemble, lengths: lengths.clone(), planes, params }
    }

    /// The tokens that each sequence of a piece has in it.
    fn piece_lengths(passes: &mut Passes<'_>, call: &Call, piece: &Piece) -> Bind {
        let in_piece = |b: usize| call.lengths[b].saturating_sub(piece.tokens.start).min(piece.tokens.len()) as u32;
        let lengths: Vec<u32> = piece.sequences.clone().map(in_piece).collect();
        passes.part(&lengths)
    }

    fn piece_input(
        &self,
        call: &Call,
        piece: &Piece,
        tensor: &'static str,
        view: Option<TensorView<'_>>,
    ) -> Result<Input> {
        let view = needed(call.op, tensor, view)?;
        stage(&self.ctx, call.op, tensor, &view, piece.sequences.clone(), piece.tokens.clone())
    }

    /// Where a piece's rows of a result begin, with its strides.
    fn rows_of(
        &self,
        call: &Call,
        piece: &Piece,
        buffer: &Buffer,
        size: usize,
        row: usize,
        p: PieceParams,
    ) -> (Bind, PieceParams) {
        let at = (piece.sequences.start * call.tokens + piece.tokens.start) * row * size;
        let (out_batch, out_token) = ((call.tokens * row) as u64, row as u64);
        (Bind::at(buffer, at as u64), PieceParams { out_batch, out_token, ..p })
    }

    /// t and α of keys or queries.
    fn hashes(&self, passes: &mut Passes<'_>, block: &Block<'_>, x: &Input, queries: bool, room: &Room) -> Result<()> {
        let g = &self.geometry;
        let per_head = if queries { g.group } else { 1 };
        let (t, alpha) = if queries { (&room.t_q, &room.alpha_q) } else { (&room.t_k, &room.alpha_k) };
        let params = with(block.params, Some(x), None);
        let heads = Bind::from(&self.heads);
        let mut binds = vec![x.bind.clone(), block.planes.clone(), heads, block.lengths.clone()];
        binds.extend([t, alpha].map(Bind::from));
        let parts = per_head * g.tables.div_ceil((MOST_COLUMNS / g.planes).max(1));
        passes.dispatch(self.key(Kernel::Hash { queries }), params, tiles(block.chunks() * parts), binds)
    }

    /// Sums over the keys of each chunk, from their hashes.
    fn chunk_sums(&self, passes: &mut Passes<'_>, block: &Block<'_>, v: &Input, room: &Room) -> Result<()> {
        let grid = tiles(block.chunks() * matrix_tiles(&self.geometry));
        let binds = vec![v.bind.clone(), Bind::from(&room.alpha_k), block.lengths.clone(), Bind::from(&room.matrices)];
        passes.dispatch(self.key(Kernel::ChunkSums), with(block.params, Some(v), None), grid, binds)
    }

    /// From sums of chunks to those before (reverse: after) each, `state` included, which moves on but with `keep`. The
    /// state's first sequence is `first`. With `alone` the state itself becomes each unit's one matrix.
    #[allow(clippy::too_many_arguments, reason = "one launch's arguments, all different")]
    fn any_scan(
        &self,
        passes: &mut Passes<'_>,
        block: &Block<'_>,
        state: &Buffer,
        first: usize,
        room: &Room,
        reverse: bool,
        keep: bool,
        alone: bool,
    ) -> Result<()> {
        let g = &self.geometry;
        let chunks = if alone { 1 } else { block.piece.chunks() as u32 };
        let scan = Scan {
            state_batch: (g.units() * g.state_unit()) as u64,
            state_head: (g.ensembles * g.state_unit()) as u64,
            spans: chunks,
            slots: chunks,
            group: 1,
            heads: block.heads.len() as u32,
            keep: u32::from(keep || alone),
            reserved: 0,
        };
        let at = (first * g.units() + block.heads.start * g.ensembles + block.ensemble) * g.state_unit() * 8;
        let matrices = [&room.matrices, &room.matrices];
        let state = Bind::at(state, at as u64);
        self.scan(passes, scan, block.units() as u64, matrices, block.heads.start, state, reverse)
    }

    /// A forward pass; o where it reads.
    pub(super) fn any_forward(
        &mut self,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &CudaState,
    ) -> Result<Option<Tensor>> {
        let (op, g, ctx) = (call.op, self.geometry, self.ctx.clone());
        let row = g.num_q_heads * g.value_dim;
        let output = if call.pass.reads() {
            Some(ctx.buffer(op, bytes_of(&[call.batch(), call.tokens, row, call.output.size()]))?)
        } else {
            None
        };
        let mut passes = Passes::new(&ctx, op);
        for piece in &self.any_pieces(call)? {
            let keys = if call.pass.absorbs() {
                Some((self.piece_input(call, piece, "k", inputs.k)?, self.piece_input(call, piece, "v", inputs.v)?))
            } else {
                None
            };
            let queries = if call.pass.reads() { Some(self.piece_input(call, piece, "q", inputs.q)?) } else { None };
            let room = self.room(op, piece, false)?;
            let lengths = Self::piece_lengths(&mut passes, call, piece);
            for heads in self.head_blocks(piece) {
                for ensemble in 0..g.ensembles {
                    let mut block = self.any_block(piece, &lengths, heads.clone(), ensemble);
                    if let Some((k, v)) = &keys {
                        self.hashes(&mut passes, &block, k, false, &room)?;
                        self.chunk_sums(&mut passes, &block, v, &room)?;
                    }
                    let (alone, first) = (keys.is_none(), piece.sequences.start);
                    self.any_scan(&mut passes, &block, &state.buffer, first, &room, false, false, alone)?;
                    if alone {
                        block.params.slots = 1;
                    }
                    if let (Some(q), Some(output)) = (&queries, &output) {
                        self.hashes(&mut passes, &block, q, true, &room)?;
                        let v = keys.as_ref().map(|(_, v)| v);
                        self.any_read(&mut passes, call, &block, v, output, &room)?;
                    }
                }
            }
        }
        passes.ready()?.run(&ctx, op)?;
        let shape = vec![call.batch(), call.tokens, g.num_q_heads, g.value_dim];
        Ok(output.map(|buffer| Tensor::cuda(call.output, shape, buffer)))
    }

    /// Outputs of hashed queries.
    fn any_read(
        &self,
        passes: &mut Passes<'_>,
        call: &Call,
        block: &Block<'_>,
        v: Option<&Input>,
        output: &Buffer,
        room: &Room,
    ) -> Result<()> {
        let g = &self.geometry;
        let queries = block.chunks() * g.group;
        let read = v.is_none();
        let (heads, lengths) = (Bind::from(&self.heads), block.lengths.clone());
        let [keys, psi, matrices, statistics, products, sums] =
            [&room.alpha_k, &room.alpha_q, &room.matrices, &room.statistics, &room.products, &room.sums]
                .map(Bind::from);
        let binds =
            vec![keys.clone(), matrices.clone(), heads.clone(), lengths.clone(), psi.clone(), statistics.clone()];
        passes.dispatch(self.key(Kernel::ReadWeights { read }), block.params, tiles(queries), binds)?;
        if !read {
            let binds = vec![psi.clone(), keys, statistics.clone(), lengths.clone(), products.clone()];
            passes.dispatch(self.key(Kernel::Products), block.params, tiles(queries), binds)?;
        }
        let params = with(block.params, v, None);
        let row = g.num_q_heads * g.value_dim;
        let (out, params) = self.rows_of(call, block.piece, output, call.output.size(), row, params);
        let add = if block.ensemble > 0 { ADD } else { 0 };
        let write = if block.ensemble + 1 == g.ensembles { WRITE } else { 0 };
        let params = PieceParams { flags: add | write, ..params };
        let values = v.map_or_else(Bind::null, |v| v.bind.clone());
        let binds = vec![values, psi, products, statistics, matrices, heads, lengths, sums, out];
        let kernel = Kernel::Output { output: call.output, read };
        passes.dispatch(self.key(kernel), params, tiles(queries * column_tiles(g.value_dim)), binds)
    }

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
        let mut passes = Passes::new(&ctx, op);
        for some in all.chunk_by(|a, b| a.sequences == b.sequences) {
            let mut entries = self.entries(&mut passes, call, inputs, state, some)?;
            for piece in some.iter().rev() {
                let (entry, first) = match entries.pop() {
                    Some(entry) => (entry, 0),
                    None => (state.buffer.clone(), piece.sequences.start),
                };
                self.backward_piece(&mut passes, call, inputs, (&entry, first), piece, &results, gradient, sums)?;
            }
        }
        passes.ready()?.run(&ctx, op)?;
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
        passes: &mut Passes<'_>,
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
            passes.copy(from, Bind::from(&next), bytes);
            if let Some(done) = i.checked_sub(1).and_then(|i| pieces.get(i)) {
                let k = self.piece_input(call, done, "k", inputs.k)?;
                let v = self.piece_input(call, done, "v", inputs.v)?;
                let room = self.room(op, done, true)?;
                let lengths = Self::piece_lengths(passes, call, done);
                for heads in self.head_blocks(done) {
                    for ensemble in 0..self.geometry.ensembles {
                        let block = self.any_block(done, &lengths, heads.clone(), ensemble);
                        self.hashes(passes, &block, &k, false, &room)?;
                        self.chunk_sums(passes, &block, &v, &room)?;
                        self.any_scan(passes, &block, &next, 0, &room, false, false, false)?;
                    }
                }
            }
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
        let parts = (rows / heads).div_ceil(room.share);
        let params = PieceParams { share: room.share as u32, ..with(block.params, Some(x), None) };
        let binds = vec![x.bind.clone(), Bind::from(&room.du), block.lengths.clone(), Bind::from(&room.shares)];
        let grid = tiles(parts * heads * row_tiles(g.bits()) * column_tiles(g.head_dim));
        passes.dispatch(self.key(Kernel::HashParameters { queries }), params, grid, binds)?;
        self.add_shares(passes, &room.shares, parts, heads, 1, block.heads.start, block.ensemble, sums)
    }
}

/// Where a call's results go.
struct Results {
    dq: Option<Buffer>,
    dk: Option<Buffer>,
    dv: Option<Buffer>,
}
