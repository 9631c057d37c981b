// Runs kernels on the host, thread by thread as coroutines: for checking what they compute where there is no GPU. A
// collective instruction is carried out by the last lane to arrive.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>
#define EMULATED
#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;
static unsigned char emulated_shared[256 << 10] __attribute__((aligned(1024)));
#define SHARED_BYTES unsigned char *shared_bytes = emulated_shared

struct Lane { void *out; const void *a, *b, *c; };
struct Emulator {
    ucontext_t main;
    std::vector<ucontext_t> fibers;
    std::vector<std::vector<char>> stacks;
    std::vector<bool> done;
    std::vector<unsigned> warp_count, warp_turn;
    std::vector<Lane> lanes;
    unsigned block_count = 0, block_turn = 0, threads = 0, current = 0;
    std::function<void()> body;
};
static Emulator emulator;
static void next_fiber() {
    Emulator &e = emulator;
    unsigned from = e.current;
    swapcontext(&e.fibers[from], &e.main);
    threadIdx.x = e.current;
}
static void fiber_main() {
    emulator.body();
    emulator.done[emulator.current] = true;
    swapcontext(&emulator.fibers[emulator.current], &emulator.main);
}
static void launch(unsigned grid, unsigned threads, std::function<void()> body) {
    Emulator &e = emulator;
    e.body = body;
    e.threads = threads;
    e.fibers.resize(threads);
    e.stacks.resize(threads);
    e.lanes.resize(threads);
    blockDim.x = threads;
    gridDim.x = grid;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
        // Shared memory begins as garbage.
        memset(emulated_shared, 0xff, sizeof emulated_shared);
        e.done.assign(threads, false);
        e.warp_count.assign(threads / 32, 0);
        e.warp_turn.assign(threads / 32, 0);
        e.block_count = e.block_turn = 0;
        for (unsigned i = 0; i < threads; i++) {
            e.stacks[i].resize(128 << 10);
            getcontext(&e.fibers[i]);
            e.fibers[i].uc_stack.ss_sp = e.stacks[i].data();
            e.fibers[i].uc_stack.ss_size = e.stacks[i].size();
            e.fibers[i].uc_link = nullptr;
            makecontext(&e.fibers[i], fiber_main, 0);
        }
        unsigned left = threads;
        while (left) {
            left = 0;
            for (unsigned i = 0; i < threads; i++) {
                if (e.done[i]) continue;
                e.current = i;
                threadIdx.x = i;
                swapcontext(&e.main, &e.fibers[i]);
                if (!e.done[i]) left++;
            }
        }
    }
}
static void barrier() {
    Emulator &e = emulator;
    unsigned turn = e.block_turn;
    if (++e.block_count == e.threads) {
        e.block_count = 0;
        e.block_turn++;
        return;
    }
    while (e.block_turn == turn) next_fiber();
}
static bool barrier_or(bool x) {
    static bool any, all_any;
    Emulator &e = emulator;
    if (e.block_count == 0) any = false;
    any |= x;
    if (e.block_count + 1 == e.threads) all_any = any;
    barrier();
    return all_any;
}
static int warp_index() { return threadIdx.x / 32; }
template <class F> static void collective(Lane lane, F work) {
    Emulator &e = emulator;
    unsigned warp = threadIdx.x / 32, turn = e.warp_turn[warp];
    e.lanes[threadIdx.x] = lane;
    if (++e.warp_count[warp] == 32) {
        work(&e.lanes[warp * 32]);
        e.warp_count[warp] = 0;
        e.warp_turn[warp]++;
        return;
    }
    while (e.warp_turn[warp] == turn) next_fiber();
}
static void warp_barrier() { collective({}, [](Lane *) {}); }
static bool any_of_warp(bool x) {
    bool out;
    collective({&out, &x, nullptr, nullptr}, [](Lane *l) {
        bool any = false;
        for (int lane = 0; lane < 32; lane++) any |= *(const bool *)l[lane].a;
        for (int lane = 0; lane < 32; lane++) *(bool *)l[lane].out = any;
    });
    return out;
}
static inline float float_of(unsigned x) { float f; memcpy(&f, &x, 4); return f; }
static inline unsigned bits_of(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static inline double inverse(double x) { return 1 / x; }
static inline float bf16_float(unsigned short x) { return float_of((unsigned)x << 16); }
static void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    unsigned b[2] = {b0, b1};
    collective({d, a, b, nullptr}, [](Lane *l) {
        float A[16][16], B[16][8];
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4;
            const unsigned *a = (const unsigned *)l[lane].a, *b = (const unsigned *)l[lane].b;
            for (int i = 0; i < 4; i++) {
                for (int h = 0; h < 2; h++) A[g + (i & 1) * 8][2 * t + h + (i >> 1) * 8] = bf16_float(a[i] >> (16 * h));
            }
            for (int i = 0; i < 2; i++) {
                for (int h = 0; h < 2; h++) B[2 * t + h + i * 8][g] = bf16_float(b[i] >> (16 * h));
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            float *d = (float *)l[lane].out;
            for (int i = 0; i < 4; i++) {
                int r = lane / 4 + (i >> 1) * 8, c = lane % 4 * 2 + (i & 1);
                float sum = d[i];
                for (int k = 0; k < 16; k++) sum += A[r][k] * B[k][c];
                d[i] = sum;
            }
        }
    });
}
// What the tensor cores make of an exact sum: bits that a float has no room for are cut off.
static float cut_off(double x) {
    float f = x;
    return std::fabs((double)f) > std::fabs(x) ? nextafterf(f, 0.0f) : f;
}
static void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    collective({d, a, b, nullptr}, [](Lane *l) {
        float A[16][8], B[8][8];
        for (int lane = 0; lane < 32; lane++) {
            const unsigned *a = (const unsigned *)l[lane].a, *b = (const unsigned *)l[lane].b;
            for (int i = 0; i < 4; i++) A[lane / 4 + (i & 1) * 8][lane % 4 + (i >> 1) * 4] = float_of(a[i] & 0xffffe000);
            for (int i = 0; i < 2; i++) B[lane % 4 + i * 4][lane / 4] = float_of(b[i] & 0xffffe000);
        }
        for (int lane = 0; lane < 32; lane++) {
            float *d = (float *)l[lane].out;
            for (int i = 0; i < 4; i++) {
                int r = lane / 4 + (i >> 1) * 8, c = lane % 4 * 2 + (i & 1);
                double sum = d[i];
                for (int k = 0; k < 8; k++) sum += (double)A[r][k] * B[k][c];
                d[i] = cut_off(sum);
            }
        }
    });
}
template <bool TURNED> static void matrices(unsigned (&r)[4], const void *row) {
    collective({r, row, nullptr, nullptr}, [](Lane *l) {
        for (int lane = 0; lane < 32; lane++) {
            for (int m = 0; m < 4; m++) {
                unsigned x = 0;
                for (int h = 0; h < 2; h++) {
                    int rr = TURNED ? lane % 4 * 2 + h : lane / 4, cc = TURNED ? lane / 4 : lane % 4 * 2 + h;
                    x |= (unsigned)((const unsigned short *)l[m * 8 + rr].a)[cc] << (16 * h);
                }
                ((unsigned *)l[lane].out)[m] = x;
            }
        }
    });
}
static void load_matrices(unsigned (&r)[4], const void *base, unsigned at) {
    const char *row = (const char *)base + at;
    if ((uintptr_t)row % 16) abort();
    matrices<false>(r, row);
}
static void load_matrices_turned(unsigned (&r)[4], const void *base, unsigned at) {
    const char *row = (const char *)base + at;
    if ((uintptr_t)row % 16) abort();
    matrices<true>(r, row);
}
static void copy_16(void *to, const void *from, unsigned bytes) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) abort();
    memset(to, 0, 16);
    memcpy(to, from, bytes);
}
template <int SIZE> static void copy_few(void *to, const void *from, unsigned bytes) {
    if ((uintptr_t)to % SIZE || (uintptr_t)from % SIZE) abort();
    memset(to, 0, SIZE);
    memcpy(to, from, bytes);
}
static void copies_done() {}
static void copies_commit() {}
template <int LEFT> static void copies_wait() {}
static void prefetch(const void *) {}
template <class T> static T from_lane(T x, unsigned mask) {
    T out;
    collective({&out, &x, nullptr, nullptr}, [mask](Lane *l) {
        for (unsigned lane = 0; lane < 32; lane++) memcpy(l[lane].out, l[lane ^ mask].a, sizeof(T));
    });
    return out;
}
static float of_lane(float x, unsigned from) {
    float out;
    collective({&out, &x, nullptr, nullptr}, [from](Lane *l) {
        for (unsigned lane = 0; lane < 32; lane++) memcpy(l[lane].out, l[from].a, sizeof(float));
    });
    return out;
}
static inline unsigned short bf16_of(float x) {
    unsigned u = bits_of(x);
    if ((u & 0x7fffffff) > 0x7f800000) return (u >> 16) | 64;
    return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
static unsigned bf16_pair(float low, float high) { return bf16_of(low) | (unsigned)bf16_of(high) << 16; }
static unsigned f16_pair(float low, float high) {
    _Float16 a = low, b = high;
    unsigned short x, y;
    memcpy(&x, &a, 2);
    memcpy(&y, &b, 2);
    return x | (unsigned)y << 16;
}
static float2 f16_floats(unsigned pair) {
    unsigned short x = pair, y = pair >> 16;
    _Float16 a, b;
    memcpy(&a, &x, 2);
    memcpy(&b, &y, 2);
    return {(float)a, (float)b};
}
static float exp2_fast(float x) { return exp2f(x); }
static unsigned count_up(unsigned *counter) { return (*counter)++; }
static int opaque(int x) { return x; }
static float quotient(float x, float y) { return x / y; }
template <int TYPE> static unsigned larger_sizes(unsigned a, unsigned b) {
    if (TYPE == 0) return a > (b & 0x7fffffff) ? a : b & 0x7fffffff;
    unsigned r = 0;
    // As integers: among sizes NaN is the largest.
    for (int h = 0; h < 32; h += 16) {
        unsigned x = a >> h & 0x7fff, y = b >> h & 0x7fff;
        r |= (x > y ? x : y) << h;
    }
    return r;
}
