// Checks the CUDA kernels of RACE against doubles and times them: `nvcc -O3 -arch=sm_90 -DPLANES=4 -DTABLES=4 race.cu`,
// or on the host, slowly and without times: `g++ -O2 -x c++ -DON_HOST ... race.cu`. In the environment LITTLE keeps the
// checks short, for compute-sanitizer, and UNCHECKED leaves them out.
#ifdef ON_HOST
#include "emulate.h"
#endif
#include "kernels.h"
#ifdef ANY_SHAPE
#include "any.h"
#endif
#include "reference.h"
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#ifdef ON_HOST
typedef int Event;
template <class T> T *make(size_t n) { T *p = (T *)aligned_alloc(256, (n * sizeof(T) + 255) / 256 * 256); memset((void *)p, 0xff, n * sizeof(T)); return p; }
static void drop(void *p) { free(p); }
template <class T> void put(T *to, const std::vector<T> &x) { memcpy((void *)to, x.data(), x.size() * sizeof(T)); }
template <class T> void get(std::vector<T> &to, const T *x) { memcpy((void *)to.data(), x, to.size() * sizeof(T)); }
template <class T> void zero(T *p, size_t n) { memset((void *)p, 0, n * sizeof(T)); }
#define LAUNCH(kernel, grid, threads, shared, ...) launch(grid, threads, [&] { kernel(__VA_ARGS__); })
#else
#define CHECK(x) do { cudaError_t e = (x); if (e != cudaSuccess) { printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e)); exit(1); } } while (0)
template <class T> T *make(size_t n) { T *p; CHECK(cudaMalloc(&p, n * sizeof(T))); return p; }
static void drop(void *p) { CHECK(cudaFree(p)); }
template <class T> void put(T *to, const std::vector<T> &x) { CHECK(cudaMemcpy(to, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice)); }
template <class T> void get(std::vector<T> &to, const T *x) { CHECK(cudaMemcpy(to.data(), x, to.size() * sizeof(T), cudaMemcpyDeviceToHost)); }
template <class T> void zero(T *p, size_t n) { CHECK(cudaMemset(p, 0, n * sizeof(T))); }
#define LAUNCH(kernel, grid, threads, shared, ...) do { kernel<<<grid, threads, shared>>>(__VA_ARGS__); CHECK(cudaGetLastError()); } while (0)
__global__ void noise(u32 *x, size_t pairs, u32 seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < pairs; i += (size_t)gridDim.x * blockDim.x) {
        u32 h = (u32)(i ^ i >> 32) * 2654435761u ^ seed;
        float z[2];
        for (int e = 0; e < 2; e++) {
            float sum = 0;
            for (int k = 0; k < 4; k++) { h ^= h << 13; h ^= h >> 17; h ^= h << 5; h *= 2246822519u; h ^= h >> 15; sum += (h >> 8) * (1.0f / 16777216) - 0.5f; }
            z[e] = sum * 1.7320508f;
        }
        if (IN_TYPE == F32) ((float *)x)[2 * i] = z[0], ((float *)x)[2 * i + 1] = z[1];
        else x[i] = IN_TYPE == BF16 ? bf16_pair(z[0], z[1]) : f16_pair(z[0], z[1]);
    }
}
#endif

static double widen(u16 x, int type) {
    if ((x & (type == BF16 ? 0x7f80 : 0x7c00)) == (type == BF16 ? 0x7f80 : 0x7c00)) return 0;
    if (type == BF16) { u32 u = (u32)x << 16; float f; memcpy(&f, &u, 4); return f; }
    int e = x >> 10 & 31; double m = x & 1023;
    double v = e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
    return x & 0x8000 ? -v : v;
}
static u16 narrow(double x, int type) {
    if (type == BF16) { float f = x; u32 u; memcpy(&u, &f, 4); return (u + 0x7fff + (u >> 16 & 1)) >> 16; }
    // By search over the neighbours of a guess.
    u16 s = x < 0 ? 0x8000 : 0; double a = fabs(x); u16 low = 0, high = 0x7bff;
    while (low < high) { u16 mid = (low + high) / 2; if (widen(mid, F16) < a) low = mid + 1; else high = mid; }
    if (low && a - widen(low - 1, F16) <= widen(low, F16) - a) low--;
    return s | low;
}
static double widen(float x, int) { return std::isfinite(x) ? x : 0; }
static Element element_of(double x) { return IN_TYPE == F32 ? (Element)x : (Element)narrow(x, IN_TYPE); }
static Element not_finite_at(size_t i) {
    if (IN_TYPE == F32) return (Element)(i % 3 ? NAN : INFINITY);
    return (Element)((IN_TYPE == BF16 ? 0x7f80 : 0x7c00) | (i % 3 ? 0x8001 : 0));
}
static double error(const V &got, const V &want) {
    double d = 0, n = 0;
    for (size_t i = 0; i < want.size(); i++) { d += (got[i] - want[i]) * (got[i] - want[i]); n += want[i] * want[i]; if (got[i] != got[i]) return NAN; }
    return sqrt(d / std::max(n, 1e-300));
}

