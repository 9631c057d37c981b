//! The dispatches that forward and backward passes share.

use super::GpuRace;
use super::kernels::Kernel;
use super::params::Params;
use super::state::GpuState;
use crate::engine::gpu::{Bind, Input, Passes};
use crate::error::Result;
use crate::race::plan::{Piece, RUN, SCAN_WIDTH, SEGMENT};
use std::ops::Range;

/// Flag of shaders/race/chunk_sums.wgsl.
const NO_PARTS: u32 = 1;
/// Flags of shaders/race/scan.wgsl.
const WRITE_TOTAL: u32 = 1;
pub(super) const KEEP_STATE: u32 = 2;

/// One block of a piece's kv heads in one ensemble.
#[derive(Clone)]
pub(super) struct Block {
    /// See shaders/race/params.wgsl.
    pub info: Bind,
    /// What all its dispatches have in common.
    pub params: Params,
    pub sequences: Range<usize>,
    pub heads: Range<usize>,
    pub ensemble: usize,
    pub chunks: usize,
}

impl Block {
    pub fn runs(&self) -> usize {
        self.chunks.div_ceil(RUN)
    }

    /// The parameters of kernels to which runs are what chunks are to others.
    fn of_runs(&self) -> Params {
        Params { chunks: self.params.slots, ..self.params }
    }

    /// (sequence, kv head) pairs.
    pub fn units(&self) -> usize {
        self.sequences.len() * self.heads.len()
    }
}

/// The matrices of a piece's runs and then of its chunks, and the sums that their scan makes on the way.
#[derive(Clone)]
pub(super) struct Matrices {
    pub sums: wgpu::Buffer,
    segments: wgpu::Buffer,
}

impl GpuRace {
    /// The info of a piece: tokens of each sequence in it, β and the centring constants.
    pub(super) fn info(&self, passes: &mut Passes<'_>, piece: &Piece, lengths: &[usize]) -> Bind {
        let in_piece = |b: usize| lengths[b].saturating_sub(piece.tokens.start).min(piece.tokens.len()) as u32;
        let mut words: Vec<u32> = piece.sequences.clone().map(in_piece).collect();
        words.extend(self.heads.iter().flatten().map(|x| x.to_bits()));
        passes.part(&words)
    }

    /// Blocks of kv heads that a piece is worked on in.
    pub(super) fn head_blocks(&self, piece: &Piece) -> Vec<Range<usize>> {
        let heads = self.geometry.num_kv_heads;
        (0..heads).step_by(piece.heads).map(|start| start..(start + piece.heads).min(heads)).collect()
    }

    /// A block of a piece. Rows of keys stand first in the buffer of hashes, then those of queries.
    pub(super) fn block(&self, piece: &Piece, info: &Bind, heads: Range<usize>, ensemble: usize) -> Block {
        let g = &self.geometry;
        let rows = piece.sequences.len() * piece.tokens.len() * heads.len();
        let params = Params {
            batch: piece.sequences.len() as u32,
            tokens: piece.tokens.len() as u32,
            head: heads.start as u32,
            heads: heads.len() as u32,
            chunks: piece.chunks() as u32,
            slots: piece.runs() as u32,
            parts_at: (piece.sequences.len() * heads.len() * piece.runs() * g.matrix()) as u32,
            planes_at: (ensemble * g.bits() * g.head_dim) as u32,
            planes_stride: self.planes_stride,
            k_at: 0,
            q_at: (rows * g.bits()) as u32,
            ..Params::default()
        };
        let (sequences, chunks) = (piece.sequences.clone(), piece.chunks());
        Block { info: info.clone(), params, sequences, heads, ensemble, chunks }
    }

    /// The buffers of hashes and of matrices, large enough for a piece's largest block.
    pub(super) fn scratch(&mut self, op: &'static str, piece: &Piece) -> Result<(wgpu::Buffer, Matrices)> {
        let g = &self.geometry;
        let units = (piece.sequences.len() * piece.heads) as u64;
        let hashes = units * (piece.tokens.len() * (g.group + 1) * g.bits() * 4) as u64;
        let sums = units * ((piece.runs() + piece.chunks()) * g.matrix() * 4) as u64;
        let segments = units * (piece.runs().div_ceil(SEGMENT) * g.matrix() * 8) as u64;
        let w = &mut self.workspace;
        let matrices = Matrices {
            sums: w.matrices.get(&self.ctx, op, "bytes of chunk sums", sums)?,
            segments: w.segments.get(&self.ctx, op, "bytes of segment sums", segments)?,
        };
        Ok((self.workspace.hashes.get(&self.ctx, op, "bytes of hashes", hashes)?, matrices))
    }

