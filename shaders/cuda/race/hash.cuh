// Hashes of a tile: t = tanh(W·x), and from it α = R·φ − c of every bucket.
#pragma once
#include "tiles.cuh"
#include "walk.cuh"

constexpr int KEY_PITCH = pitch_of(HEAD_DIM), VALUE_PITCH = pitch_of(VALUE_DIM), BUCKET_PITCH = pitch_of(BUCKETS_UP);
// Elements of a tile.
constexpr int KEY_TILE = ROWS * KEY_PITCH, VALUE_TILE = ROWS * VALUE_PITCH;
constexpr int KEY_BYTES = KEY_TILE * sizeof(Element), VALUE_BYTES = VALUE_TILE * sizeof(Element);
typedef Input<KEY_PITCH> Keys;
typedef Input<VALUE_PITCH> Values;
typedef Parts<BUCKET_PITCH, ROWS, TERMS> Weights;
// Weights that the gradient of their own hash is made of: rounded to bf16 they would leave errors of one sign in a row's
// sum, whose terms cancel.
typedef Fine<BUCKET_PITCH, ROWS, TERMS> FineWeights;
typedef Parts<KEY_PITCH, BITS_UP, PLANE_TERMS> Planes;
// Tiles of eight bits.
constexpr int BIT_TILES = (BITS + 7) / 8;
typedef Parts<VALUE_PITCH, BUCKETS_UP, TERMS> Entry;

__device__ __forceinline__ float2 make_pair(float x, float y) {
    float2 pair = {x, y};
    return pair;
}

__device__ __forceinline__ void load_planes(const Planes &to, const float *planes) {
    for (int i = threadIdx.x; i < BITS_UP * HEAD_DIM / 2; i += THREADS) {
        int bit = i / (HEAD_DIM / 2), c = i % (HEAD_DIM / 2) * 2;
        bool real = bit < BITS;
        to.set(bit, c, real ? planes[bit * HEAD_DIM + c] : 0.0f, real ? planes[bit * HEAD_DIM + c + 1] : 0.0f);
    }
}

// tanh to a few units in the last place.
__device__ __forceinline__ float bounded_tanh(float x) {
    float size = fabsf(x);
    float e = exp2_fast(-2.885390082f * size);
    float large = quotient(1.0f - e, 1.0f + e);
    float square = x * x;
    float small = size * (1.0f - square * (0.333333333f - square * (0.133333333f - square * (0.053968254f - square * 0.021869489f))));
    return copysignf(size < 0.3f ? small : large, x);
}

// t of sixteen rows from `row` on, by one warp: t[j] are bits 8j + 2·(lane % 4) and the next, of two rows. If the rows
// are not clean yet, they are then.
__device__ __forceinline__ void project(float (&t)[BITS_UP / 8][4], Element *tile, const Planes &planes, int row) {
    Keys x = {tile};
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        clear(t);
#pragma unroll WRITTEN_OUT
        for (int c = 0; c < HEAD_DIM; c += 16) {
            auto a = left(x, row, c);
#pragma unroll
            for (int n = 0; n < BITS_UP; n += 16) multiply(t[n / 8], t[n / 8 + 1], a, right(planes, n, c));
        }
        if (!not_finite_sums(t[0])) break;
        if (turn == 0) clean_sixteen<HEAD_DIM>(tile, row);
    }
#pragma unroll
    for (int j = 0; j < BIT_TILES; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) t[j][i] = bounded_tanh(t[j][i]);
    }
}

