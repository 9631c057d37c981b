// Fragments for inputs of 16 bits: computed numbers are sums of bf16 parts. Inputs are exact in one part (bf16) or two (f16).
#pragma once

typedef u16 Element;
// Elements from a row of a tile to the next: rows of a fragment are on banks of their own.
__host__ __device__ constexpr int pitch_of(int width) { return width + 8; }
template <int PITCH> __device__ __forceinline__ int place(int row, int c) { return row * PITCH + c; }
// Sums of any length may be left to the tensor cores, whose error is small beside that of the parts.
constexpr bool SHORT_SUMS = false;
// What all buckets add alike to a product of weights would cost it digits: it is a product of its own.
constexpr bool SUMS_IN_ONE = false;
// Rounds of a loop over steps that are written out: instructions that do not fit their cache are fetched again and again.
constexpr int WRITTEN_OUT = 4;

template <int T> struct Left { u32 r[T][4]; };
// Two neighbouring tiles of eight columns.
template <int T> struct Right { u32 r[T][2][2]; };
// The same column eight times.
template <int T> struct Column { u32 r[T][2]; };

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

template <int A, int B> __device__ __forceinline__ void multiply(float (&d)[4], const Left<A> &a, const Column<B> &b) {
    constexpr int most = A > B ? A : B;
#pragma unroll
    for (int i = 0; i < A; i++) {
#pragma unroll
        for (int j = 0; j < B; j++) {
            if (i + j < most) mma(d, a.r[i], b.r[j][0], b.r[j][1]);
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

// What T parts leave of two numbers.
template <int T> __device__ __forceinline__ float2 remainder_of(float x, float y) {
    u32 parts[T];
    split(parts, x, y);
    float2 rest = {x, y};
#pragma unroll
    for (int t = 0; t < T; t++) {
        float2 part = bf16_floats(parts[t]);
        rest.x -= part.x;
        rest.y -= part.y;
    }
    return rest;
}
// The column that a lane's steps 2·(lane % 4) and the next have `low` of, and the same eight later `high`.
template <int T> __device__ __forceinline__ Column<T> column(float2 low, float2 high) {
    u32 of_low[T], of_high[T];
    split(of_low, low.x, low.y);
    split(of_high, high.x, high.y);
    Column<T> b;
#pragma unroll
    for (int t = 0; t < T; t++) {
        b.r[t][0] = of_low[t];
        b.r[t][1] = of_high[t];
    }
    return b;
}
// Two neighbours of a row: of the lane's first row or, for odd `i`, its second; the last eight columns from i = 2 on.
template <int T> __device__ __forceinline__ float2 pair_of(const Left<T> &a, int i) {
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int t = T - 1; t >= 0; t--) {
        float2 x = bf16_floats(a.r[t][i]);
        sum.x += x.x;
        sum.y += x.y;
    }
    return sum;
}
// Left side of a product with ones, or `value`, where a key is seen: of 16 queries and keys of the same sixteen.
__device__ __forceinline__ Left<1> seen(float value, bool diagonal) {
    u32 lane = threadIdx.x & 31;
    int row = lane >> 2, column = (lane & 3) * 2;
    u32 one = bf16_pair(value, 0.0f) & 0xffffu;
    Left<1> a;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int r = row + (i & 1) * 8, c = column + (i >> 1) * 8;
        a.r[0][i] = (!diagonal || c <= r ? one : 0u) | (!diagonal || c + 1 <= r ? one << 16 : 0u);
    }
    return a;
}
template <int PITCH> __device__ __forceinline__ float input_at(const u16 *tile, int row, int c) {
    u32 x = tile[place<PITCH>(row, c)];
    return IN_TYPE == BF16 ? float_of(x << 16) : f16_floats(x).x;
}

// The left sides of all steps of a product, in registers.
template <int STEPS, class X> struct Kept {
    Left<X::terms> all[STEPS / 16];
    __device__ __forceinline__ Kept(const X &x, int m) {
#pragma unroll
        for (int k = 0; k < STEPS; k += 16) all[k / 16] = left(x, m, k);
    }
    __device__ __forceinline__ const Left<X::terms> &at(int k) const { return all[k / 16]; }
};
