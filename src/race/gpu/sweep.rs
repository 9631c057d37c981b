//! The dispatches that forward and backward passes share.

use super::GpuRace;
use super::kernels::Kernel;
use super::params::Params;
use crate::engine::gpu::{Bind, Input, Passes};
use crate::error::Result;
use crate::race::plan::Piece;
use std::ops::Range;

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
    /// (sequence, kv head) pairs.
    pub fn units(&self) -> usize {
        self.sequences.len() * self.heads.len()
    }

    /// (sequence, token, kv head) triples, padding included.
    pub fn rows(&self) -> usize {
        self.units() * self.params.tokens as usize
    }
}

impl GpuRace {
    /// The info of a piece: tokens of each sequence in it, β and the centring constants.
    pub(super) fn info(&self, passes: &mut Passes<'_>, piece: &Piece, lengths: &[usize]) -> Bind {
        let in_piece = |b: usize| lengths[b].saturating_sub(piece.tokens.start).min(piece.tokens.len()) as u32;
        let mut words: Vec<u32> = piece.sequences.clone().map(in_piece).collect();
        words.extend(self.heads.iter().flatten().map(|x| x.to_bits()));
        passes.part(&words)
    }

    /// The blocks of a piece in one ensemble. Rows of keys stand first in the buffer of hashes, then those of queries.
    pub(super) fn blocks(&self, piece: &Piece, info: &Bind, ensemble: usize) -> Vec<Block> {
        let g = &self.geometry;
        let of = |heads: Range<usize>| {
            let rows = piece.sequences.len() * piece.tokens.len() * heads.len();
            let params = Params {
                batch: piece.sequences.len() as u32,
                tokens: piece.tokens.len() as u32,
                head: heads.start as u32,
                heads: heads.len() as u32,
                chunks: piece.chunks() as u32,
                slots: piece.chunks() as u32,
                planes_at: (ensemble * g.bits() * g.head_dim) as u32,
                planes_stride: self.planes_stride,
                k_at: 0,
                q_at: (rows * g.bits()) as u32,
                ..Params::default()
            };
            Block {
                info: info.clone(),
                params,
                sequences: piece.sequences.clone(),
                heads,
                ensemble,
                chunks: piece.chunks(),
            }
        };
        let starts = (0..g.num_kv_heads).step_by(piece.heads);
        starts.map(|start| of(start..(start + piece.heads).min(g.num_kv_heads))).collect()
    }

    /// Bytes of the hashes and matrices of a piece's largest block.
    pub(super) fn scratch_bytes(&self, piece: &Piece) -> (u64, u64) {
        let g = &self.geometry;
        let units = (piece.sequences.len() * piece.heads) as u64;
        let hashes = units * (piece.tokens.len() * (g.group + 1) * g.bits() * 4) as u64;
        (hashes, units * (piece.chunks().max(1) * g.matrix() * 4) as u64)
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
        let groups = rows.div_ceil(64) * block.heads.len() * g.bits().div_ceil(64);
        let binds = vec![block.info.clone(), x.bind.clone(), Bind::from(&self.planes), Bind::from(hashes)];
        passes.dispatch(self.key(Kernel::Project { per_head }), params, groups as u64, binds)
    }
}