// t of a warp's sixteen rows, as `[row, bits]`.
__device__ __forceinline__ void store_bits(float *to, const float (&t)[BITS_UP / 8][4], int row) {
    u32 lane = threadIdx.x & 31;
    to += (row + (lane >> 2)) * BITS + (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < BIT_TILES; j++) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            float *at = to + (i >> 1) * 8 * BITS + j * 8;
            int bit = j * 8 + (lane & 3) * 2;
            if (BITS % 2 == 0) {
                if (BITS % 8 == 0 || bit < BITS) *(float2 *)at = make_pair(t[j][i], t[j][i + 1]);
            } else {
                if (bit < BITS) at[0] = t[j][i];
                if (bit + 1 < BITS) at[1] = t[j][i + 1];
            }
        }
    }
}
// The same of sixteen rows, `real` of which there are; the others' are zero.
__device__ __forceinline__ void load_bits(float (&t)[BITS_UP / 8][4], const float *from, int row, int real) {
    u32 lane = threadIdx.x & 31;
    clear(t);
    from += (row + (lane >> 2)) * BITS + (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < BIT_TILES; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            bool is = row + (int)(lane >> 2) + (i >> 1) * 8 < real && j * 8 + (int)(lane & 3) * 2 + (i & 1) < BITS;
            if (is) t[j][i] = from[(i >> 1) * 8 * BITS + j * 8 + (i & 1)];
        }
    }
}

// t of one table of one row.
__device__ __forceinline__ void load_table(float (&t)[PLANES], const float *from) {
    if constexpr (PLANES == 4) {
        uint4 four = *(const uint4 *)from;
        t[0] = float_of(four.x), t[1] = float_of(four.y), t[2] = float_of(four.z), t[3] = float_of(four.w);
    } else {
#pragma unroll
        for (int plane = 0; plane < PLANES; plane++) t[plane] = from[plane];
    }
}
// α of them, times `factor`.
__device__ __forceinline__ void expand(float (&weights)[RADIX], const float (&t)[PLANES], float beta, float centre, float factor) {
    weights[0] = factor;
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
        // Twice σ(−z) and σ(z) of z = 2βt, both to their own relative precision.
        float z = beta * t[plane], e = exp2_fast(-2.885390082f * fabsf(z));
        float large = quotient(2.0f, 1.0f + e), small = e * large;
        float of_zero = z > 0.0f ? small : large, of_one = z > 0.0f ? large : small;
#pragma unroll
        for (int i = RADIX / 2 - 1; i >= 0; i--) {
            if (i >= 1 << plane) continue;
            weights[2 * i + 1] = weights[i] * of_one;
            weights[2 * i] = weights[i] * of_zero;
        }
    }
    if (centre == 0.0f) return;
#pragma unroll
    for (int r = 0; r < RADIX; r++) weights[r] -= centre * factor;
}

// Whether tiles of weights have room for two columns more: with a centred hash they weigh the matrix's last row, in two
// parts, which is then a product like the others.
constexpr bool SPARE = BUCKETS + 2 <= BUCKETS_UP;

// Weights of one table of one row, times `factor`; with the first one's, of a real row, `last` in the spare column.
template <class To> __device__ __forceinline__ void store_table(const To &to, const float (&t)[PLANES], float beta, float centre, int row, int table, bool real, float factor, float last) {
    // Padding weighs nothing, whatever its t.
    float weights[RADIX], known[PLANES];
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) known[plane] = real ? t[plane] : 0.0f;
    expand(weights, known, beta, centre, real ? factor : 0.0f);
    if constexpr (RADIX >= 8) {
#pragma unroll
        for (int r = 0; r < RADIX; r += 8) to.set_eight(row, table * RADIX + r, weights + r);
    } else {
#pragma unroll
        for (int r = 0; r < RADIX; r += 2) to.set(row, table * RADIX + r, weights[r], weights[r + 1]);
    }
    if (SPARE && centre != 0.0f && table == 0) {
        float x = real ? last : 0.0f, high = bf16_floats(bf16_pair(x, x)).x;
        to.set(row, BUCKETS, high, x - high);
    }
}
// Of a warp's sixteen rows from `first` on.
template <class To, class F>
__device__ __forceinline__ void store_rows(const To &to, const float *bits, float beta, float centre, int first, int count, F factor, bool with_last) {
#pragma unroll
    for (int i = threadIdx.x & 31; i < 16 * TABLES; i += 32) {
        int row = first + i / TABLES;
        float t[PLANES], of_row = factor(row);
        load_table(t, bits + first * BITS + i * PLANES);
        store_table(to, t, beta, centre, row, i % TABLES, row < count, of_row, with_last ? of_row : 0.0f);
    }
}
__device__ __forceinline__ float one_of(int) { return 1.0f; }

