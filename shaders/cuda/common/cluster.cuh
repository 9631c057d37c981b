// Blocks of a cluster: they run at once, wait for each other, and read each other's shared memory (from 9.0 on).
#pragma once
#include "ptx.cuh"

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// What a thread wrote before it arrives, any thread of the cluster sees once it has waited.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_barrier() {
    cluster_arrive();
    cluster_wait();
}

// The place in block `rank` of what this block has at `pointer` in shared memory.
__device__ __forceinline__ u32 remote_address(const void* pointer, u32 rank) {
    u32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
    return address;
}
__device__ __forceinline__ u32 remote_u32(const void* pointer, u32 rank) {
    u32 value;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(remote_address(pointer, rank)) : "memory");
    return value;
}
__device__ __forceinline__ float remote_float(const void* pointer, u32 rank) { return bits_float(remote_u32(pointer, rank)); }
__device__ __forceinline__ uint2 remote_uint2(const void* pointer, u32 rank) {
    uint2 v;
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(remote_address(pointer, rank)) : "memory");
    return v;
}
__device__ __forceinline__ uint4 remote_uint4(const void* pointer, u32 rank) {
    uint4 v;
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(remote_address(pointer, rank)) : "memory");
    return v;
}
#endif
