//! Pages between a GPU's memory and a saved sequence: pure arithmetic.

use crate::socket::executor::SequenceData;
use crate::socket::plan::Geometry;
use crate::socket::problem::SeqState;
use std::ops::Range;

/// Bytes of a page: keys, values, index.
pub(crate) type Image = [Vec<u8>; 3];

/// A sequence with room for everything that its pages hold.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn empty(g: &Geometry, state: SeqState) -> SequenceData {
    let (heads, size) = (g.num_kv_heads, g.dtype.size());
    let scalars = |on: bool| if on { state.indexed * heads } else { 0 };
    SequenceData {
        state,
        k: vec![0; state.len * heads * g.head_dim * size],
        v: vec![0; state.len * heads * g.value_dim * size],
        bits: vec![0; state.indexed * heads * g.words],
        gain: vec![0.0; scalars(g.gain)],
        bias: vec![0.0; scalars(g.bias)],
        mean: Vec::new(),
    }
}

/// Rows of `row_bytes` out of `padded` bytes each, `[kv head, token]` in a page, `[token, kv head]` saved.
fn rows(
    g: &Geometry,
    saved: usize,
    padded: usize,
    row_bytes: usize,
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let (heads, page) = (g.num_kv_heads, g.page);
    (0..saved / row_bytes).map(move |i| {
        let (token, head) = (i / heads, i % heads);
        let at = (head * page + token) * padded;
        (at..at + row_bytes, i * row_bytes..(i + 1) * row_bytes)
    })
}

/// Calls `each` with the place of an index word in its page's image, in bytes, for each word of each key: then the key's
/// number in the sequence and the word's.
fn words(g: &Geometry, state: SeqState, tokens: &Range<usize>, mut each: impl FnMut(usize, usize, usize)) {
    for token in tokens.start..tokens.end.min(state.indexed).max(tokens.start) {
        for head in 0..g.num_kv_heads {
            for word in 0..g.index_words() {
                let at = ((head * g.index_words() + word) * g.page + token - tokens.start) * 4;
                each(at, token * g.num_kv_heads + head, word);
            }
        }
    }
}

fn tokens_of(g: &Geometry, state: SeqState, logical: usize) -> Range<usize> {
    let first = logical * g.page;
    first..state.len.min(first + g.page)
}

/// Takes a page, the sequence's `logical`-th, into `data`.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn unpack(g: &Geometry, image: &Image, logical: usize, data: &mut SequenceData) {
    let tokens = tokens_of(g, data.state, logical);
    let [k, v, index] = image;
    let size = g.dtype.size();
    let parts = [(k, &mut data.k, g.k_pieces(), g.head_dim), (v, &mut data.v, g.v_pieces(), g.value_dim)];
    for (from, to, pieces, dim) in parts {
        let row = g.num_kv_heads * dim * size;
        let saved = &mut to[tokens.start * row..tokens.end * row];
        for (stored, at) in rows(g, saved.len(), pieces * 16, dim * size) {
            saved[at].copy_from_slice(&from[stored]);
        }
    }
    words(g, data.state, &tokens, |at, key, word| {
        let value = u32::from_le_bytes([index[at], index[at + 1], index[at + 2], index[at + 3]]);
        if word < g.words {
            data.bits[key * g.words + word] = value;
        } else if word == g.words {
            data.gain[key] = f32::from_bits(value);
        } else {
            data.bias[key] = f32::from_bits(value);
        }
    });
}

/// The `logical`-th page of a sequence.
pub(crate) fn pack(g: &Geometry, data: &SequenceData, logical: usize) -> Image {
    let tokens = tokens_of(g, data.state, logical);
    let mut image = g.page_bytes().map(|bytes| vec![0u8; bytes as usize]);
    let size = g.dtype.size();
    let parts = [(0, &data.k, g.k_pieces(), g.head_dim), (1, &data.v, g.v_pieces(), g.value_dim)];
    for (part, from, pieces, dim) in parts {
        let row = g.num_kv_heads * dim * size;
        let saved = &from[tokens.start * row..tokens.end * row];
        for (stored, at) in rows(g, saved.len(), pieces * 16, dim * size) {
            image[part][stored].copy_from_slice(&saved[at]);
        }
    }
    words(g, data.state, &tokens, |at, key, word| {
        let value = if word < g.words {
            data.bits[key * g.words + word]
        } else if word == g.words {
            data.gain[key].to_bits()
        } else {
            data.bias[key].to_bits()
        };
        image[2][at..at + 4].copy_from_slice(&value.to_le_bytes());
    });
    image
}

/// A sequence's words of the state: means, and the largest gain per kv head.
pub(crate) fn slot(g: &Geometry, data: &SequenceData) -> Vec<u32> {
    let mut state = vec![0u32; g.slot_words()];
    for (word, mean) in state.iter_mut().zip(&data.mean) {
        *word = mean.to_bits();
    }
    for head in 0..g.num_kv_heads {
        let gains = data.gain.iter().skip(head).step_by(g.num_kv_heads);
        state[g.num_kv_heads * g.head_dim + head] = gains.fold(0f32, |a, &b| a.max(b)).to_bits();
    }
    state
}