// Sums as shaders/cuda/race/state.cuh keeps them.
static void put_sums(float *to, const V &sums) {
    std::vector<float> parts(2 * sums.size());
    for (size_t i = 0; i < sums.size(); i++) {
        size_t at = i / STATE_PLANE * STATE_UNIT + i % STATE_PLANE;
        parts[at] = sums[i];
        parts[at + STATE_PLANE] = sums[i] - parts[at];
    }
    put(to, parts);
}
static void get_sums(V &to, const float *from) {
    std::vector<float> parts(2 * to.size());
    get(parts, from);
    for (size_t i = 0; i < to.size(); i++) {
        size_t at = i / STATE_PLANE * STATE_UNIT + i % STATE_PLANE;
        to[i] = (double)parts[at] + parts[at + STATE_PLANE];
    }
}

struct Run {
    int batch, tokens, kv_heads, span;
    float beta;
    std::vector<u32> lengths;
    struct : Walk {
        const void *q, *k, *v, *grad_o;
        void *o, *dq, *dk, *dv;
        const float *planes;
        const u32 *lengths;
        float *matrices, *of_queries, *after, *shares, *bits, *query_bits;
        float2 *readings;
    } w{};
    float *state, *gradient;
    double *totals;
    float2 *heads;
    u32 q_heads() const { return kv_heads * GROUP; }
    u32 spans() const { return (tokens + span - 1) / span; }
    size_t unit() const { return (size_t)BUCKETS * COLUMNS; }
    float centre() const { double s = 2 / (1 + exp(2 * beta)); return pow(s, PLANES) >= 1.0 / 64 ? 1 : 0; }

