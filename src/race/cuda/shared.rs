//! Shared memory of the kernels that walk: the sums of shaders/cuda/race/hash.cuh and of the kernels in Rust.

use crate::race::plan::Geometry;
use crate::tensor::DType;

/// Rows of a tile.
const ROWS: usize = 64;

/// Bytes of what the kernels keep of a tile.
struct Parts {
    keys: usize,
    values: usize,
    planes: usize,
    weights: usize,
    fine_weights: usize,
    entry: usize,
    corners: usize,
    hash_gradient: usize,
    bits: usize,
    buckets_up: usize,
    bits_up: usize,
}

fn parts(g: &Geometry, terms: usize) -> Parts {
    let buckets_up = [16, 32].into_iter().find(|&n| g.buckets() <= n).unwrap_or(64);
    let bits_up = g.bits().next_multiple_of(16);
    let plane_terms = terms.max(2);
    // Of f32 a tile keeps the numbers whole, of 16 bits each part; rows are apart so that no bank is met twice.
    let whole = g.dtype == DType::F32;
    let row = |width: usize| if whole { width.next_multiple_of(32) * 4 } else { (width + 8) * 2 };
    let computed = |width: usize, rows: usize, terms: usize| row(width) * rows * if whole { 1 } else { terms };
    Parts {
        keys: ROWS * row(g.head_dim),
        values: ROWS * row(g.value_dim),
        planes: computed(g.head_dim, bits_up, plane_terms),
        weights: computed(buckets_up, ROWS, terms),
        fine_weights: computed(buckets_up, ROWS, plane_terms),
        entry: computed(g.value_dim, buckets_up, terms),
        corners: computed(buckets_up, bits_up * 2, 1),
        hash_gradient: computed(bits_up, ROWS, plane_terms),
        bits: ROWS * g.bits() * 4,
        buckets_up,
        bits_up,
    }
}

/// Of the kernel that sums keys.
pub(super) fn sums(g: &Geometry, terms: usize) -> usize {
    let p = parts(g, terms);
    let stages = if g.dtype == DType::F32 { 1 } else { 2 };
    stages * (p.keys + p.values) + p.planes + p.weights + p.bits + 1024
}

/// How a kernel is laid out on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Fit {
    /// Blocks of a multiprocessor.
    pub blocks: usize,
    /// Tiles of an input that a block keeps at a time; of q, which the backward pass reads last.
    pub stages: usize,
    pub late_stages: usize,
    /// Shared memory of a block.
    pub bytes: usize,
}

/// Two blocks where they have room, then two tiles of each input, or of q alone. `most` is what a block may have; a
/// multiprocessor has a kibibyte more, and keeps one for each block. Without `two` a thread needs more than half of its
/// registers.
fn fit(most: usize, two: bool, bytes: impl Fn(usize, usize) -> usize) -> Option<Fit> {
    let half = if two { (most + 1024) / 2 - 1024 } else { 0 };
    let stages = [(2, 2), (1, 2), (1, 1)];
    let choices = [(2, half), (1, most)].into_iter().flat_map(|of| stages.map(|stages| (of, stages)));
    let mut fits = choices.map(|((blocks, limit), (stages, late_stages))| {
        (Fit { blocks, stages, late_stages, bytes: bytes(stages, late_stages) }, limit)
    });
    fits.find(|(fit, limit)| fit.bytes <= *limit).map(|(fit, _)| fit)
}

/// Of the forward kernel.
pub(super) fn forward(g: &Geometry, terms: usize, most: usize) -> Option<Fit> {
    let p = parts(g, terms);
    fit(most, true, |stages, _| {
        let tiles = p.keys + stages * p.values + p.planes + 2 * p.weights + p.entry + p.bits;
        tiles + p.buckets_up * 4 + g.value_dim * 4 + ROWS * 4 + 1024
    })
}

/// Of both backward kernels: the larger.
pub(super) fn backward(g: &Geometry, terms: usize, most: usize) -> Option<Fit> {
    let p = parts(g, terms);
    fit(most, p.buckets_up * terms <= 32, |stages, late_stages| {
        let tiles = p.keys + 2 * stages * p.values + p.planes + p.weights + p.fine_weights + p.entry;
        let small = p.corners + p.hash_gradient + p.buckets_up * 4 + g.value_dim * 4 + 2 * ROWS * 4;
        let of_query = (late_stages - 1) * p.keys + p.bits;
        let of_key = 2 * p.bits + ROWS * g.tables * 8;
        tiles + small + 4 * p.bits_up * 4 + 512 + of_query.max(of_key)
    })
}
