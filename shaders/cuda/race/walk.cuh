// Parameters of the kernels that walk; the Rust twin is `Walk` in src/race/cuda/params.rs.
//
// A sequence is cut into spans of `span` tokens; one block walks through one span of one head, tile by tile. Pointers are
// those of the tensors' first elements, strides in elements.
#pragma once

struct Walk {
    const void *q;
    const void *k;
    const void *v;
    const void *grad_o;
    i64 q_batch, q_token, q_head;
    i64 k_batch, k_token, k_head;
    i64 v_batch, v_token, v_head;
    i64 g_batch, g_token, g_head;
    // Results, `[batch, token, head, channel]`.
    void *o;
    void *dq;
    void *dk;
    void *dv;
    // `[set, bits, head_dim]`, and elements from one kv head's set to the next's.
    const float *planes;
    i64 planes_stride;
    // β and the centring constant of each kv head.
    const float2 *heads;
    // Tokens of each sequence.
    const u32 *lengths;
    // `[sequence, kv head, span, S + 1, Dv + 1]`: sums over the keys of a span, then of all before it.
    float *matrices;
    // `[sequence, q head, span, S + 1, Dv + 1]`: what the queries of a span give to the gradient of those sums.
    float *of_queries;
    // `[sequence, kv head, span, S + 1, Dv + 1]`: the gradient of the sums after each span.
    float *after;
    // Of each query `[sequence, q head, token]`: 1 / D, and -G·o.
    float2 *readings;
    // `[block, bits, head_dim + 1]`: gradients of hyperplanes and, in the last column, β.
    float *shares;
    u32 batch, tokens, q_heads, kv_heads, span, spans;
};
