// Copies appended keys and values into their pages, bits kept; NaN and infinities become zero and are counted. One
// thread per 16-byte piece of a row of k or v.
#include "params.cuh"

#define THREADS 256
#define PIECES (K_PIECES + V_PIECES)
typedef Element<KV_DTYPE>::stored Stored;

union Piece {
    uint4 words;
    Stored elements[PIECE];
};

template <int DIM> __device__ __forceinline__ Piece load_piece(const Stored* row, u32 piece, u32& bad) {
    Piece out;
    const Stored* from = row + piece * PIECE;
    if (DIM % PIECE == 0 && ((u64)from & 15u) == 0) {
        out.words = *(const uint4*)from;
    } else {
#pragma unroll
        for (u32 i = 0; i < PIECE; i++) out.elements[i] = piece * PIECE + i < DIM ? from[i] : (Stored)0;
    }
#pragma unroll
    for (u32 i = 0; i < PIECE; i++)
        if (!is_finite<KV_DTYPE>(out.elements[i])) {
            out.elements[i] = 0;
            bad++;
        }
    return out;
}

extern "C" __global__ void __launch_bounds__(THREADS) store_kv(ARGUMENTS) {
    CALL;
    Item item = p.items[blockIdx.z];
    u64 index = (u64)blockIdx.x * THREADS + threadIdx.x;
    u32 piece = index % PIECES, head = index / PIECES % KV_HEADS;
    u32 token = index / (PIECES * KV_HEADS);
    wait_for_earlier();
    if (token >= item.count) return;
    u32 position = item.start + token;
    u64 page = page_of(p, item.sequence, position);
    u32 bad = 0;
    if (piece < K_PIECES) {
        const Stored* from = (const Stored*)p.k + item.batch_row * p.k_strides.batch + token * p.k_strides.token + head * p.k_strides.head;
        *(uint4*)(key_row(page, head, position) + piece * 16) = load_piece<HEAD_DIM>(from, piece, bad).words;
    } else {
        const Stored* from = (const Stored*)p.v + item.batch_row * p.v_strides.batch + token * p.v_strides.token + head * p.v_strides.head;
        *(uint4*)(value_row(page, head, position) + (piece - K_PIECES) * 16) = load_piece<VALUE_DIM>(from, piece - K_PIECES, bad).words;
    }
    if (bad > 0) atomicAdd(p.non_finite, bad);
}
