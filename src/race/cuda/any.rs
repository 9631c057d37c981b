//! Passes for any shape: a call is cut into pieces ([`crate::race::plan::Piece`]), each worked on block by block of kv
//! heads and ensemble by ensemble. Sums and scans are those of [`crate::race::cuda::walk`], with chunks of 64 tokens in
//! the place of spans; what a chunk takes is products of tiles of 64 tokens, on the tensor cores at the precision of f32
//! (shaders/cuda/race/any/product.cuh).

use super::CudaRace;
use super::kernels::Kernel;
use super::params::{Groups, PieceParams, Scan};
use super::state::CudaState;
use crate::engine::cuda::{Bind, Buffer, Grid, Input, Passes, bytes_of, stage};
use crate::error::{Error, Result};
use crate::race::executor::{Call, Inputs, needed};
use crate::race::plan::{Budget, CHUNK, Geometry, Piece, pieces};
use crate::tensor::{Tensor, TensorView};
use std::ops::Range;

/// Bytes of the scratch memory that grows with a piece's tokens, and of the matrices of its chunks.
const SCRATCH: usize = 256 << 20;
/// No binding has a limit here.
const NO_LIMIT: u64 = 1 << 50;
/// Chunks of a group of the scan: twin of shaders/cuda/race/any/groups.cuh.
const GROUP_CHUNKS: usize = 16;
/// Chunks of a share of the parameters' gradients at least, and bytes of all shares of a piece.
const SHARE_CHUNKS: usize = 4;
const SHARES: usize = 32 << 20;
/// Columns of a tile at most, and rows of one of buckets or bits.
const MOST_COLUMNS: usize = 64;
const MOST_ROWS: usize = 80;
/// Flags of kernels: add to what is there; write the result.
pub(super) const ADD: u32 = 1;
const WRITE: u32 = 2;

/// Scratch memory of a piece, by name; all hold floats.
pub(super) struct Room {
    pub t_q: Buffer,
    pub t_k: Buffer,
    pub alpha_q: Buffer,
    pub alpha_k: Buffer,
    pub matrices: Buffer,
    pub products: Buffer,
    pub gains: Buffer,
    pub values: Buffer,
    pub masses: Buffer,
    pub statistics: Buffer,
    pub w: Buffer,
    pub du: Buffer,
    pub shares: Buffer,
    pub sums: Buffer,
    /// Of the chunks of each group, then of all before it.
    totals: Buffer,
    /// Chunks of a share, and all shares.
    pub share: usize,
    pub parts: usize,
}

/// One block of a piece's kv heads in one ensemble.
pub(super) struct Block<'a> {
    pub piece: &'a Piece,
    pub heads: Range<usize>,
    pub ensemble: usize,
    pub lengths: Bind,
    pub planes: Bind,
    pub params: PieceParams,
}

