//! The kernels of the backward passes.

use crate::engine::gpu::dtype_define;
use crate::race::plan::Geometry;
use crate::tensor::DType;

/// Runs of 32 columns that a workgroup takes, of `columns` in all: 1, 2 or 4.
fn runs(columns: usize) -> usize {
    columns.div_ceil(32).next_power_of_two().min(4)
}

impl Geometry {
    /// Runs of 32 buckets that a workgroup takes: whole tables.
    fn bucket_runs(&self) -> usize {
        if self.planes == 8 { 8 } else { runs(self.buckets()) }
    }

    /// Workgroups that share the buckets.
    pub(super) fn bucket_blocks(&self) -> usize {
        self.buckets().div_ceil(32 * self.bucket_runs())
    }

    /// Whether gradients of hashes of queries, or of `keys`, are made by whole chunks: all buckets fit a panel.
    pub(super) fn chunk_hashes(&self, keys: bool) -> bool {
        self.buckets() <= 64 && (self.ratio || keys)
    }

    /// Elements of the gradient of a row's hash; queries under [`crate::Normalization::Ratio`] need room for two parts.
    pub(super) fn hash_gradient(&self, queries: bool) -> usize {
        self.bits() * if queries && self.ratio { 2 } else { 1 }
    }

    /// Elements that the backward keeps of a query between its kernels.
    pub(super) fn reading(&self) -> usize {
        if self.ratio { 2 } else { 2 * (self.buckets() + 1) }
    }
}

/// What a kernel does. `grad` is the dtype of the gradient of o.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum BackwardKernel {
    /// Gradients of queries' hashes; `read`: from a state alone.
    Query { grad: DType, read: bool },
    /// What the queries of each chunk give to the gradient of the sums that they read.
    QuerySums { grad: DType, wide: bool },
    /// Gradients of keys' hashes; `absorb`: from the gradient of a state alone.
    Key { grad: DType, absorb: bool },
    /// dv.
    Value { grad: DType, absorb: bool, wide: bool, wide_out: bool },
    /// [`Self::Query`] or [`Self::Key`] for whole chunks, see [`Geometry::chunk_hashes`].
    HashChunk { keys: bool, grad: DType, wide: bool, wide2: bool },
    /// From gradients of hashes to those of `queries` or keys.
    HashInputs { queries: bool, wide_out: bool },
    /// From gradients of hashes to those of hyperplanes and β, in shares.
    HashParameters { queries: bool, wide: bool },
    /// Adds shares to sums.
    AddParameters,
    /// Sums as results.
    FinishParameters,
}

