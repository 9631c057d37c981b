// Parameters of the kernels that walk; the Rust twin is `Walk` in src/race/cuda/params.rs.
//
// A sequence is cut into spans of `span` tokens; one block walks through one span of one head, tile by tile. Strides are
// in elements. Their arrays:
//
// | | |
// |---|---|
// | planes | `[set, bits, head_dim]` |
// | heads | β and the centring constant of each kv head |
// | lengths | tokens of each sequence |
// | matrices | `[sequence, kv head, span, S + 1, Dv + 1]`: sums over the keys of a span, then of all before it |
// | of_queries | `[sequence, q head, span, S + 1, Dv + 1]`: what the queries of a span give to the gradient of those sums |
// | after | as matrices: the gradient of the sums after each span |
// | bits | `[sequence, head, token, bits]`, with room for whole spans: t of keys or queries; after them `[sequence, head, span]`, whether k or v (of queries: the gradient of o) have NaN or infinities there, which read as zero |
// | readings | `[sequence, q head, token]`: 1 / D, and −G·o |
// | shares | `[block, bits, head_dim + 1]`: gradients of hyperplanes and, in the last column, β |
// | o, dq, dk, dv | `[sequence, token, head, channel]` |
#pragma once

struct Walk {
    i64 q_batch, q_token, q_head;
    i64 k_batch, k_token, k_head;
    i64 v_batch, v_token, v_head;
    i64 g_batch, g_token, g_head;
    // Elements from one kv head's hyperplanes to the next's.
    i64 planes_stride;
    u32 batch, tokens, q_heads, kv_heads, span, spans;
};

// Where t of a head's tokens from `first` on begins.
__device__ __forceinline__ i64 bits_at(const Walk &p, int b, u32 heads, int head, int first) {
    return (((i64)b * heads + head) * ((i64)p.spans * p.span) + first) * BITS;
}
// Whether a span's inputs are to be cleaned.
__device__ __forceinline__ i64 marks_at(const Walk &p, int b, u32 heads, int head, int span) {
    return (i64)p.batch * heads * p.spans * p.span * BITS + ((i64)b * heads + head) * p.spans + span;
}

// What a block walks through: the span of a sequence and head, its first token, how many the sequence has in it, and how
// many the tensors.
struct Span {
    int b, head, index, first, count, rows;
};
// Of kernels with a block for each of `heads` heads of a span.
__device__ __forceinline__ Span span_of(const Walk &p, u32 heads, const u32 *lengths) {
    Span s;
    s.head = blockIdx.x % heads;
    s.index = blockIdx.x / heads % p.spans;
    s.b = blockIdx.x / (heads * p.spans);
    s.first = s.index * p.span;
    s.count = (int)lengths[s.b] - s.first;
    s.count = s.count < 0 ? 0 : s.count > (int)p.span ? (int)p.span : s.count;
    s.rows = (int)p.tokens - s.first < (int)p.span ? (int)p.tokens - s.first : (int)p.span;
    return s;
}
__device__ __forceinline__ i64 matrix_at(const Walk &p, int b, u32 heads, int head, int span) { return ((i64)(b * heads + head) * p.spans + span) * MATRIX; }