impl Block<'_> {
    pub fn units(&self) -> usize {
        self.piece.sequences.len() * self.heads.len()
    }

    /// Chunks of all units.
    pub fn chunks(&self) -> usize {
        self.units() * self.piece.chunks()
    }

    /// (token, kv head) pairs.
    pub fn rows(&self) -> usize {
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
pub(super) fn grid(elements: usize) -> Grid {
    Grid::new(elements.div_ceil(256) as u64, 256)
}

/// One block a tile.
pub(super) fn tiles(count: usize) -> Grid {
    Grid::new(count as u64, 256)
}

/// Tiles of `n` columns, and of rows that are buckets or bits: twins of shaders/cuda/race/any/product.cuh.
pub(super) fn column_tiles(n: usize) -> usize {
    n.div_ceil(MOST_COLUMNS)
}

pub(super) fn row_tiles(n: usize) -> usize {
    n.div_ceil(MOST_ROWS)
}

/// Tiles of the matrix of a chunk.
pub(super) fn matrix_tiles(g: &Geometry) -> usize {
    row_tiles(g.buckets() + 1) * column_tiles(g.value_dim)
}

pub(super) fn with(params: PieceParams, x: Option<&Input>, y: Option<&Input>) -> PieceParams {
    let strides = |input: Option<&Input>| input.map(|input| input.strides).unwrap_or_default();
    PieceParams { x: strides(x), y: strides(y), ..params }
}

/// What the pieces of a call change: where there are several it is a copy until all have run, so that a call which fails
/// half way changes nothing.
pub(super) struct Working {
    pub buffer: Buffer,
    copied: bool,
}

impl Working {
    pub fn new(op: &'static str, original: &Buffer, pieces: &[Piece]) -> Result<Self> {
        let (ctx, bytes) = (original.context(), original.size());
        if pieces.len() <= 1 {
            return Ok(Self { buffer: original.clone(), copied: false });
        }
        let buffer = ctx.uninit(op, bytes)?;
        ctx.copy(op, (original, 0), (&buffer, 0), bytes)?;
        Ok(Self { buffer, copied: true })
    }

    pub fn finish(self, op: &'static str, original: &Buffer) -> Result<()> {
        if !self.copied {
            return Ok(());
        }
        original.context().copy(op, (&self.buffer, 0), (original, 0), original.size())
    }
}

impl CudaRace {
    /// Pieces that have work.
    pub(super) fn any_pieces(&self, call: &Call) -> Result<Vec<Piece>> {
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

    pub(super) fn head_blocks(&self, piece: &Piece) -> Vec<Range<usize>> {
        let heads = self.geometry.num_kv_heads;
        (0..heads).step_by(piece.heads).map(|start| start..(start + piece.heads).min(heads)).collect()
    }

    pub(super) fn room(&mut self, op: &'static str, piece: &Piece, backward: bool) -> Result<Room> {
        let (g, ctx) = (self.geometry, self.ctx.clone());
        let units = piece.sequences.len() * piece.heads;
        let keys = units * piece.tokens.len();
        let queries = keys * g.group;
        let w = &mut self.workspace;
        let one = piece.heads * g.bits() * (g.head_dim + 1) * 4;
        let most = (SHARES / one / piece.sequences.len()).max(1);
        let share = piece.chunks().div_ceil(most).max(SHARE_CHUNKS);
        let parts = piece.sequences.len() * piece.chunks().div_ceil(share);
        let groups = piece.chunks().div_ceil(GROUP_CHUNKS);
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
            shares: w.shares.get(&ctx, op, of_backward(parts * one) as u64)?,
            matrices: w.matrices.get(&ctx, op, (units * piece.chunks() * g.matrix() * 4) as u64)?,
            t_q,
            t_k,
            alpha_q,
            alpha_k,
            products,
            statistics,
            sums,
            totals: get(12, units * groups * g.matrix())?,
            share,
            parts,
        })
    }

    pub(super) fn any_block<'a>(
        &self,
        piece: &'a Piece,
        lengths: &Bind,
        heads: Range<usize>,
        ensemble: usize,
    ) -> Block<'a> {
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
    pub(super) fn piece_lengths(passes: &mut Passes<'_>, call: &Call, piece: &Piece) -> Bind {
        let in_piece = |b: usize| call.lengths[b].saturating_sub(piece.tokens.start).min(piece.tokens.len()) as u32;
        let lengths: Vec<u32> = piece.sequences.clone().map(in_piece).collect();
        passes.part(&lengths)
    }

    pub(super) fn piece_input(
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
    pub(super) fn rows_of(
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
    pub(super) fn hashes(
        &self,
        passes: &mut Passes<'_>,
        block: &Block<'_>,
        x: &Input,
        queries: bool,
        room: &Room,
    ) -> Result<()> {
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
    pub(super) fn chunk_sums(&self, passes: &mut Passes<'_>, block: &Block<'_>, v: &Input, room: &Room) -> Result<()> {
        let grid = tiles(block.chunks() * matrix_tiles(&self.geometry));
        let binds = vec![v.bind.clone(), Bind::from(&room.alpha_k), block.lengths.clone(), Bind::from(&room.matrices)];
        passes.dispatch(self.key(Kernel::ChunkSums), with(block.params, Some(v), None), grid, binds)
    }

    /// From sums of chunks to those before (reverse: after) each, `state` included, which moves on but with `keep`. The
    /// state's first sequence is `first`. With `alone` the state itself becomes each unit's one matrix.
    #[allow(clippy::too_many_arguments, reason = "one launch's arguments, all different")]
    pub(super) fn any_scan(
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
        let chunks = if alone { 1 } else { block.piece.chunks() };
        let groups = chunks.div_ceil(GROUP_CHUNKS);
        let spans = if groups > 1 { groups } else { chunks } as u32;
        let scan = Scan {
            state_batch: (g.units() * g.state_unit()) as u64,
            state_head: (g.ensembles * g.state_unit()) as u64,
            spans,
            slots: spans,
            group: 1,
            heads: block.heads.len() as u32,
            keep: u32::from(keep || alone),
            reserved: 0,
        };
        let at = (first * g.units() + block.heads.start * g.ensembles + block.ensemble) * g.state_unit() * 8;
        let (units, head, state) = (block.units(), block.heads.start, Bind::at(state, at as u64));
        if groups == 1 {
            return self.scan(passes, scan, units as u64, [&room.matrices, &room.matrices], head, state, reverse);
        }
        let of_groups = grid(units * groups * g.matrix());
        let (units, chunks) = (units as u32, chunks as u32);
        let params = Groups { units, chunks, groups: groups as u32, reserved: 0 };
        let binds = vec![Bind::from(&room.matrices), Bind::from(&room.totals)];
        passes.dispatch(self.key(Kernel::GroupTotals), params, of_groups, binds)?;
        self.scan(passes, scan, units.into(), [&room.totals, &room.totals], head, state, reverse)?;
        let binds = vec![Bind::from(&room.totals), Bind::from(&room.matrices)];
        passes.dispatch(self.key(Kernel::GroupPrefix { reverse }), params, of_groups, binds)
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
        let pieces = self.any_pieces(call)?;
        let working = Working::new(op, &state.buffer, &pieces)?;
        for piece in &pieces {
            // Each runs on its own, so that its inputs make room for the next one's.
            let mut passes = Passes::new(&ctx, op);
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
                    self.any_scan(&mut passes, &block, &working.buffer, first, &room, false, false, alone)?;
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
            passes.ready()?.run(&ctx, op)?;
        }
        working.finish(op, &state.buffer)?;
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
}