// t of a tile's rows, of which each of N threads has some tables.
template <int N> struct TileBits {
    static constexpr int items = (ROWS * TABLES + N - 1) / N;
    float t[items][PLANES];
    __device__ __forceinline__ void load(const float *bits) {
#pragma unroll
        for (int n = 0; n < items; n++) {
            int i = threadIdx.x % N + n * N;
            if (i < ROWS * TABLES) load_table(t[n], bits + i * PLANES);
        }
    }
    template <class To, class F>
    __device__ __forceinline__ void store(const To &to, float beta, float centre, int count, F factor, bool with_last) const {
#pragma unroll
        for (int n = 0; n < items; n++) {
            int i = threadIdx.x % N + n * N, row = i / TABLES;
            if (i >= ROWS * TABLES) continue;
            float of_row = factor(row, n);
            store_table(to, t[n], beta, centre, row, i % TABLES, row < count, of_row, with_last ? of_row : 0.0f);
        }
    }
    // Of keys, each of which counts once.
    template <class To> __device__ __forceinline__ void store_keys(const To &to, float beta, float centre, int count, bool with_last) const {
        store(to, beta, centre, count, [](int, int) { return 1.0f; }, with_last);
    }
};
// t of a tile's rows, on their way to shared memory while other work goes on: each thread copies what it will read itself.
struct StagedBits {
    static constexpr int items = ROWS * TABLES;
    static constexpr int bytes = ROWS * BITS * 4;
    float *at;
    // Those of a thread, and what each is for.
    template <class F> static __device__ __forceinline__ void for_each(F work) {
#pragma unroll
        for (int n = 0; n < (items + THREADS - 1) / THREADS; n++) {
            int i = threadIdx.x + n * THREADS;
            if (items % THREADS == 0 || i < items) work(i);
        }
    }
    __device__ __forceinline__ void fetch(const float *bits) const {
        for_each([&](int i) {
            if constexpr (PLANES == 4) {
                copy_16(at + i * PLANES, bits + i * PLANES, 16);
            } else if constexpr (PLANES % 2 == 0) {
#pragma unroll
                for (int plane = 0; plane < PLANES; plane += 2) copy_few<8>(at + i * PLANES + plane, bits + i * PLANES + plane, 8);
            } else {
#pragma unroll
                for (int plane = 0; plane < PLANES; plane++) copy_few<4>(at + i * PLANES + plane, bits + i * PLANES + plane, 4);
            }
        });
    }
    // Weights of the tile's rows, times the factor of each item.
    template <class To, class F>
    __device__ __forceinline__ void store(const To &to, float beta, float centre, int count, F factor, bool with_last) const {
        for_each([&](int i) {
            float t[PLANES], of_item = factor(i);
            load_table(t, at + i * PLANES);
            store_table(to, t, beta, centre, i / TABLES, i % TABLES, i / TABLES < count, of_item, with_last ? of_item : 0.0f);
        });
    }
};
__device__ __forceinline__ void prefetch_bits(const float *bits) {
    if (threadIdx.x * 32 < ROWS * BITS) prefetch(bits + threadIdx.x * 32);
}

// Columns past the last bucket or bit are never written again.
template <class X> __device__ __forceinline__ void clear_tile(const X &x) {
    for (int i = threadIdx.x; i < X::bytes / 4; i += THREADS) ((u32 *)x.at)[i] = 0;
}

