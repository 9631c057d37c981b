// Fragments for inputs of f32: numbers are in tiles as they are, and products take of each its rounding to TF32 and, but
// for those of one part, what that leaves.
//
// A lane has pairs of neighbours where the fragments of 16 bits have them: of sixteen steps the tensor cores are given
// those in another order, the same on both sides.
#pragma once

typedef float Element;
// Elements from a row of a tile to the next.
__host__ __device__ constexpr int pitch_of(int width) { return (width + 31) / 32 * 32; }
// Rows lie eight elements apart as they follow each other, so that neither the first four rows or the last of eight, with
// eight columns of each, nor the even rows or the odd ones share a bank.
__device__ __forceinline__ int turn_of(int row) { return (row & 2) << 3 | ((row >> 2 ^ row) & 1) << 3; }
template <int PITCH> __device__ __forceinline__ int place(int row, int c) { return row * PITCH + (c ^ turn_of(row)); }
// The tensor cores cut off what a sum has no bits for, all one way: longer sums are added up from short ones.
constexpr bool SHORT_SUMS = true;
// What all buckets add alike to a product of weights is added to it.
constexpr bool SUMS_IN_ONE = true;
// Rounds of a loop over steps that are written out: three products and their parts are long, and what does not fit the
// instruction cache is fetched again and again.
constexpr int WRITTEN_OUT = 1;

template <int T> struct Left { float2 r[4]; };
// Two neighbouring tiles of eight columns.
template <int T> struct Right { float2 r[2][2]; };
// The same column eight times.
template <int T> struct Column { float2 r[2]; };

// Of N numbers the parts that count.
template <int T, int N> struct SplitParts {
    u32 high[N], rest[N];
    __device__ __forceinline__ void set(int i, float x) {
        if (T > 1) split_tf32(high[i], rest[i], x);
        else high[i] = bits_of(x);
    }
};
// Of half of the steps of both sides.
template <int T> __device__ __forceinline__ SplitParts<T, 4> half_of(const Left<T> &a, int half) {
    SplitParts<T, 4> parts;
    parts.set(0, a.r[2 * half].x);
    parts.set(1, a.r[2 * half + 1].x);
    parts.set(2, a.r[2 * half].y);
    parts.set(3, a.r[2 * half + 1].y);
    return parts;
}
template <int T> __device__ __forceinline__ SplitParts<T, 2> half_of(const float2 &b) {
    SplitParts<T, 2> parts;
    parts.set(0, b.x);
    parts.set(1, b.y);
    return parts;
}

template <int A, int B> __device__ __forceinline__ void multiply(float (&d0)[4], float (&d1)[4], const Left<A> &a, const Right<B> &b) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        auto left = half_of(a, half);
        auto first = half_of<B>(b.r[0][half]), second = half_of<B>(b.r[1][half]);
        if (A > 1) {
            mma_tf32(d0, left.rest, first.high);
            mma_tf32(d1, left.rest, second.high);
        }
        if (B > 1) {
            mma_tf32(d0, left.high, first.rest);
            mma_tf32(d1, left.high, second.rest);
        }
        mma_tf32(d0, left.high, first.high);
        mma_tf32(d1, left.high, second.high);
    }
}
template <int A, int B> __device__ __forceinline__ void multiply(float (&d)[4], const Left<A> &a, const Column<B> &b) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        auto left = half_of(a, half);
        auto right = half_of<B>(b.r[half]);
        if (A > 1) mma_tf32(d, left.rest, right.high);
        if (B > 1) mma_tf32(d, left.high, right.rest);
        mma_tf32(d, left.high, right.high);
    }
}

// A tile of the inputs.
template <int PITCH> struct Input {
    static constexpr int terms = 2, pitch = PITCH;
    const float *at;
};

// A tile of computed numbers, of which products take T parts.
template <int PITCH, int ROWS_OF, int T> struct Parts {
    static constexpr int terms = T, pitch = PITCH;
    static constexpr int bytes = PITCH * ROWS_OF * 4;
    float *at;
    __device__ __forceinline__ void set(int r, int c, float x, float y) const {
        float2 pair = {x, y};
        *(float2 *)(at + place<PITCH>(r, c)) = pair;
    }
    // Eight numbers, whose column is a multiple of eight.
    __device__ __forceinline__ void set_eight(int r, int c, const float *x) const {
        float *to = at + place<PITCH>(r, c);
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            float4 four = {x[i], x[i + 1], x[i + 2], x[i + 3]};
            *(float4 *)(to + i) = four;
        }
    }
    __device__ __forceinline__ float2 get(int r, int c) const { return *(const float2 *)(at + place<PITCH>(r, c)); }
};
template <int PITCH, int ROWS_OF, int T> using Fine = Parts<PITCH, ROWS_OF, T>;