    void allocate() {
        size_t q = (size_t)batch * tokens * q_heads(), k = (size_t)batch * tokens * kv_heads;
        w.q = make<Element>(q * HEAD_DIM); w.k = make<Element>(k * HEAD_DIM); w.v = make<Element>(k * VALUE_DIM); w.grad_o = make<Element>(q * VALUE_DIM);
        w.q_head = w.k_head = HEAD_DIM; w.v_head = w.g_head = VALUE_DIM;
        w.q_token = q_heads() * HEAD_DIM; w.k_token = kv_heads * HEAD_DIM; w.v_token = kv_heads * VALUE_DIM; w.g_token = q_heads() * VALUE_DIM;
        w.q_batch = w.q_token * tokens; w.k_batch = w.k_token * tokens; w.v_batch = w.v_token * tokens; w.g_batch = w.g_token * tokens;
        w.o = make<float>(q * VALUE_DIM / (OUT_TYPE == F32 ? 1 : 2) + 64);
        w.dq = make<Gradient>(q * HEAD_DIM); w.dk = make<Gradient>(k * HEAD_DIM); w.dv = make<Gradient>(k * VALUE_DIM);
        w.planes = make<float>(BITS * HEAD_DIM); w.planes_stride = 0;
        heads = make<float2>(kv_heads);
        w.lengths = make<u32>(batch);
        size_t m = (size_t)batch * spans() * MATRIX;
        w.matrices = make<float>(m * kv_heads); w.of_queries = make<float>(m * q_heads()); w.after = make<float>(m * kv_heads);
        w.readings = make<float2>(q);
        w.bits = make<float>((size_t)batch * spans() * (span * BITS + 1) * kv_heads); w.query_bits = make<float>((size_t)batch * spans() * (span * BITS + 1) * q_heads());
        w.shares = make<float>((size_t)batch * spans() * q_heads() * BITS * (HEAD_DIM + 1));
        w.batch = batch; w.tokens = tokens; w.q_heads = q_heads(); w.kv_heads = kv_heads; w.span = span; w.spans = spans();
        state = make<float>(2 * batch * kv_heads * unit()); gradient = make<float>(2 * batch * kv_heads * unit());
        totals = make<double>(BITS * (HEAD_DIM + 1));
        float2 h = {beta, centre()};
        put(heads, std::vector<float2>(kv_heads, h));
        put((u32 *)w.lengths, lengths);
        zero(state, 2 * batch * kv_heads * unit()); zero(gradient, 2 * batch * kv_heads * unit()); zero(totals, BITS * (HEAD_DIM + 1));
    }
    void free_all() {
        for (const void *p : {w.q, w.k, w.v, w.grad_o, (const void *)w.o, (const void *)w.dq, (const void *)w.dk, (const void *)w.dv, (const void *)w.planes, (const void *)heads, (const void *)w.lengths, (const void *)w.matrices, (const void *)w.of_queries, (const void *)w.after, (const void *)w.readings, (const void *)w.shares, (const void *)w.bits, (const void *)w.query_bits, (const void *)state, (const void *)gradient, (const void *)totals}) drop((void *)p);
    }
#ifdef ANY_SHAPE
    Piece piece() {
        Piece p{};
        p.batch = batch; p.tokens = tokens; p.heads = kv_heads; p.chunks = (tokens + CHUNK - 1) / CHUNK; p.slots = p.chunks; p.scale = SCALE; p.share = 100; p.flags = 2;
        return p;
    }
    Piece x(Piece p, int h, int d) { p.x_head = d; p.x_token = h * d; p.x_batch = (i64)tokens * p.x_token; return p; }
    Piece y(Piece p, int h, int d) { p.y_head = d; p.y_token = h * d; p.y_batch = (i64)tokens * p.y_token; return p; }
    Piece out(Piece p, int h, int d) { p.out_token = h * d; p.out_batch = (i64)tokens * p.out_token; return p; }
    static u32 blocks(size_t n) { return (n + BLOCK - 1) / BLOCK; }
    float *tq, *tk, *aq, *ak, *m, *products, *gains, *values, *masses, *stats, *wk;
    float2 *du;
    void scratch() {
        size_t rows = (size_t)batch * tokens * kv_heads, c = piece().chunks;
        tq = make<float>(rows * GROUP * BITS); tk = make<float>(rows * BITS); aq = make<float>(rows * GROUP * BUCKETS); ak = make<float>(rows * BUCKETS);
        m = make<float>(batch * kv_heads * c * MATRIX); products = make<float>(rows * GROUP * CHUNK); gains = make<float>(rows * GROUP * CHUNK);
        values = make<float>(rows * GROUP * (BUCKETS + 1)); masses = make<float>(rows * GROUP * (BUCKETS + 1)); stats = make<float>(rows * GROUP * STATISTICS);
        wk = make<float>(rows * BUCKETS); du = make<float2>(rows * GROUP * BITS);
    }
    u32 chunks(u32 parts) { return batch * kv_heads * piece().chunks * parts; }
    size_t rows() { return (size_t)batch * tokens * kv_heads; }
    void hashes() {
        Piece p = piece();
        LAUNCH(any_hash, chunks(TABLE_TILES), BLOCK, 0, x(p, kv_heads, HEAD_DIM), w.k, w.planes, heads, w.lengths, tk, ak);
        LAUNCH(any_hash_q, chunks(GROUP * TABLE_TILES), BLOCK, 0, x(p, q_heads(), HEAD_DIM), w.q, w.planes, heads, w.lengths, tq, aq);
    }
    void scan_any(bool back, bool keep) {
        u32 c = piece().chunks, groups = (c + GROUP_CHUNKS - 1) / GROUP_CHUNKS;
        // Now and then in groups, as long calls are.
        bool grouped = c > 2;
        Groups g = {(u32)(batch * kv_heads), c, groups, 0};
        float *all = m, *m = grouped ? make<float>((size_t)batch * kv_heads * groups * MATRIX) : all;
        u32 of_groups = blocks((size_t)batch * kv_heads * groups * MATRIX);
        if (grouped) LAUNCH(any_group_totals, of_groups, BLOCK, 0, g, all, m);
        c = grouped ? groups : c;
        Scan s = {(i64)(kv_heads * unit()), (i64)unit(), c, c, 1, (u32)kv_heads, keep};
        ScanAgain t = {s.state_batch, s.state_head, c, c, 1, (u32)kv_heads, keep};
        if (back) LAUNCH(race_scan_back, batch * kv_heads * ((COLUMNS + 7) / 8), SCAN_THREADS, 0, t, m, m, heads, gradient);
        else LAUNCH(race_scan, batch * kv_heads * ((COLUMNS + 7) / 8), SCAN_THREADS, 0, s, m, m, heads, state);
        if (!grouped) return;
        if (back) LAUNCH(any_group_prefix_back, of_groups, BLOCK, 0, g, m, all);
        else LAUNCH(any_group_prefix, of_groups, BLOCK, 0, g, m, all);
    }
    void sums(bool keep) {
        scratch();
        hashes();
        LAUNCH(any_chunk_sums, chunks(tiles_of(BUCKETS + 1, MOST_ROWS) * tiles_of(VALUE_DIM, MOST_COLUMNS)), BLOCK, 0, x(piece(), kv_heads, VALUE_DIM), w.v, ak, w.lengths, m);
        scan_any(false, keep);
    }
    void forward() {
        LAUNCH(any_read_weights, chunks(GROUP), BLOCK, 0, piece(), ak, m, heads, w.lengths, aq, stats);
        LAUNCH(any_products, chunks(GROUP), BLOCK, 0, piece(), aq, ak, stats, w.lengths, products);
        LAUNCH(any_output, chunks(GROUP * tiles_of(VALUE_DIM, MOST_COLUMNS)), BLOCK, 0, out(x(piece(), kv_heads, VALUE_DIM), q_heads(), VALUE_DIM), w.v, aq, products, stats, m, heads, w.lengths, nullptr, w.o);
    }
    // All tokens one by one.
    void steps() {
        u32 *ones = make<u32>(batch);
        float *records = make<float>((size_t)batch * kv_heads * RECORD);
        zero(records, (size_t)batch * kv_heads * RECORD);
        put(ones, std::vector<u32>(batch, 1));
        size_t row = (size_t)q_heads() * VALUE_DIM;
        float *o = make<float>(batch * row);
        for (int i = 0; i < tokens; i++) {
            Step s = {w.q_batch, HEAD_DIM, w.k_batch, HEAD_DIM, w.v_batch, VALUE_DIM, 0, (u32)kv_heads, 1.0f / TABLES};
#ifdef RATIO
            s.scale = 1;
#endif
            LAUNCH(any_step, batch * kv_heads * CHANNEL_BLOCKS, BLOCK, 0, s, (Element *)w.q + i * w.q_token, (Element *)w.k + i * w.k_token, (Element *)w.v + i * w.v_token, w.planes, heads, ones, state, records, o);
            std::vector<float> got(batch * row);
            get(got, o);
            for (int b = 0; b < batch; b++) put((float *)w.o + ((size_t)b * tokens + i) * row, std::vector<float>(&got[b * row], &got[b * row] + row));
        }
        LAUNCH(any_fold, batch * kv_heads, BLOCK, 0, state, records);
    }
    void unhash(bool q) {
        Piece p = x(piece(), q ? q_heads() : kv_heads, HEAD_DIM);
        p.flags = 0;
        size_t n = rows() * (q ? GROUP : 1), shares = (size_t)batch * ((tokens + p.share - 1) / p.share);
        w.shares = make<float>(shares * kv_heads * BITS * (HEAD_DIM + 1));
        if (q) {
            LAUNCH(any_through_hash_q, blocks(n * BITS), BLOCK, 0, p, values, tq, heads, du);
            LAUNCH(any_hash_inputs_q, chunks(GROUP * tiles_of(HEAD_DIM, MOST_COLUMNS)), BLOCK, 0, out(p, q_heads(), HEAD_DIM), du, w.planes, w.lengths, (float *)w.dq);
            LAUNCH(any_hash_parameters_q, shares * kv_heads * tiles_of(BITS, MOST_ROWS) * tiles_of(HEAD_DIM, MOST_COLUMNS), BLOCK, 0, p, w.q, du, w.lengths, w.shares);
        } else {
            LAUNCH(any_through_hash, blocks(n * BITS), BLOCK, 0, p, wk, tk, heads, du);
            LAUNCH(any_hash_inputs, chunks(tiles_of(HEAD_DIM, MOST_COLUMNS)), BLOCK, 0, out(p, kv_heads, HEAD_DIM), du, w.planes, w.lengths, (float *)w.dk);
            LAUNCH(any_hash_parameters, shares * kv_heads * tiles_of(BITS, MOST_ROWS) * tiles_of(HEAD_DIM, MOST_COLUMNS), BLOCK, 0, p, w.k, du, w.lengths, w.shares);
        }
        Shares s = {(u32)shares, (u32)kv_heads, (u32)kv_heads, (u32)(BITS * (HEAD_DIM + 1)), 0};
        LAUNCH(race_add_parameters, (s.elements + 31) / 32, 256, 0, s, w.shares, totals);
    }
    void backward() {
        sums(true);
        Piece p = piece(), g = x(p, q_heads(), VALUE_DIM), v = x(p, kv_heads, VALUE_DIM);
        p.flags = 0;
        LAUNCH(any_gains, chunks(GROUP), BLOCK, 0, y(g, kv_heads, VALUE_DIM), w.grad_o, w.v, w.lengths, gains);
        LAUNCH(any_values, chunks(GROUP * tiles_of(BUCKETS + 1, MOST_COLUMNS)), BLOCK, 0, g, w.grad_o, gains, ak, m, w.lengths, values);
        LAUNCH(any_query, chunks(GROUP), BLOCK, 0, p, ak, m, heads, w.lengths, values, aq, masses, stats);
        unhash(true);
        LAUNCH(any_query_sums, chunks(tiles_of(BUCKETS + 1, MOST_ROWS) * tiles_of(VALUE_DIM, MOST_COLUMNS)), BLOCK, 0, g, w.grad_o, aq, masses, stats, w.lengths, m);
        scan_any(true, false);
        LAUNCH(any_key, chunks(tiles_of(BUCKETS, MOST_COLUMNS)), BLOCK, 0, v, w.v, ak, gains, aq, masses, m, heads, w.lengths, wk);
        unhash(false);
        LAUNCH(any_products, chunks(GROUP), BLOCK, 0, p, aq, ak, stats, w.lengths, products);
        Piece of_v = out(g, kv_heads, VALUE_DIM);
        of_v.flags = 0;
        LAUNCH(any_value, chunks(tiles_of(VALUE_DIM, MOST_COLUMNS)), BLOCK, 0, of_v, w.grad_o, ak, products, m, w.lengths, (float *)w.dv);
    }
#else
    void sums(bool keep) { LAUNCH(race_sums, batch * spans() * kv_heads, THREADS, SUMS_SHARED, w, w.k, w.v, w.planes, heads, w.lengths, w.matrices, w.bits); scan(keep); }
    void scan(bool keep) {
        Scan s = {(i64)(kv_heads * unit()), (i64)unit(), spans(), spans(), 1, (u32)kv_heads, keep};
        LAUNCH(race_scan, batch * kv_heads * ((COLUMNS + 7) / 8), SCAN_THREADS, 0, s, w.matrices, w.matrices, heads, state);
    }
    void forward() { LAUNCH(race_forward, batch * spans() * q_heads(), THREADS, FORWARD_SHARED, w, w.q, w.v, w.planes, heads, w.lengths, w.matrices, w.bits, w.o); }
    void add(u32 h) {
        Shares s = {batch * spans(), h, h, (u32)(BITS * (HEAD_DIM + 1)), 0};
        LAUNCH(race_add_parameters, (s.elements + 31) / 32, 256, 0, s, w.shares, totals);
    }
    void query() { LAUNCH(race_backward_query, batch * spans() * q_heads(), THREADS, BACKWARD_SHARED, w, w.q, w.v, w.grad_o, w.planes, heads, w.lengths, w.matrices, w.bits, w.dq, w.of_queries, w.readings, w.query_bits, w.shares); }
    void scan_back() {
        ScanAgain s = {(i64)(kv_heads * unit()), (i64)unit(), spans(), spans(), GROUP, (u32)kv_heads, 0};
        LAUNCH(race_scan_back, batch * kv_heads * ((COLUMNS + 7) / 8), SCAN_THREADS, 0, s, w.of_queries, w.after, heads, gradient);
    }
    void key() { LAUNCH(race_backward_key, batch * spans() * kv_heads, THREADS, BACKWARD_SHARED, w, w.k, w.v, w.grad_o, w.planes, heads, w.lengths, w.after, w.readings, w.query_bits, w.bits, w.dk, w.dv, w.shares); }
    void backward() { sums(true); query(); add(q_heads()); scan_back(); key(); add(kv_heads); }
#endif
};