// The matrix that a block carries, [S, Dv + 1], with the last row where weights have a column for it: each of its first WARPS warps has sixteen buckets of some channels,
// and those of the first channels their mass.
constexpr int BUCKET_TILES = BUCKETS_UP / 16;
template <int WARPS> struct Carried {
    static constexpr int CHANNEL_PARTS = WARPS / BUCKET_TILES < VALUE_DIM / 16 ? WARPS / BUCKET_TILES : VALUE_DIM / 16;
    static constexpr int PART = VALUE_DIM / CHANNEL_PARTS;
    float sums[PART / 8][4];
    float mass[4];
    int bucket, channel, rows;
    bool active;

    __device__ __forceinline__ void place(bool last_row) {
        rows = BUCKETS + (SPARE && last_row);
        int warp = threadIdx.x >> 5;
        bucket = warp % BUCKET_TILES * 16;
        channel = warp / BUCKET_TILES * PART;
        active = warp / BUCKET_TILES < CHANNEL_PARTS;
        clear(sums);
        clear(mass);
    }
    __device__ __forceinline__ bool has_mass() const { return channel == 0; }
    __device__ __forceinline__ int row_of(int i) const { return bucket + (threadIdx.x >> 2 & 7) + (i >> 1) * 8; }
    __device__ __forceinline__ int column_of(int j, int i) const { return channel + j * 8 + (threadIdx.x & 3) * 2 + (i & 1); }
    __device__ __forceinline__ void read(const float *matrix) {
        if (!active) return;
#pragma unroll
        for (int j = 0; j < PART / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[j][i] = row_of(i) < rows ? matrix[row_of(i) * COLUMNS + column_of(j, i)] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) mass[i] = row_of(i) < rows ? matrix[row_of(i) * COLUMNS + VALUE_DIM] : 0.0f;
    }
    __device__ __forceinline__ void write(float *matrix) const {
        if (!active) return;
#pragma unroll
        for (int j = 0; j < PART / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (row_of(i) < rows) matrix[row_of(i) * COLUMNS + column_of(j, i)] = sums[j][i];
            }
        }
        if (!has_mass() || (threadIdx.x & 3) != 0) return;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            if (row_of(i) < rows) matrix[row_of(i) * COLUMNS + VALUE_DIM] = mass[i];
        }
    }
    // Where products can take it from.
    __device__ __forceinline__ void show(const Entry &to, float *masses) const {
        if (!active) return;
#pragma unroll
        for (int j = 0; j < PART / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) to.set(row_of(i), column_of(j, i), sums[j][i], sums[j][i + 1]);
        }
        if (!has_mass() || (threadIdx.x & 3) != 0) return;
        masses[row_of(0)] = mass[0];
        masses[row_of(2)] = mass[2];
    }
    // What the last row's parts leave of it, as a row of its own of what products take.
    __device__ __forceinline__ void show_last(const Entry &to) const {
        if (!active || bucket != BUCKETS / 16 * 16) return;
        constexpr int at = BUCKETS % 16 / 8 * 2;
        // Another lane has shown that row as it is.
        warp_barrier();
        if (row_of(at) != BUCKETS) return;
#pragma unroll
        for (int j = 0; j < PART / 8; j++) {
            float2 rest = remainder_of<TERMS>(sums[j][at], sums[j][at + 1]);
            to.set(BUCKETS + 1, column_of(j, 0), rest.x, rest.y);
        }
    }
    __device__ __forceinline__ void scale_last(float scale) {
#pragma unroll
        for (int j = 0; j < PART / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[j][i] *= row_of(i) == BUCKETS ? scale : 1.0f;
        }
    }
    // The last row, of two parts, times `scale`: its sums, and its mass.
    __device__ __forceinline__ void show_last(float *to, float *to_mass, float scale) const {
        if (!active || bucket != BUCKETS / 16 * 16) return;
        constexpr int at = BUCKETS % 16 / 8 * 2;
        bool mine = row_of(at) == BUCKETS;
#pragma unroll
        for (int j = 0; j < PART / 8; j++) {
#pragma unroll
            for (int i = at; i < at + 2; i++) {
                float sum = sums[j][i] + from_lane(sums[j][i], 4);
                if (mine) to[column_of(j, i)] = sum * scale;
            }
        }
        float all = mass[at] + from_lane(mass[at], 4);
        if (mine && has_mass() && (threadIdx.x & 3) == 0 && to_mass) *to_mass = all * scale;
    }
    // Adds weightsᵀ·[x, 1] over a tile's rows.
    __device__ __forceinline__ void add(const Weights &weights, const Values &x) {
        float2 one = {1.0f, 1.0f};
        add(weights, x, [&](int) { return column<1>(one, one); });
    }
    // The same, with a factor of each row in place of the one.
    __device__ __forceinline__ void add_scaled(const Weights &weights, const Values &x, const float *factors) {
        const float *own = factors + (threadIdx.x & 3) * 2;
        add(weights, x, [&](int k) { return column<PLANE_TERMS>(make_pair(own[k], own[k + 1]), make_pair(own[k + 8], own[k + 9])); });
    }
    template <class F> __device__ __forceinline__ void add(const Weights &weights, const Values &x, F factors_at) {
        if (!active) return;
        float parts[4];
        clear(parts);
        auto &of_mass = SHORT_SUMS ? parts : mass;
        add_over_rows(
            sums, PART, [&](int k) { return left_turned(weights, k, bucket); }, [&](int k, int c) { return right_turned(x, k, channel + c); },
            [&](int k, const Left<TERMS> &a) {
                if (has_mass()) multiply(of_mass, a, factors_at(k));
            });
        if constexpr (SHORT_SUMS) {
#pragma unroll
            for (int i = 0; i < 4; i++) mass[i] += parts[i];
        }
    }
};

