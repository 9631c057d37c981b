#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::kernels::{Kernel, Key};
use super::merge::MergeKey;
use super::plan::Sizes;
use crate::engine::cuda::KernelKey;
use crate::socket::config::{CacheShape, Scoring, SelectionScope, SocketConfig};
use crate::socket::plan::Geometry;
use crate::socket::problem::CacheSpec;
use crate::tensor::DType;

/// Shared memory and multiprocessors of an H200.
fn sizes(config: SocketConfig, shape: CacheShape, page_tokens: usize) -> Sizes {
    let g = Geometry::new(&CacheSpec { config, shape, page_tokens });
    Sizes { g, shared: 227 << 10, multiprocessors: 132 }
}

/// Every kernel of this room, for the table of resources.
pub(crate) fn test_keys() -> Vec<Box<dyn KernelKey>> {
    let dtypes = [DType::F32, DType::F16, DType::Bf16];
    let merges = dtypes.iter().flat_map(|&o1| dtypes.map(|o2| MergeKey { o1, o2 }));
    let mut keys: Vec<Box<dyn KernelKey>> = merges.map(|key| Box::new(key) as Box<dyn KernelKey>).collect();
    let shape = |num_q_heads, num_kv_heads, dim, dtype| CacheShape {
        num_q_heads,
        num_kv_heads,
        head_dim: dim,
        value_dim: dim,
        dtype,
    };
    let paper = SocketConfig::paper();
    let fast = SocketConfig::fast();
    let group = |config: &SocketConfig| SocketConfig { scope: SelectionScope::PerGroup, ..config.clone() };
    let other = |scoring, tables, planes| SocketConfig { scoring, tables, planes, ..SocketConfig::paper() };
    let bf16 = DType::Bf16;
    let cases = [
        (paper.clone(), shape(32, 8, 128, bf16), bf16, bf16),
        (paper.clone(), shape(32, 32, 128, bf16), bf16, bf16),
        (group(&paper), shape(8, 2, 64, DType::F16), DType::F32, DType::F16),
        (fast.clone(), shape(32, 8, 128, bf16), bf16, bf16),
        (group(&fast), shape(32, 8, 128, bf16), bf16, DType::F32),
        (SocketConfig { value_norm: true, ..fast.clone() }, shape(24, 2, 64, DType::F16), DType::F16, DType::F32),
        (other(Scoring::HardCollision, 9, 3), shape(6, 2, 20, DType::F32), DType::F32, DType::F32),
        (other(Scoring::Hamming, 7, 16), shape(2, 2, 256, bf16), DType::F32, DType::F32),
    ];
    for (config, shape, q, output) in cases {
        let s = sizes(config, shape, 1024);
        let mut kernels = vec![Kernel::StoreKv, Kernel::HashStep, Kernel::HashQuery { q }, Kernel::Score];
        kernels.extend([Kernel::Select, Kernel::Collect]);
        kernels.push(if s.hash_tiles_shared().is_some() { Kernel::HashTiles } else { Kernel::HashKeys });
        if s.g.center {
            kernels.push(Kernel::MeanKeys);
        }
        for sparse in [true, false] {
            kernels.push(if s.on_matrix_unit(q) {
                Kernel::Attend { q, output, sparse }
            } else {
                Kernel::AttendAny { q, output, sparse }
            });
        }
        if s.prefill_on_matrix_unit(q, output) {
            kernels.push(Kernel::Prefill { q, output });
        }
        keys.extend(kernels.into_iter().map(|kernel| Box::new(Key { kernel, sizes: s }) as Box<dyn KernelKey>));
    }
    let mut seen = std::collections::BTreeSet::new();
    keys.retain(|key| seen.insert(key.label()));
    keys
}

#[test]
fn blocks_stay_within_shared_memory() {
    for shared in [99 << 10, 163 << 10, 227 << 10] {
        for (head_dim, value_dim) in [(1, 1), (64, 64), (128, 128), (256, 256), (512, 512), (20, 300)] {
            for (q, kv) in [(32, 8), (32, 1), (7, 7)] {
                for dtype in [DType::F16, DType::Bf16] {
                    let shape = CacheShape { num_q_heads: q, num_kv_heads: kv, head_dim, value_dim, dtype };
                    let s = Sizes { shared, ..sizes(SocketConfig::paper(), shape, 1024) };
                    assert!(s.score_shared() <= shared);
                    if !s.on_matrix_unit(dtype) {
                        continue;
                    }
                    for tokens in [1, 5000, 1 << 20] {
                        for sparse in [true, false] {
                            let span = s.attend_span(std::iter::once(tokens), sparse);
                            assert!(s.attend_shared(sparse, span) <= shared, "{shape:?} {span}");
                        }
                    }
                }
            }
        }
    }
}