static bool check(int batch, int tokens, int kv_heads, int span, float beta, std::vector<u32> lengths, double offset, bool initial) {
    Run r{batch, tokens, kv_heads, span, beta, lengths};
    r.allocate();
    std::mt19937_64 random(tokens + span + kv_heads);
    std::normal_distribution<double> normal;
    int E = VALUE_DIM, D = HEAD_DIM, H = kv_heads, QH = H * GROUP;
    size_t nq = (size_t)batch * tokens * QH, nk = (size_t)batch * tokens * H;
    std::vector<Element> q(nq * D), k(nk * D), v(nk * E), g(nq * E);
    double near = 1 / sqrt((double)D) * 1.0;
    for (auto &x : q) x = element_of(normal(random) * near * 1.5);
    for (auto &x : k) x = element_of(normal(random) * near * 1.5);
    for (auto &x : v) x = element_of(normal(random) + offset);
    for (auto &x : g) x = element_of(normal(random));
    // Values that keys tell something of.
    for (size_t i = 0; i < nk; i++) for (int c = 0; c < std::min(D, E); c++) v[i * E + c] = element_of(widen(v[i * E + c], IN_TYPE) + 4 * widen(k[i * D + c], IN_TYPE));
    // NaN and infinities read as zero.
    for (auto *x : {&q, &k, &v, &g}) for (size_t i = 5; i < x->size(); i += 9973) (*x)[i] = not_finite_at(i);
    std::vector<float> w(BITS * D);
    for (auto &x : w) x = normal(random);
    V wd(w.begin(), w.end());
    put((Element *)r.w.q, q); put((Element *)r.w.k, k); put((Element *)r.w.v, v); put((Element *)r.w.grad_o, g); put((float *)r.w.planes, w);
    std::vector<double> state(batch * H * r.unit()), gradient(state.size());
    if (initial) for (size_t i = 0; i < state.size(); i++) {
        bool a = i % COLUMNS == VALUE_DIM;
        state[i] = a ? 3 + fabs(normal(random)) : normal(random) * 3 + 3 * offset;
        gradient[i] = normal(random) * 0.05;
    }
    put_sums(r.state, state); put_sums(r.gradient, gradient);
#if defined ANY_SHAPE && OUT_TYPE == F32
    bool stepped = true;
    for (u32 n : lengths) stepped &= n == (u32)tokens;
    if (stepped) { r.scratch(); r.steps(); } else
#endif
    { r.sums(false); r.forward(); }
    std::vector<double> final(state.size());
    get_sums(final, r.state);
    std::vector<u32> o32(nq * E / (OUT_TYPE == F32 ? 1 : 2));
    get(o32, (u32 *)r.w.o);
    put_sums(r.state, state);
    r.backward();
    std::vector<double> before(state.size()), kept(state.size()), totals(BITS * (D + 1));
    get_sums(before, r.gradient); get_sums(kept, r.state); get(totals, r.totals);
    std::vector<Gradient> dq(nq * D), dk(nk * D), dv(nk * E);
    get(dq, (Gradient *)r.w.dq); get(dk, (Gradient *)r.w.dk); get(dv, (Gradient *)r.w.dv);
    auto gradient_of = [&](Gradient x) { return sizeof(Gradient) == 4 ? (double)x : widen((u16)x, GRADIENT_TYPE); };
    auto out_at = [&](size_t i) {
        if (OUT_TYPE == F32) { float f; memcpy(&f, &o32[i], 4); return (double)f; }
        return widen((u16)(o32[i / 2] >> (16 * (i & 1))), OUT_TYPE);
    };
    V go, wo, gq, wq, gk, wk, gv, wv, ga, wa, gb, wb, gda, wda, gdb, wdb, gw(BITS * D), ww(BITS * D);
    double gbeta = 0, wbeta = 0;
    bool padding = true;
    for (int b = 0; b < batch; b++) for (int h = 0; h < H; h++) {
        int n = lengths[b];
        Problem p{TABLES, PLANES, D, E, n, GROUP, beta, wd.data()};
#if defined ANY_SHAPE && !defined RATIO
        p.share = 1.0 / TABLES;
#endif
        for (int j = 0; j < GROUP; j++) for (int i = 0; i < n; i++) {
            size_t at = ((size_t)b * tokens + i) * QH + h * GROUP + j;
            for (int c = 0; c < D; c++) p.q.push_back(widen(q[at * D + c], IN_TYPE)), gq.push_back(gradient_of(dq[at * D + c]));
            for (int c = 0; c < E; c++) p.g.push_back(widen(g[at * E + c], IN_TYPE)), go.push_back(out_at(at * E + c));
        }
        for (int i = 0; i < n; i++) {
            size_t at = ((size_t)b * tokens + i) * H + h;
            for (int c = 0; c < D; c++) p.k.push_back(widen(k[at * D + c], IN_TYPE)), gk.push_back(gradient_of(dk[at * D + c]));
            for (int c = 0; c < E; c++) p.v.push_back(widen(v[at * E + c], IN_TYPE)), gv.push_back(gradient_of(dv[at * E + c]));
        }
        for (int i = n; i < tokens; i++) {
            for (int j = 0; j < GROUP; j++) {
                size_t at = ((size_t)b * tokens + i) * QH + h * GROUP + j;
                for (int c = 0; c < D; c++) padding &= gradient_of(dq[at * D + c]) == 0;
                for (int c = 0; c < E; c++) padding &= out_at(at * E + c) == 0;
            }
            size_t at = ((size_t)b * tokens + i) * H + h;
            for (int c = 0; c < D; c++) padding &= gradient_of(dk[at * D + c]) == 0;
            for (int c = 0; c < E; c++) padding &= gradient_of(dv[at * E + c]) == 0;
        }
        size_t unit = ((size_t)b * H + h) * r.unit();
        for (int s = 0; s < BUCKETS; s++) {
            for (int c = 0; c < COLUMNS; c++) {
                size_t at = unit + s * COLUMNS + c;
                (c == E ? p.a0 : p.b0).push_back(state[at]);
                (c == E ? p.da : p.db).push_back(gradient[at]);
                (c == E ? ga : gb).push_back(final[at]);
                (c == E ? gda : gdb).push_back(before[at]);
                padding &= fabs(kept[at] - state[at]) <= 1e-14 * fabs(state[at]);
            }
        }
        Answer a = reference(p, true);
        auto join = [](V &to, const V &x) { to.insert(to.end(), x.begin(), x.end()); };
        join(wo, a.o); join(wq, a.dq); join(wk, a.dk); join(wv, a.dv); join(wa, a.a); join(wb, a.b); join(wda, a.da); join(wdb, a.db);
        for (int i = 0; i < BITS * D; i++) ww[i] += a.dw[i];
        wbeta += a.dbeta;
    }
    double scale = 0;
    for (int i = 0; i < BITS; i++) {
        for (int c = 0; c < D; c++) gw[i * D + c] = totals[i * (D + 1) + c], scale += ww[i * D + c] * ww[i * D + c];
        gbeta += totals[i * (D + 1) + D];
    }
    #ifdef ANY_SHAPE
    double wide = IN_TYPE == F32 ? 1.5e-3 : 1e-3, out_wide = OUT_TYPE == BF16 ? 2.5e-3 : OUT_TYPE == F16 ? 4e-4 : 0;
#else
    double wide = IN_TYPE == F32 ? 1.5e-3 : (IN_TYPE == F16 ? 4 : 1) * (TERMS == 1 ? 1 : 1.0 / 256), out_wide = OUT_TYPE == BF16 ? 2.5e-3 : OUT_TYPE == F16 ? 4e-4 : 0;
#endif
    double grad_wide = GRADIENT_TYPE == F32 ? 0 : 2.5e-3;
    struct { const char *name; double e, bound; } all[] = {
        {"o", error(go, wo), 2e-3 * wide + out_wide}, {"A", error(ga, wa), 1e-3 * wide}, {"B", error(gb, wb), 2e-3 * wide},
        {"dq", error(gq, wq), 2e-2 * wide + grad_wide}, {"dk", error(gk, wk), 2e-2 * wide + grad_wide}, {"dv", error(gv, wv), 4e-3 * wide + grad_wide},
        {"dW", error(gw, ww), 2e-2 * wide}, {"dbeta", fabs(gbeta - wbeta) / std::max(fabs(wbeta), 0.01 * sqrt(scale)), 5e-2 * wide},
        {"dA", error(gda, wda), 4e-3 * wide}, {"dB", error(gdb, wdb), 4e-3 * wide}};
    bool good = padding;
    std::string line;
    for (auto &x : all) {
        char text[64];
        bool ok = x.e <= x.bound;
        good &= ok;
        snprintf(text, sizeof text, " %s %.1e%s", x.name, x.e, ok ? "" : "!");
        line += text;
    }
    printf("%s b%d T%d h%dx%d span %d beta %.3f c %g%s:%s%s\n", good ? "ok " : "BAD", batch, tokens, H, GROUP, span, beta, r.centre(), initial ? " initial" : "", line.c_str(), padding ? "" : " PADDING");
    r.free_all();
    return good;
}