// Weights of a hash gradient: from w = dα·R·φ of sixteen rows and all buckets, s_p = Σ_r w_r (c_rp − m_p), in the layout
// of t.
__device__ __forceinline__ float corner(int bucket, int bit, bool sign) {
    if (bucket >= BUCKETS || bit >= BITS || bucket / RADIX != bit / PLANES) return 0.0f;
    return sign && ((bucket >> (PLANES - 1 - bit % PLANES)) & 1) == 0 ? -1.0f : 1.0f;
}

// Corner signs, then ones where bit and bucket are of one table: `[bit, bucket]`.
typedef Parts<BUCKET_PITCH, BITS_UP * 2, 1> Corners;
__device__ __forceinline__ void load_corners(const Corners &to) {
    for (int i = threadIdx.x; i < BITS_UP * 2 * BUCKETS_UP / 2; i += THREADS) {
        int row = i / (BUCKETS_UP / 2), bucket = i % (BUCKETS_UP / 2) * 2, bit = row % BITS_UP;
        to.set(row, bucket, corner(bucket, bit, row < BITS_UP), corner(bucket + 1, bit, row < BITS_UP));
    }
}

// From w to du = β·s·(1 − t²), which goes to `du`; adds Σ t·s of each bit to `of_beta`.
typedef Parts<pitch_of(BITS_UP), ROWS, PLANE_TERMS> HashGradient;
__device__ __forceinline__ void through_hash(const float (&w)[BUCKETS_UP / 8][4], const float (&t)[BITS_UP / 8][4], const Corners &corners,
                                             const HashGradient &du, float (&of_beta)[BITS_UP / 8][2], int row, float beta) {
    float signed_sums[BITS_UP / 8][4], sums[BITS_UP / 8][4];
    clear(signed_sums);
    clear(sums);
#pragma unroll
    for (int k = 0; k < BUCKETS_UP; k += 16) {
        auto a = as_left<PLANE_TERMS>(w[k / 8], w[k / 8 + 1]);
#pragma unroll
        for (int n = 0; n < BITS_UP; n += 16) {
            multiply(signed_sums[n / 8], signed_sums[n / 8 + 1], a, right(corners, n, k));
            multiply(sums[n / 8], sums[n / 8 + 1], a, right(corners, BITS_UP + n, k));
        }
    }
    u32 lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < BIT_TILES; j++) {
        int bit = j * 8 + (lane & 3) * 2;
        float d[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float s = signed_sums[j][i] - bounded_tanh(beta * t[j][i]) * sums[j][i];
            of_beta[j][i & 1] += t[j][i] * s;
            d[i] = beta * s * (1.0f - t[j][i] * t[j][i]);
        }
        du.set(row + (lane >> 2), bit, d[0], d[1]);
        du.set(row + (lane >> 2) + 8, bit, d[2], d[3]);
    }
}

#if GRADIENT_TYPE == F32
typedef float Gradient;
#else
typedef u16 Gradient;
#endif

