//! Shared memory of the kernels that walk: the sums of shaders/cuda/race/hash.cuh and of the kernels in Rust.

use crate::race::plan::Geometry;

/// Rows of a tile.
const ROWS: usize = 64;

/// Bytes of what the kernels keep of a tile.
struct Parts {
    keys: usize,
    values: usize,
    planes: usize,
    weights: usize,
    entry: usize,
    corners: usize,
    hash_gradient: usize,
    odds: usize,
    buckets_up: usize,
    bits_up: usize,
}

fn parts(g: &Geometry, terms: usize) -> Parts {
    let buckets_up = [16, 32].into_iter().find(|&n| g.buckets() <= n).unwrap_or(64);
    let bits_up = g.bits().next_multiple_of(16);
    let plane_terms = terms.max(2);
    Parts {
        keys: ROWS * (g.head_dim + 8) * 2,
        values: ROWS * (g.value_dim + 8) * 2,
        planes: (g.head_dim + 8) * bits_up * plane_terms * 2,
        weights: (buckets_up + 8) * ROWS * terms * 2,
        entry: (g.value_dim + 8) * buckets_up * terms * 2,
        corners: (buckets_up + 8) * bits_up * 2 * 2,
        hash_gradient: (bits_up + 8) * ROWS * plane_terms * 2,
        odds: ROWS * g.bits() * 8,
        buckets_up,
        bits_up,
    }
}

/// Of the kernel that sums keys.
pub(super) fn sums(g: &Geometry, terms: usize) -> usize {
    let p = parts(g, terms);
    2 * p.keys + 2 * p.values + p.planes + p.weights + p.odds + 1024
}

/// Of the forward kernel.
pub(super) fn forward(g: &Geometry, terms: usize) -> usize {
    let p = parts(g, terms);
    let tiles = 2 * p.keys + 2 * p.values + p.planes + 2 * p.weights + p.entry + 2 * p.odds;
    tiles + p.buckets_up * 4 + g.value_dim * 4 + ROWS * 4 + 1536
}

/// Blocks of the forward kernel that a multiprocessor with 228 KB takes.
pub(super) fn forward_blocks(g: &Geometry, terms: usize) -> usize {
    if forward(g, terms) <= 113 << 10 { 2 } else { 1 }
}

/// Of both backward kernels.
pub(super) fn backward(g: &Geometry, terms: usize) -> usize {
    let p = parts(g, terms);
    let tiles =
        3 * p.keys + 4 * p.values + p.planes + 2 * p.weights + p.entry + p.corners + p.hash_gradient + 2 * p.odds;
    tiles + p.buckets_up * 4 + g.value_dim * 4 + 3 * ROWS * 4 + 4 * p.bits_up * 4 + 2560
}