#if !defined ON_HOST && defined ANY_SHAPE
// Microseconds of a decode step, by replays of a graph of sixteen.
static void bench_step(int batch, int kv_heads) {
    Run r{batch, 1, kv_heads, 64, 1.0f, std::vector<u32>(batch, 1)};
    r.allocate();
    size_t rows = (size_t)batch * r.q_heads();
    for (auto x : {std::make_pair(r.w.q, rows * HEAD_DIM), std::make_pair(r.w.k, rows / GROUP * HEAD_DIM), std::make_pair(r.w.v, rows / GROUP * VALUE_DIM)})
        noise<<<256, 256>>>((u32 *)x.first, x.second / 2, 77);
    put((float *)r.w.planes, std::vector<float>(BITS * HEAD_DIM, 0.5f));
    float *records = make<float>((size_t)batch * kv_heads * RECORD);
    zero(records, (size_t)batch * kv_heads * RECORD);
    Step s = {r.w.q_batch, HEAD_DIM, r.w.k_batch, HEAD_DIM, r.w.v_batch, VALUE_DIM, 0, (u32)kv_heads, 1.0f};
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    // As many as wait, and are added at once.
    for (int i = 0; i < PENDING; i++)
        any_step<<<batch * kv_heads * CHANNEL_BLOCKS, BLOCK, 0, stream>>>(s, r.w.q, r.w.k, r.w.v, r.w.planes, r.heads, nullptr, r.state, records, r.w.o);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<float> all;
    cudaEvent_t a, b;
    CHECK(cudaEventCreate(&a)); CHECK(cudaEventCreate(&b));
    for (int i = 0; i < 25; i++) {
        CHECK(cudaEventRecord(a, stream)); CHECK(cudaGraphLaunch(exec, stream)); CHECK(cudaEventRecord(b, stream)); CHECK(cudaEventSynchronize(b));
        float ms; CHECK(cudaEventElapsedTime(&ms, a, b)); all.push_back(ms);
    }
    std::sort(all.begin(), all.end());
    printf("step (P,L)=(%d,%d) batch %d heads %dx%d: %.2f us\n", PLANES, TABLES, batch, kv_heads, GROUP, all[12] * 1000 / PENDING);
    r.free_all();
}
#endif
#if !defined ON_HOST && !defined ANY_SHAPE
template <class F> static float timed(F work, int runs) {
    cudaEvent_t a, b;
    CHECK(cudaEventCreate(&a)); CHECK(cudaEventCreate(&b));
    work();
    std::vector<float> all;
    for (int i = 0; i < runs; i++) {
        CHECK(cudaEventRecord(a)); work(); CHECK(cudaEventRecord(b)); CHECK(cudaEventSynchronize(b));
        float ms; CHECK(cudaEventElapsedTime(&ms, a, b)); all.push_back(ms);
    }
    std::sort(all.begin(), all.end());
    return all[all.size() / 2];
}
static void bench(int tokens, int kv_heads, int span, float beta, int runs) {
    Run r{1, tokens, kv_heads, span, beta, {(u32)tokens}};
    r.allocate();
    size_t q = (size_t)tokens * r.q_heads(), k = (size_t)tokens * kv_heads;
    u32 seed = 1;
    for (auto x : {std::make_pair(r.w.q, q * HEAD_DIM), std::make_pair(r.w.k, k * HEAD_DIM), std::make_pair(r.w.v, k * VALUE_DIM), std::make_pair(r.w.grad_o, q * VALUE_DIM)})
        noise<<<2048, 256>>>((u32 *)x.first, x.second / 2, seed++ * 7919);
    std::mt19937_64 random(1);
    std::normal_distribution<double> normal;
    std::vector<float> w(BITS * HEAD_DIM);
    for (auto &x : w) x = normal(random);
    put((float *)r.w.planes, w);
    CHECK(cudaDeviceSynchronize());
    double e = GRADIENT_TYPE == F32 ? 4 : 2, in = sizeof(Element), oe = OUT_TYPE == F32 ? 4 : 2;
    double nq = (double)q * HEAD_DIM, nk = (double)k * HEAD_DIM, nv = (double)k * VALUE_DIM, no = (double)q * VALUE_DIM;
    auto line = [&](const char *name, float ms, double bytes) { printf("  %-14s %8.3f ms  %6.2f GB  %5.0f GB/s\n", name, ms, bytes / 1e9, bytes / ms / 1e6); };
    printf("T %d heads %dx%d span %d beta %.2f c %g (P,L)=(%d,%d) in %d out %d grad %d terms %d\n", tokens, kv_heads, GROUP, span, beta, r.centre(), PLANES, TABLES, IN_TYPE, OUT_TYPE, GRADIENT_TYPE, TERMS);
    float s = timed([&] { LAUNCH(race_sums, r.spans() * kv_heads, THREADS, SUMS_SHARED, r.w, r.w.k, r.w.v, r.w.planes, r.heads, r.w.lengths, r.w.matrices, r.w.bits); }, runs);
    double tk = 4.0 * k * BITS, tq = 4.0 * q * BITS;
    line("sums", s, in * (nk + nv) + tk);
    float c = timed([&] { r.scan(true); }, runs);
    line("scan", c, 2.0 * r.spans() * kv_heads * MATRIX * 4);
    r.sums(true);
    float f = timed([&] { r.forward(); }, runs);
    line("forward", f, in * (nq + nv) + tk + oe * no);
    float bq = timed([&] { r.query(); }, runs);
    line("backward query", bq, in * (nq + nv + no) + tk + tq + e * nq);
    float a = timed([&] { r.add(r.q_heads()); }, runs);
    line("add", a, 4.0 * r.spans() * r.q_heads() * BITS * (HEAD_DIM + 1));
    float sb = timed([&] { r.scan_back(); }, runs);
    line("scan back", sb, 2.0 * r.spans() * kv_heads * MATRIX * 4);
    float bk = timed([&] { r.key(); }, runs);
    line("backward key", bk, in * (nk + nv + no) + tk + tq + e * (nk + nv));
    float all_f = timed([&] { r.sums(false); r.forward(); }, runs), all_b = timed([&] { r.backward(); }, runs);
    printf("  FORWARD %.3f  BACKWARD %.3f  BOTH %.3f ms\n", all_f, all_b, all_f + all_b);
    r.free_all();
}
static void prepare() {
    CHECK(cudaFuncSetAttribute(race_sums, cudaFuncAttributeMaxDynamicSharedMemorySize, SUMS_SHARED));
    CHECK(cudaFuncSetAttribute(race_forward, cudaFuncAttributeMaxDynamicSharedMemorySize, FORWARD_SHARED));
    CHECK(cudaFuncSetAttribute(race_backward_query, cudaFuncAttributeMaxDynamicSharedMemorySize, BACKWARD_SHARED));
    CHECK(cudaFuncSetAttribute(race_backward_key, cudaFuncAttributeMaxDynamicSharedMemorySize, BACKWARD_SHARED));
}
#endif