// Results of sixteen rows and eight columns; rows past `rows` do not exist.
template <int TYPE> __device__ __forceinline__ void store_run(void *to, i64 row_step, const float (&x)[4], int row, int column, int rows) {
    u32 lane = threadIdx.x & 31;
    int r = row + (lane >> 2);
    i64 at = r * row_step + column + (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (r + i * 8 >= rows) continue;
        i64 here = at + i * 8 * row_step;
        if (TYPE == F32) {
            float2 pair = {x[2 * i], x[2 * i + 1]};
            *(float2 *)((float *)to + here) = pair;
        } else {
            *(u32 *)((u16 *)to + here) = TYPE == BF16 ? bf16_pair(x[2 * i], x[2 * i + 1]) : f16_pair(x[2 * i], x[2 * i + 1]);
        }
    }
}

// Results of sixteen rows and N times eight columns. Of 16-bit results four lanes trade four runs, so that each stores
// sixteen bytes.
template <int TYPE, int N> __device__ __forceinline__ void store_tile(void *to, i64 row_step, const float (&x)[N][4], int row, int column, int rows) {
    u32 lane = threadIdx.x & 31;
    if (TYPE == F32) {
        float *at = (float *)to + (row + (lane >> 2)) * row_step + column + (lane & 3) * 2, *below = at + 8 * row_step;
        bool first = row + (int)(lane >> 2) < rows, second = row + (int)(lane >> 2) + 8 < rows;
        if (first) {
#pragma unroll
            for (int j = 0; j < N; j++) *(float2 *)(at + j * 8) = make_pair(x[j][0], x[j][1]);
        }
        if (second) {
#pragma unroll
            for (int j = 0; j < N; j++) *(float2 *)(below + j * 8) = make_pair(x[j][2], x[j][3]);
        }
        return;
    }
    if (N % 4 != 0) {
#pragma unroll
        for (int j = 0; j < N; j++) store_run<TYPE>(to, row_step, x[j], row, column + j * 8, rows);
        return;
    }
    bool odd = lane & 1, upper = lane & 2;
#pragma unroll
    for (int j = 0; j + 3 < N; j += 4) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            u32 w[4];
#pragma unroll
            for (int n = 0; n < 4; n++) w[n] = TYPE == BF16 ? bf16_pair(x[j + n][i], x[j + n][i + 1]) : f16_pair(x[j + n][i], x[j + n][i + 1]);
            // Lane t gives run n of lane t for run t of lane n.
            u32 a = from_lane(odd ? w[0] : w[1], 1), b = from_lane(odd ? w[2] : w[3], 1);
            w[0] = odd ? a : w[0];
            w[1] = odd ? w[1] : a;
            w[2] = odd ? b : w[2];
            w[3] = odd ? w[3] : b;
            a = from_lane(upper ? w[0] : w[2], 2);
            b = from_lane(upper ? w[1] : w[3], 2);
            uint4 all;
            all.x = upper ? a : w[0];
            all.y = upper ? b : w[1];
            all.z = upper ? w[2] : a;
            all.w = upper ? w[3] : b;
            int r = row + (lane >> 2) + i * 4;
            if (r < rows) *(uint4 *)((u16 *)to + r * row_step + column + (j + (lane & 3)) * 8) = all;
        }
    }
}

// dx = Wᵀ·du of sixteen rows, half of the channels.
__device__ __forceinline__ void store_hash_inputs(void *to, i64 row_step, const HashGradient &du, const Planes &planes, int row, int rows, int half) {
    constexpr int width = HEAD_DIM / 2;
    constexpr int run = width % 32 == 0 ? 32 : 16;
    Left<PLANE_TERMS> a[BITS_UP / 16];
#pragma unroll
    for (int k = 0; k < BITS_UP; k += 16) a[k / 16] = left(du, row, k);
#pragma unroll WRITTEN_OUT
    for (int c = 0; c < width; c += run) {
        float sums[run / 8][4];
        clear(sums);
#pragma unroll
        for (int k = 0; k < BITS_UP; k += 16) {
#pragma unroll
            for (int n = 0; n < run; n += 16) multiply(sums[n / 8], sums[n / 8 + 1], a[k / 16], right_turned(planes, k, half * width + c + n));
        }
        store_tile<GRADIENT_TYPE, run / 8>(to, row_step, sums, row, half * width + c, rows);
    }
}

