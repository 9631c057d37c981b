// Tiles in shared memory and fragments of them in registers, for kernels of 256 threads that walk through a sequence in
// tiles of 64 tokens.
//
// What is computed is kept as a sum of TERMS bf16 parts, each the rounding of what the ones before it leave; a product
// takes the pairs of parts that count. Inputs of 16 bits are exact in one part (bf16) or two (f16).
#pragma once
#include "machine.cuh"

#ifndef THREADS
#define THREADS 256
#endif
#define ROWS 64
// Tiles kept of the input that the backward kernels read last, q or k.
#ifndef LATE_STAGES
#define LATE_STAGES STAGES
#endif
#ifdef TABLES
constexpr int BUCKETS_UP = BUCKETS <= 16 ? 16 : BUCKETS <= 32 ? 32 : BUCKETS <= 64 ? 64 : 128;
constexpr int BITS_UP = (BITS + 15) / 16 * 16;
constexpr int PLANE_TERMS = TERMS < 2 ? 2 : TERMS;
#endif

template <int T> struct Left { u32 r[T][4]; };
// Two neighbouring tiles of eight columns.
template <int T> struct Right { u32 r[T][2][2]; };

template <int A, int B> __device__ __forceinline__ void multiply(float (&d0)[4], float (&d1)[4], const Left<A> &a, const Right<B> &b) {
    constexpr int most = A > B ? A : B;
#pragma unroll
    for (int i = 0; i < A; i++) {
#pragma unroll
        for (int j = 0; j < B; j++) {
            if (i + j < most) {
                mma(d0, a.r[i], b.r[j][0][0], b.r[j][0][1]);
                mma(d1, a.r[i], b.r[j][1][0], b.r[j][1][1]);
            }
        }
    }
}

// Parts of two numbers.
template <int T> __device__ __forceinline__ void split(u32 (&parts)[T], float x, float y) {
#pragma unroll
    for (int i = 0; i < T; i++) {
        parts[i] = bf16_pair(x, y);
        float2 back = bf16_floats(parts[i]);
        x -= back.x;
        y -= back.y;
    }
}

// A tile of the inputs: rows of PITCH elements of 16 bits.
template <int PITCH> struct Input {
    static constexpr int terms = IN_TYPE == BF16 ? 1 : 2, pitch = PITCH;
    const u16 *at;
    __device__ __forceinline__ const u16 *row(int r, int c) const { return at + r * PITCH + c; }
    // Parts of four registers of a fragment.
    template <int N> static __device__ __forceinline__ void parts(u32 (&to)[terms][N], const u32 (&raw)[N]) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (IN_TYPE == BF16) {
                to[0][i] = raw[i];
            } else {
                float2 x = f16_floats(raw[i]);
                u32 p[terms];
                split(p, x.x, x.y);
#pragma unroll
                for (int t = 0; t < terms; t++) to[t][i] = p[t];
            }
        }
    }
};

// A tile of computed numbers: T tiles of bf16 parts.
template <int PITCH, int ROWS_OF, int T> struct Parts {
    static constexpr int terms = T, pitch = PITCH;
    static constexpr int bytes = PITCH * ROWS_OF * T * 2;
    u16 *at;
    __device__ __forceinline__ const u16 *row(int r, int c) const { return at + r * PITCH + c; }
    __device__ __forceinline__ void set(int r, int c, float x, float y) const {
        u32 p[T];
        split(p, x, y);
#pragma unroll
        for (int t = 0; t < T; t++) *(u32 *)(at + t * PITCH * ROWS_OF + r * PITCH + c) = p[t];
    }
    // Eight numbers, whose column is a multiple of eight.
    __device__ __forceinline__ void set_eight(int r, int c, const float *x) const {
        u32 w[4][T];
#pragma unroll
        for (int i = 0; i < 4; i++) split(w[i], x[2 * i], x[2 * i + 1]);
#pragma unroll
        for (int t = 0; t < T; t++) {
            uint4 all;
            all.x = w[0][t];
            all.y = w[1][t];
            all.z = w[2][t];
            all.w = w[3][t];
            *(uint4 *)(at + t * PITCH * ROWS_OF + r * PITCH + c) = all;
        }
    }
    __device__ __forceinline__ float2 get(int r, int c) const {
        float2 sum = {0.0f, 0.0f};
#pragma unroll
        for (int t = T - 1; t >= 0; t--) {
            float2 x = bf16_floats(*(const u32 *)(at + t * PITCH * ROWS_OF + r * PITCH + c));
            sum.x += x.x;
            sum.y += x.y;
        }
        return sum;
    }
    static constexpr int step = PITCH * ROWS_OF;
};

