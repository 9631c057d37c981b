// Copies of whole runs of bytes to shared memory, which the hardware does by itself, and barriers that count them: from
// compute capability 9.0 on.
#pragma once
#include "ptx.cuh"

typedef u64 Barrier;

__device__ __forceinline__ void barrier_init(Barrier* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes barriers that were set up known to copies; before a __syncthreads().
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and lets the barrier wait for `bytes` of copies too.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits for the end of the phase that has this parity; phases count from 0.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, u32 parity) {
    u32 at = shared_address(barrier), done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(at), "r"(parity) : "memory");
    } while (!done);
}

// Puts copies that start later after what was written here.
__device__ __forceinline__ void copies_follow() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Bytes of the shared memory that the launch asked for.
__device__ __forceinline__ u32 dynamic_shared() {
    u32 bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
}

// Starts to copy `bytes`, whole 16, at addresses that are whole 16; fast only where `to` is a whole 128. To racecheck this is
// a write of the lane that starts it, which no barrier puts in order: it reports the reads of other warps, rightly ordered.
__device__ __forceinline__ void copy_bulk(u32 to, u64 from, u32 bytes, Barrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