// Adds rows·means of sixteen channels to what two rows of a lane have so far, of a quarter of the channels.
__device__ __forceinline__ void add_gains(float (&gain)[2], const Left<Keys::terms> &rows, const float *means) {
    u32 lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 mean = *(const float2 *)(means + (lane & 3) * 2 + (i >> 1) * 8);
        float2 x = pair_of(rows, i);
        gain[i & 1] += x.x * mean.x + x.y * mean.y;
    }
}

// Both backward kernels: four of their warps carry sums, four read.
constexpr int CARRIERS = 4;
constexpr int CARRYING = CARRIERS * 32;

// dW += duᵀ·x over the rows of a tile: each warp has some channels.
constexpr int PLANE_PARTS = HEAD_DIM / 16 < CARRIERS ? HEAD_DIM / 16 : CARRIERS;
constexpr int PLANE_PART = (HEAD_DIM / 16 + PLANE_PARTS - 1) / PLANE_PARTS * 16;
struct PlaneSums {
    float sums[BITS_UP / 16][PLANE_PART / 8][4];
    int channel;
    __device__ __forceinline__ void place(int warp) {
        channel = warp < PLANE_PARTS ? warp * PLANE_PART : HEAD_DIM;
#pragma unroll
        for (int i = 0; i < BITS_UP / 16; i++) clear(sums[i]);
    }
    __device__ __forceinline__ void add(const HashGradient &du, const Keys &x) {
        if (channel >= HEAD_DIM) return;
#pragma unroll
        for (int m = 0; m < BITS_UP; m += 16) {
            add_over_rows(
                sums[m / 16], HEAD_DIM - channel, [&](int k) { return left_turned(du, k, m); }, [&](int k, int c) { return right_turned(x, k, channel + c); },
                [](int, const Left<PLANE_TERMS> &) {});
        }
    }
    __device__ __forceinline__ void write(float *to) const {
        if (channel >= HEAD_DIM) return;
        u32 lane = threadIdx.x & 31;
#pragma unroll
        for (int m = 0; m < BITS_UP / 16; m++) {
#pragma unroll
            for (int j = 0; j < PLANE_PART / 8; j++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int bit = m * 16 + (lane >> 2) + (i >> 1) * 8, c = channel + j * 8 + (lane & 3) * 2 + (i & 1);
                    if (bit < BITS && c < HEAD_DIM) to[bit * (HEAD_DIM + 1) + c] = sums[m][j][i];
                }
            }
        }
    }
};

// Sums of t·s that a warp holds, for a sum over four warps.
__device__ __forceinline__ void keep_of_beta(float *room, const float (&of_beta)[BITS_UP / 8][2], int part) {
    u32 lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < BITS_UP / 8; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float x = of_beta[j][i];
            x += from_lane(x, 4);
            x += from_lane(x, 8);
            x += from_lane(x, 16);
            if (lane < 4) room[part * BITS_UP + j * 8 + lane * 2 + i] = x;
        }
    }
}
// Into the last column of a share.
__device__ __forceinline__ void write_of_beta(float *to, const float *room) {
    int bit = threadIdx.x;
    if (bit >= BITS) return;
    float sum = 0.0f;
    for (int i = 0; i < 4; i++) sum += room[i * BITS_UP + bit];
    to[bit * (HEAD_DIM + 1) + HEAD_DIM] = sum;
}

// Shared memory of both backward kernels: what they have in common, and what each has besides.
constexpr int BACKWARD_COMMON = KEY_BYTES + 2 * STAGES * VALUE_BYTES + Planes::bytes + Weights::bytes + FineWeights::bytes + Entry::bytes + Corners::bytes +
                                HashGradient::bytes + BUCKETS_UP * 4 + VALUE_DIM * 4 + 2 * ROWS * 4 + 4 * BITS_UP * 4 + 512;
constexpr int OF_QUERY = (LATE_STAGES - 1) * KEY_BYTES + ROWS * BITS * 4, OF_KEY = 2 * StagedBits::bytes + StagedBits::items * 8;
[[maybe_unused]] constexpr int BACKWARD_SHARED = BACKWARD_COMMON + (OF_QUERY > OF_KEY ? OF_QUERY : OF_KEY);