// Fragments. `left` takes rows m.. and steps k.. of a tile whose rows are m, `left_turned` of one whose rows are k;
// `right` takes columns n.. of a tile whose rows are n, `right_turned` of one whose rows are k. All are multiples of eight.
//
// Pairs along a row, of a lane's row among eight from `row` on; and pairs of neighbouring rows, of its column.
template <int PITCH> __device__ __forceinline__ float2 along(const float *tile, int row, int c) {
    int lane = threadIdx.x & 31, own = lane >> 2;
    return *(const float2 *)(tile + (row + own) * PITCH + (c ^ turn_of(own)) + (lane & 3) * 2);
}
template <int PITCH> __device__ __forceinline__ float2 across(const float *tile, int row, int c) {
    int lane = threadIdx.x & 31, own = (lane & 3) * 2;
    const float *first = tile + (row + own) * PITCH + (lane >> 2);
    float2 pair = {first[c ^ turn_of(own)], first[PITCH + (c ^ turn_of(own + 1))]};
    return pair;
}
template <class X> __device__ __forceinline__ Left<X::terms> left(const X &x, int m, int k) {
    Left<X::terms> a;
#pragma unroll
    for (int i = 0; i < 4; i++) a.r[i] = along<X::pitch>(x.at, m + (i & 1) * 8, k + (i >> 1) * 8);
    return a;
}
template <class X> __device__ __forceinline__ Left<X::terms> left_turned(const X &x, int k, int m) {
    Left<X::terms> a;
#pragma unroll
    for (int i = 0; i < 4; i++) a.r[i] = across<X::pitch>(x.at, k + (i >> 1) * 8, m + (i & 1) * 8);
    return a;
}
template <class X> __device__ __forceinline__ Right<X::terms> right(const X &x, int n, int k) {
    Right<X::terms> b;
#pragma unroll
    for (int i = 0; i < 4; i++) b.r[i >> 1][i & 1] = along<X::pitch>(x.at, n + (i >> 1) * 8, k + (i & 1) * 8);
    return b;
}
template <class X> __device__ __forceinline__ Right<X::terms> right_turned(const X &x, int k, int n) {
    Right<X::terms> b;
#pragma unroll
    for (int i = 0; i < 4; i++) b.r[i >> 1][i & 1] = across<X::pitch>(x.at, k + (i & 1) * 8, n + (i >> 1) * 8);
    return b;
}

// Sums of 16 x 16 as the left side of the next product.
template <int T> __device__ __forceinline__ Left<T> as_left(const float (&c0)[4], const float (&c1)[4]) {
    Left<T> a;
    const float *pairs[4] = {c0, c0 + 2, c1, c1 + 2};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        a.r[i].x = pairs[i][0];
        a.r[i].y = pairs[i][1];
    }
    return a;
}

// What tiles leave of two numbers.
template <int T> __device__ __forceinline__ float2 remainder_of(float, float) {
    float2 none = {0.0f, 0.0f};
    return none;
}
// The column that a lane's steps 2·(lane % 4) and the next have `low` of, and the same eight later `high`.
template <int T> __device__ __forceinline__ Column<T> column(float2 low, float2 high) { return Column<T>{{low, high}}; }
// Two neighbours of a row: of the lane's first row or, for odd `i`, its second; the last eight columns from i = 2 on.
template <int T> __device__ __forceinline__ float2 pair_of(const Left<T> &a, int i) { return a.r[i]; }
// Left side of a product with ones, or `value`, where a key is seen: of 16 queries and keys of the same sixteen.
__device__ __forceinline__ Left<1> seen(float value, bool diagonal) {
    int lane = threadIdx.x & 31, row = lane >> 2, column = (lane & 3) * 2;
    Left<1> a;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int r = row + (i & 1) * 8, c = column + (i >> 1) * 8;
        a.r[i].x = !diagonal || c <= r ? value : 0.0f;
        a.r[i].y = !diagonal || c + 1 <= r ? value : 0.0f;
    }
    return a;
}
template <int PITCH> __device__ __forceinline__ float input_at(const float *tile, int row, int c) { return tile[place<PITCH>(row, c)]; }

// The left sides of all steps of a product, where they are.
template <int STEPS, class X> struct Kept {
    X x;
    int m;
    __device__ __forceinline__ Kept(const X &x, int m) : x(x), m(m) {}
    __device__ __forceinline__ Left<X::terms> at(int k) const { return left(x, m, k); }
};