// The same with at least two parts, for what is read back; products take the first T.
template <int PITCH, int ROWS_OF, int T> struct Fine : Parts<PITCH, ROWS_OF, T> {
    typedef Parts<PITCH, ROWS_OF, T < 2 ? 2 : T> All;
    static constexpr int bytes = All::bytes;
    __device__ __forceinline__ All all() const { return All{this->at}; }
    __device__ __forceinline__ void set(int r, int c, float x, float y) const { all().set(r, c, x, y); }
    __device__ __forceinline__ void set_eight(int r, int c, const float *x) const { all().set_eight(r, c, x); }
    __device__ __forceinline__ float2 get(int r, int c) const { return all().get(r, c); }
};

// Fragments. `left` takes rows m.. and steps k.. of a tile whose rows are m, `left_turned` of one whose rows are k;
// `right` takes columns n.. of a tile whose rows are n, `right_turned` of one whose rows are k.
// What depends on the lane stands apart from the place in the tile, so that places that differ by constants share one
// address.
template <int P> __device__ __forceinline__ void load(u32 (&to)[Input<P>::terms][4], const Input<P> &x, u32 of_lane, u32 place, bool turned) {
    u32 raw[4];
    if (turned) load_matrices_turned(raw, x.at, of_lane + place * 2);
    else load_matrices(raw, x.at, of_lane + place * 2);
    Input<P>::parts(to, raw);
}
template <int P, int R, int T> __device__ __forceinline__ void load(u32 (&to)[T][4], const Parts<P, R, T> &x, u32 of_lane, u32 place, bool turned) {
#pragma unroll
    for (int t = 0; t < T; t++) {
        if (turned) load_matrices_turned(to[t], x.at, of_lane + (place + t * x.step) * 2);
        else load_matrices(to[t], x.at, of_lane + (place + t * x.step) * 2);
    }
}
// Of a lane whose row is that of its first sixteen or whose column is: bytes from the first of a fragment.
template <int PITCH> __device__ __forceinline__ u32 rows_first() {
    u32 lane = threadIdx.x & 31;
    return (lane & 15) * (PITCH * 2) + (lane >> 4) * 16;
}
template <int PITCH> __device__ __forceinline__ u32 columns_first() {
    u32 lane = threadIdx.x & 31;
    return (lane & 7) * (PITCH * 2) + (lane >> 4) * (PITCH * 16) + (lane >> 3 & 1) * 16;
}
template <class X> __device__ __forceinline__ Left<X::terms> left(const X &x, int m, int k) {
    Left<X::terms> a;
    load(a.r, x, rows_first<X::pitch>(), m * X::pitch + k, false);
    return a;
}
template <class X> __device__ __forceinline__ Left<X::terms> left_turned(const X &x, int k, int m) {
    Left<X::terms> a;
    load(a.r, x, columns_first<X::pitch>(), k * X::pitch + m, true);
    return a;
}
template <int T> __device__ __forceinline__ Right<T> paired(const u32 (&r)[T][4]) {
    Right<T> b;
#pragma unroll
    for (int t = 0; t < T; t++) {
        b.r[t][0][0] = r[t][0];
        b.r[t][0][1] = r[t][1];
        b.r[t][1][0] = r[t][2];
        b.r[t][1][1] = r[t][3];
    }
    return b;
}
template <class X> __device__ __forceinline__ Right<X::terms> right(const X &x, int n, int k) {
    u32 r[X::terms][4];
    load(r, x, columns_first<X::pitch>(), n * X::pitch + k, false);
    return paired(r);
}
template <class X> __device__ __forceinline__ Right<X::terms> right_turned(const X &x, int k, int n) {
    u32 r[X::terms][4];
    load(r, x, rows_first<X::pitch>(), k * X::pitch + n, true);
    return paired(r);
}

