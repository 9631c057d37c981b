#!/usr/bin/env python3
"""What PyTorch has on an NVIDIA GPU, as a baseline for benches/socket.rs and benches/report.

    python3 benches/vendor_dense.py [--lengths 16384,131072] [--heads 32/8,32/32] [--head-dim 128] [--json FILE]

Dense decoding: one query token, batch 1, bf16, the cache read in place. Prints the median microseconds of a CUDA-graph
replay for each backend of scaled_dot_product_attention, the least of them, and the copy bandwidth. Where
flash-linear-attention is installed, its chunked linear attention too, with 64 features that are given, forward and both
ways. Every result is compared with attention in f32 before it is timed. Needs PyTorch 2.5 or later.
"""

import argparse
import json
import statistics
import time
import warnings

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
# Keys of the table of head dimensions.
HEAD_DIMS_KEYS = 131072


def median_seconds(run, samples=20):
    times = []
    for _ in range(samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def replay_seconds(calls):
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_seconds(graph.replay) / len(calls)


def attend(q, k, v, backend):
    grouped = q.shape[1] != k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def exact(q, k, v):
    """In f32, one kv head after the other: widened copies of a long cache would not fit."""
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(k.shape[1]):
        rows = q[:, head * group : (head + 1) * group].float()
        logits = rows @ k[:, head : head + 1].float().transpose(-1, -2) * q.shape[-1] ** -0.5
        heads.append(logits.softmax(-1) @ v[:, head : head + 1].float())
    return torch.cat(heads, dim=1)


def decode(q_heads, kv_heads, head_dim, length):
    """Seconds by backend."""
    shape = (1, kv_heads, length, head_dim)
    caches = max(1, min(16, CACHE_BYTES // (4 * length * kv_heads * head_dim)))
    make = lambda shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    keys, values = [make(shape) for _ in range(caches)], [make(shape) for _ in range(caches)]
    q = make((1, q_heads, 1, head_dim))
    truth = exact(q, keys[0], values[0])
    times = {}
    for name, backend in BACKENDS.items():
        try:
            error = (attend(q, keys[0], values[0], backend).float() - truth).norm() / truth.norm()
            if not error < 2e-2:
                print(f"{length} {name}: wrong by {error:.1e}, not timed")
                continue
            times[name] = replay_seconds([lambda k=k, v=v: attend(q, k, v, backend) for k, v in zip(keys, values)])
        except RuntimeError as error:
            print(f"{length} {name}: {str(error).splitlines()[0][:100]}")
            torch.cuda.synchronize()
    return times


def linear(length, heads=4, features=64, channels=128):
    """Seconds of flash-linear-attention, forward and both ways; raises ImportError where it is not installed."""
    from fla.ops.linear_attn import chunk_linear_attn

    make = lambda width: torch.rand(1, length, heads, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    q, k, v = make(features), make(features), make(channels)
    grad = torch.randn(1, length, heads, channels, device="cuda", dtype=torch.bfloat16)
    forward = lambda: chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]

    def both():
        q.grad = k.grad = v.grad = None
        forward().backward(grad)

    with torch.no_grad():
        row = (q[0, -1].float()[:, None] @ torch.einsum("thf,thc->hfc", k[0].float(), v[0].float()))[:, 0]
        error = (forward()[0, -1].float() - row).norm() / row.norm()
        if not error < 2e-2:
            raise RuntimeError(f"fla is wrong by {error:.1e}, not timed")
        times = {"forward": median_seconds(forward, 5)}
    both()
    return times | {"both": median_seconds(both, 5)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="16384,32768,65536,131072,262144,524288,1048576")
    parser.add_argument("--heads", default="32/8", help="query and key/value heads, as 32/8,32/32")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--head-dims", default="", help=f"others, at {HEAD_DIMS_KEYS} keys")
    parser.add_argument("--linear", default="", help="tokens of linear attention, as 65536,4194304")
    parser.add_argument("--seconds", type=float, default=600, help="nothing is begun after so many")
    parser.add_argument("--json", help="where every figure goes")
    arguments = parser.parse_args()
    start = time.monotonic()
    numbers = lambda text: [int(number) for number in text.split(",") if number]
    # Each backend says at length why it cannot run; that it cannot is printed.
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.manual_seed(0)
    device, software = torch.cuda.get_device_name(), f"PyTorch {torch.__version__}"
    print(device, software)
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    copy = 2 * x.numel() * 4 / replay_seconds([lambda: torch.mul(x, 1.0001, out=y)])
    print(f"copy {copy / 1e9:.0f} GB/s")
    del x, y
    records = []

    def keep(stage, heads, head_dim, tokens, times):
        for peer, seconds in times.items():
            one = dict(stage=stage, peer=peer, heads=heads, head_dim=head_dim, tokens=tokens, seconds=seconds)
            records.append(one)

    every_heads = [tuple(map(int, pair.split("/"))) for pair in arguments.heads.split(",")]
    cases = [(heads, arguments.head_dim, length) for length in numbers(arguments.lengths) for heads in every_heads]
    cases[3:3] = [(every_heads[0], dim, HEAD_DIMS_KEYS) for dim in numbers(arguments.head_dims)]
    for heads, head_dim, length in cases:
        if time.monotonic() - start > arguments.seconds:
            print(f"{length} keys: left out, the time is over")
            continue
        times = decode(*heads, head_dim, length)
        keep("decode", heads, head_dim, length, times)
        if times:
            least = min(times, key=times.get)
            listed = "  ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in times.items())
            shape = f"{heads[0]}/{heads[1]} heads, D = {head_dim}, {length} keys"
            print(f"{shape}: {listed}  least {times[least] * 1e6:.1f} us ({least})")
    for length in numbers(arguments.linear):
        if time.monotonic() - start > arguments.seconds:
            break
        try:
            for stage, seconds in linear(length).items():
                keep(stage, (4, 4), 128, length, {"fla": seconds})
                print(f"fla, {length} tokens, {stage}: {seconds * 1e3:.2f} ms")
        except (ImportError, RuntimeError) as error:
            print(f"fla: {str(error).splitlines()[0][:100]}")
            break
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(dict(device=device, software=software, copy_bytes_per_second=copy, records=records), file, indent=1)


if __name__ == "__main__":
    main()