int main(int argc, char **argv) {
    bool good = true;
    setvbuf(stdout, nullptr, _IOLBF, 0);
    printf("(P,L)=(%d,%d) D %d Dv %d group %d in %d out %d grad %d terms %d; shared %d %d %d\n", PLANES, TABLES, HEAD_DIM, VALUE_DIM, GROUP, IN_TYPE, OUT_TYPE, GRADIENT_TYPE, TERMS, SUMS_SHARED, FORWARD_SHARED, BACKWARD_SHARED);
#ifdef ON_HOST
    int T = argc > 1 ? atoi(argv[1]) : 150;
    good &= check(1, T, 1, 64, 1.0f, {(u32)T}, 0, false);
    good &= check(2, T, 2, 128, 0.1f, {(u32)T / 3, (u32)T}, 1, true);
    good &= check(1, T, 1, 128, 4.0f, {(u32)T}, 0, true);
#else
#ifndef ANY_SHAPE
    prepare();
#endif
    if (getenv("LITTLE")) {
        good &= check(1, 200, 1, 128, 1.0f, {200}, 0, true);
        good &= check(2, 130, 1, 128, 0.0884f, {130, 70}, 0, true);
    } else if (!getenv("UNCHECKED")) {
        good &= check(1, 1000, 2, 256, 1.0f, {1000}, 0, false);
        good &= check(1, 1000, 2, 64, 0.0884f, {1000}, 2, false);
        good &= check(3, 500, 2, 128, 0.3f, {500, 0, 77}, 1, true);
        good &= check(1, 700, 1, 192, 4.0f, {700}, 0, true);
    }
#ifdef ANY_SHAPE
    if (argc > 1) bench_step(1, 32), bench_step(64, 32);
#else
    if (argc > 1) {
        int span = argc > 2 ? atoi(argv[2]) : 4096;
        int runs = argc > 3 ? atoi(argv[3]) : 5;
        bench(atoi(argv[1]), 4, span, 1.0f, runs);
        if (argc > 4) bench(atoi(argv[1]), 4, span, 0.0884f, runs);
    }
#endif
#endif
    printf("%s\n", good ? "ALL GOOD" : "FAILED");
    return !good;
}