    /// t of keys (`per_head` = 1, from `Params::k_at` on), or of queries (`per_head` = the group, from `Params::q_at`).
    pub(super) fn project(
        &self,
        passes: &mut Passes<'_>,
        block: &Block,
        x: &Input,
        queries: bool,
        hashes: &wgpu::Buffer,
    ) -> Result<()> {
        let g = &self.geometry;
        let (per_head, out_at) = if queries { (g.group, block.params.q_at) } else { (1, block.params.k_at) };
        let params = Params { input: x.strides, out_at, ..block.params };
        let rows = block.sequences.len() * block.params.tokens as usize * per_head;
        let groups = rows.div_ceil(64) * block.heads.len() * g.bits().div_ceil(4 * g.plane_fours());
        let wide = x.strides.in_fours() && g.head_dim.is_multiple_of(4);
        let binds = vec![block.info.clone(), x.bind.clone(), Bind::from(&self.planes), Bind::from(hashes)];
        passes.dispatch(self.key(Kernel::Project { per_head, wide }), params, groups as u64, binds)
    }

    /// The matrices of the block's runs, and with `parts` of their chunks.
    pub(super) fn chunk_sums(
        &self,
        passes: &mut Passes<'_>,
        block: &Block,
        v: &Input,
        hashes: &wgpu::Buffer,
        matrices: &Matrices,
        parts: bool,
    ) -> Result<()> {
        let g = &self.geometry;
        let flags = if parts { 0 } else { NO_PARTS };
        let params = Params { input: v.strides, flags, ..block.params };
        let groups = block.units() * block.runs() * g.bucket_tiles() * g.channel_blocks();
        let binds = vec![block.info.clone(), v.bind.clone(), Bind::from(hashes), Bind::from(&matrices.sums)];
        let wide = v.strides.in_fours() && g.value_dim.is_multiple_of(4);
        passes.dispatch(self.key(Kernel::ChunkSums { wide }), params, groups as u64, binds)
    }

    /// Moves the state on to the block's end, or with `reverse` its gradient back to the block's beginning, by the
    /// matrices of its runs.
    pub(super) fn advance(
        &self,
        passes: &mut Passes<'_>,
        block: &Block,
        state: &GpuState,
        matrices: &Matrices,
        reverse: bool,
    ) -> Result<()> {
        self.scan_chunks(passes, block, Kernel::ScanParts { reverse }, matrices)?;
        self.scan_segments(passes, block, block.of_runs(), state, matrices, reverse)
    }

    /// As [`GpuRace::advance`]; and the matrices of runs become the sums before them, the state included, or with
    /// `reverse` those after them. With `flags` of [`KEEP_STATE`] the state stays.
    pub(super) fn scan(
        &self,
        passes: &mut Passes<'_>,
        block: &Block,
        flags: u32,
        state: &GpuState,
        matrices: &Matrices,
        reverse: bool,
    ) -> Result<()> {
        self.scan_chunks(passes, block, Kernel::ScanParts { reverse }, matrices)?;
        self.scan_segments(passes, block, Params { flags, ..block.of_runs() }, state, matrices, reverse)?;
        self.scan_chunks(passes, block, Kernel::ScanSpread { reverse }, matrices)
    }

    /// The kernels of the scan that go through all matrices.
    fn scan_chunks(&self, passes: &mut Passes<'_>, block: &Block, kernel: Kernel, matrices: &Matrices) -> Result<()> {
        let groups = block.units() * block.runs().div_ceil(SEGMENT) * self.geometry.matrix().div_ceil(256);
        let binds = vec![block.info.clone(), Bind::from(&matrices.sums), Bind::from(&matrices.segments)];
        passes.dispatch(self.key(kernel), block.of_runs(), groups as u64, binds)
    }

    /// The state itself, or with `reverse` a gradient, as one matrix for each unit. The block returned has it in the place
    /// of its matrices.
    pub(super) fn read_state(
        &self,
        passes: &mut Passes<'_>,
        block: &Block,
        state: &GpuState,
        matrices: &Matrices,
        reverse: bool,
    ) -> Result<Block> {
        let params = Params { slots: 1, parts_at: 0, ..block.params };
        let scan = Params { chunks: 0, flags: WRITE_TOTAL | KEEP_STATE, ..params };
        self.scan_segments(passes, block, scan, state, matrices, reverse)?;
        Ok(Block { params, ..block.clone() })
    }

    fn scan_segments(
        &self,
        passes: &mut Passes<'_>,
        block: &Block,
        params: Params,
        state: &GpuState,
        matrices: &Matrices,
        reverse: bool,
    ) -> Result<()> {
        let g = &self.geometry;
        let (bind, first) = self.bind_state(state, &block.sequences);
        let params = Params { state_at: first + (block.ensemble * g.state_unit()) as u32, ..params };
        let groups = block.units() * g.columns().div_ceil(SCAN_WIDTH);
        let binds = vec![block.info.clone(), bind, Bind::from(&matrices.sums), Bind::from(&matrices.segments)];
        passes.dispatch(self.key(Kernel::Scan { reverse }), params, groups as u64, binds)
    }
}