impl BackwardKernel {
    pub fn text(self) -> &'static str {
        match self {
            Self::Query { .. } => include_str!("../../../shaders/race/backward_query.wgsl"),
            Self::QuerySums { .. } => include_str!("../../../shaders/race/chunk_sums.wgsl"),
            Self::Key { .. } => include_str!("../../../shaders/race/backward_key.wgsl"),
            Self::Value { .. } => include_str!("../../../shaders/race/read_chunk.wgsl"),
            Self::HashChunk { .. } => include_str!("../../../shaders/race/hash_chunk.wgsl"),
            Self::HashInputs { .. } => include_str!("../../../shaders/race/hash_inputs.wgsl"),
            Self::HashParameters { .. } => include_str!("../../../shaders/race/hash_parameters.wgsl"),
            Self::AddParameters => include_str!("../../../shaders/race/add_parameters.wgsl"),
            Self::FinishParameters => include_str!("../../../shaders/race/finish_parameters.wgsl"),
        }
    }

    pub fn stage(self) -> &'static str {
        match self {
            Self::Query { .. } => "backward query",
            Self::QuerySums { .. } => "query sums",
            Self::Key { .. } => "backward key",
            Self::Value { .. } => "backward value",
            Self::HashChunk { keys: false, .. } => "backward query",
            Self::HashChunk { keys: true, .. } => "backward key",
            Self::HashInputs { .. } => "hash inputs",
            Self::HashParameters { .. } => "hash parameters",
            Self::AddParameters => "add parameters",
            Self::FinishParameters => "finish parameters",
        }
    }

    pub fn storage(self) -> &'static [bool] {
        const R: bool = false;
        const W: bool = true;
        match self {
            Self::Query { read: false, .. } => &[R, R, R, R, W, W, R],
            Self::Query { read: true, .. } => &[R, R, R, R, W, W],
            Self::QuerySums { .. } => &[R, R, R, W, R],
            Self::Key { absorb: false, .. } => &[R, R, R, R, W, R, R],
            Self::Key { absorb: true, .. } | Self::HashInputs { .. } | Self::HashParameters { .. } => &[R, R, R, R, W],
            Self::Value { absorb: false, .. } => &[R, R, R, R, W, R],
            Self::Value { absorb: true, .. } => &[R, R, R, R, W],
            Self::HashChunk { keys: false, .. } => &[R, R, R, R, W, W, R],
            Self::HashChunk { keys: true, .. } => &[R, R, R, R, W, R, R],
            Self::AddParameters => &[R, R, W],
            Self::FinishParameters => &[R, R, W, W],
        }
    }

    pub fn defines(self, geometry: &Geometry) -> Vec<&'static str> {
        let dtype = geometry.dtype;
        let mut defines = match self {
            Self::Query { grad, .. } => vec![dtype_define("IN", grad), dtype_define("IN2", dtype)],
            Self::QuerySums { grad, .. } => vec![dtype_define("IN", grad), "QUERIES"],
            Self::Key { grad, .. } => vec![dtype_define("IN", dtype), dtype_define("IN2", grad)],
            Self::Value { absorb: true, .. } => vec![dtype_define("IN", dtype), "OUT_F32", "KEYS"],
            Self::Value { grad, .. } => vec![dtype_define("IN", grad), "OUT_F32", "KEYS"],
            Self::HashChunk { keys: false, grad, .. } => vec![dtype_define("IN", grad), dtype_define("IN2", dtype)],
            Self::HashChunk { grad, .. } => vec![dtype_define("IN", dtype), dtype_define("IN2", grad), "KEYS"],
            Self::HashParameters { .. } => vec![dtype_define("IN", dtype)],
            Self::HashInputs { .. } => vec!["OUT_F32"],
            Self::AddParameters | Self::FinishParameters => Vec::new(),
        };
        let flags = [
            ("RATIO", geometry.ratio),
            (
                "QUADS",
                matches!(self, Self::QuerySums { .. } | Self::Value { .. } | Self::HashChunk { .. })
                    && geometry.value_dim.is_multiple_of(4),
            ),
            (
                "WIDE",
                matches!(
                    self,
                    Self::QuerySums { wide: true, .. }
                        | Self::HashParameters { wide: true, .. }
                        | Self::Value { wide: true, .. }
                        | Self::HashChunk { wide: true, .. }
                ),
            ),
            ("WIDE2", matches!(self, Self::HashChunk { wide2: true, .. })),
            ("WIDE_OUT", matches!(self, Self::Value { wide_out: true, .. } | Self::HashInputs { wide_out: true, .. })),
            ("ALONE", matches!(self, Self::Value { absorb: true, .. })),
            ("READ", matches!(self, Self::Query { read: true, .. })),
            ("ABSORB", matches!(self, Self::Key { absorb: true, .. })),
        ];
        defines.extend(flags.iter().filter(|(_, on)| *on).map(|(name, _)| *name));
        defines
    }

    pub fn constants(self, geometry: &Geometry) -> Vec<(&'static str, usize)> {
        let g = geometry;
        match self {
            Self::Query { .. } => vec![("COLUMNS", g.bucket_runs()), ("INPUT2", 7)],
            Self::Key { .. } => vec![("COLUMNS", g.bucket_runs()), ("INPUT2", 6)],
            Self::Value { .. } => vec![("OUT", 5)],
            Self::HashChunk { keys, .. } => {
                vec![("INPUT2", if keys { 6 } else { 7 }), ("S_STRIDE", g.hash_gradient(!keys))]
            }
            Self::HashInputs { queries, .. } | Self::HashParameters { queries, .. } => vec![
                ("HEAD_PAIRS", g.head_pairs()),
                ("OUT", 5),
                ("PER_HEAD", if queries { g.group } else { 1 }),
                ("S_STRIDE", g.hash_gradient(queries)),
            ],
            Self::QuerySums { .. } | Self::AddParameters | Self::FinishParameters => Vec::new(),
        }
    }
}

/// All of a geometry, for a test that goes through them.
#[cfg(test)]
pub(super) fn every(geometry: &Geometry) -> Vec<BackwardKernel> {
    let mut all = vec![BackwardKernel::AddParameters, BackwardKernel::FinishParameters];
    for flag in [false, true] {
        for grad in [geometry.dtype, DType::F32] {
            all.push(BackwardKernel::Query { grad, read: flag });
            for wide in [false, geometry.value_dim.is_multiple_of(4)] {
                all.push(BackwardKernel::QuerySums { grad, wide });
            }
            let grad = if flag { DType::F32 } else { grad };
            all.push(BackwardKernel::Key { grad, absorb: flag });
            for wide in [false, geometry.value_dim.is_multiple_of(4)] {
                all.push(BackwardKernel::Value { grad, absorb: flag, wide, wide_out: wide });
                if geometry.chunk_hashes(flag) {
                    all.push(BackwardKernel::HashChunk { keys: flag, grad, wide, wide2: wide });
                }
            }
        }
        for wide in [false, geometry.head_dim.is_multiple_of(4)] {
            all.push(BackwardKernel::HashInputs { queries: flag, wide_out: wide });
            all.push(BackwardKernel::HashParameters { queries: flag, wide });
        }
    }
    all
}
