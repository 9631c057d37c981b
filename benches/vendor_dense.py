#!/usr/bin/env python3
"""Dense decoding by PyTorch's own kernels on an NVIDIA GPU, as a baseline for benches/socket.rs.

    python3 benches/vendor_dense.py [--lengths 16384,131072] [--q-heads 32] [--kv-heads 8] [--head-dim 128]

One query token, batch 1, bf16, the cache read in place. Prints the median microseconds of a CUDA-graph replay for each
backend of scaled_dot_product_attention, the least of them, and the copy bandwidth. Every result is compared with
attention in f32 before it is timed. Needs PyTorch 2.5 or later.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Replays read several caches in turn, so that none of them stays in the L2 cache.
CACHE_BYTES = 512 << 20


def replay_microseconds(calls):
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    samples = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(samples)


def attend(q, k, v, backend):
    grouped = q.shape[1] != k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="16384,32768,65536,131072,262144,524288,1048576")
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    copy = replay_microseconds([lambda: torch.mul(x, 1.0001, out=y)])
    print(f"copy {2 * x.numel() * 4 / copy / 1e3:.0f} GB/s")
    del x, y
    for length in map(int, arguments.lengths.split(",")):
        shape = (1, arguments.kv_heads, length, arguments.head_dim)
        bytes_of_one = 4 * length * arguments.kv_heads * arguments.head_dim
        caches = max(1, min(16, CACHE_BYTES // bytes_of_one))
        make = lambda shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        keys, values = [make(shape) for _ in range(caches)], [make(shape) for _ in range(caches)]
        q = make((1, arguments.q_heads, 1, arguments.head_dim))
        repeats = arguments.q_heads // arguments.kv_heads
        wide = lambda x: x.float().repeat_interleave(repeats, dim=1)
        logits = q.float() @ wide(keys[0]).transpose(-1, -2) * arguments.head_dim**-0.5
        truth = logits.softmax(-1) @ wide(values[0])
        del logits
        times = {}
        for name, backend in BACKENDS.items():
            try:
                error = (attend(q, keys[0], values[0], backend).float() - truth).norm() / truth.norm()
                if not error < 2e-2:
                    print(f"{length} {name}: wrong by {error:.1e}, not timed")
                    continue
                calls = [lambda k=k, v=v: attend(q, k, v, backend) for k, v in zip(keys, values)]
                times[name] = replay_microseconds(calls)
            except RuntimeError as error:
                print(f"{length} {name}: {str(error).splitlines()[0][:100]}")
                torch.cuda.synchronize()
        if times:
            least = min(times, key=times.get)
            listed = "  ".join(f"{name} {time:.1f}" for name, time in times.items())
            print(f"{length} keys: {listed}  least {times[least]:.1f} us ({least})")


if __name__ == "__main__":
    main()