// Sums of 16 x 16 as the left side of the next product.
template <int T> __device__ __forceinline__ Left<T> as_left(const float (&c0)[4], const float (&c1)[4]) {
    Left<T> a;
    const float *pairs[4] = {c0, c0 + 2, c1, c1 + 2};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 p[T];
        split(p, pairs[i][0], pairs[i][1]);
#pragma unroll
        for (int t = 0; t < T; t++) a.r[t][i] = p[t];
    }
    return a;
}

__device__ __forceinline__ void clear(float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = 0.0f;
}
template <int N> __device__ __forceinline__ void clear(float (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) clear(x[i]);
}

// Sum over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
    x += from_lane(x, 1);
    return x + from_lane(x, 2);
}

// Rows of an input with WIDTH channels, by N threads side by side; rows from `count` on are zero.
template <int WIDTH, int N = THREADS> __device__ __forceinline__ void fetch(u16 *to, const void *from, i64 row_step, int count) {
    constexpr int pieces = WIDTH / 8;
    if constexpr (N % pieces == 0) {
        // Each thread takes the same sixteen bytes of every STEPth row.
        constexpr int step = N / pieces;
        int r = threadIdx.x % N / pieces, c = threadIdx.x % pieces * 8;
        const u8 *source = (const u8 *)from + (r * row_step + c) * 2;
        to += r * (WIDTH + 8) + c;
        row_step *= step * 2;
        // A copy of no bytes reads nothing, wherever it is from.
#pragma unroll
        for (int i = 0; i < ROWS; i += step) {
            copy_16(to + i * (WIDTH + 8), source, r + i < count ? 16u : 0u);
            source += row_step;
        }
    } else {
        for (int i = threadIdx.x % N; i < ROWS * pieces; i += N) {
            int r = i / pieces, c = i % pieces * 8;
            copy_16(to + r * (WIDTH + 8) + c, (const u16 *)from + (r < count ? r * row_step + c : 0), r < count ? 16u : 0u);
        }
    }
}

// Once the copies of this one of N threads have arrived: NaN and infinities among them read as zero. Whether there were any.
template <int WIDTH, int COUNT = ROWS, int N = THREADS> __device__ __forceinline__ bool clean(u16 *tile) {
    constexpr int pieces = WIDTH / 8;
    u32 largest = 0;
#pragma unroll
    for (int i = threadIdx.x % N; i < COUNT * pieces; i += N) {
        uint4 w = *(const uint4 *)(tile + i / pieces * (WIDTH + 8) + i % pieces * 8);
        largest = larger_sizes<IN_TYPE>(larger_sizes<IN_TYPE>(largest, w.x), w.y);
        largest = larger_sizes<IN_TYPE>(larger_sizes<IN_TYPE>(largest, w.z), w.w);
    }
    if (!not_finite<IN_TYPE>(largest)) return false;
#pragma unroll 1
    for (int i = threadIdx.x % N; i < COUNT * pieces; i += N) {
        u32 *w = (u32 *)(tile + i / pieces * (WIDTH + 8) + i % pieces * 8);
        for (int j = 0; j < 4; j++) w[j] = finite_pair<IN_TYPE>(w[j]);
    }
    return true;
}

// The same of a warp's own sixteen rows from `row` on, once it is known that there are some.
template <int WIDTH> __device__ __forceinline__ void clean_sixteen(u16 *tile, int row) {
    constexpr int words = WIDTH / 2;
    warp_barrier();
#pragma unroll 1
    for (int i = threadIdx.x & 31; i < 16 * words; i += 32) {
        u32 *w = (u32 *)(tile + (row + i / words) * (WIDTH + 8)) + i % words;
        *w = finite_pair<IN_TYPE>(*w);
    }
    warp_barrier();
}
// Whether sums of products of one row with anything, two rows of a lane, tell of a NaN or an infinity in those rows: of
// the warp's. (Sums of what is finite may have become infinite: then too.)
__device__ __forceinline__ bool not_finite_sums(const float (&sums)[4]) {
    constexpr u32 mask = 0x7f800000u;
    return any_of_warp((bits_of(sums[0]) & mask) == mask || (bits_of(sums[2]) & mask) == mask);
}

// Where shared memory goes, in order.
struct Carve {
    u8 *at;
    template <class T> __device__ __forceinline__ T *take(int bytes) {
        T *here = (T *)at;
        at += (bytes + 127) / 128 * 128;
        return here;
    }
};
