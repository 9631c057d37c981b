//! The kernels: a typed key each, from which alone its shader is made.

use crate::engine::gpu::{Assembler, Binding, KernelKey, KernelSource, Stage};
use crate::race::gpu::params::Params;
use crate::race::plan::{CHUNK, Geometry, runs};
use crate::tensor::DType;

/// What a kernel does; with a [`Geometry`] it names one pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    /// Hashes rows, `per_head` for each token and kv head.
    Project {
        per_head: usize,
    },
    /// Gradients of queries' hashes, from a gradient of o of dtype `grad`; `read` where no keys of the chunk are seen.
    BackwardQuery {
        grad: DType,
        read: bool,
    },
    QuerySums {
        grad: DType,
    },
    /// Gradients of keys' hashes; `absorb` where no queries are.
    BackwardKey {
        grad: DType,
        absorb: bool,
    },
    BackwardValue {
        grad: DType,
        absorb: bool,
    },
    /// From hashes to q (`queries`) or k.
    HashInputs {
        queries: bool,
    },
    HashParameters {
        queries: bool,
    },
    AddParameters,
    FinishParameters,
}

/// One pipeline.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key {
    pub kernel: Kernel,
    pub geometry: Geometry,
}

macro_rules! snippets {
    ($($folder:literal: [$($name:literal),* $(,)?]),* $(,)?) => {
        &[$($(($name, include_str!(concat!("../../../shaders/", $folder, "/", $name, ".wgsl")))),*),*]
    };
}

const SNIPPETS: &[(&str, &str)] = snippets!(
    "common": ["elements", "output", "reduce", "tanh"],
    "race": ["params", "input", "features", "double", "input2", "buckets", "weights", "tile", "sums", "through_hash", "readings", "hash_rows"],
);

impl Kernel {
    fn text(self) -> &'static str {
        match self {
            Self::Project { .. } => include_str!("../../../shaders/race/project.wgsl"),
            Self::BackwardQuery { .. } => include_str!("../../../shaders/race/backward_query.wgsl"),
            Self::QuerySums { .. } => include_str!("../../../shaders/race/query_sums.wgsl"),
            Self::BackwardKey { .. } => include_str!("../../../shaders/race/backward_key.wgsl"),
            Self::BackwardValue { .. } => include_str!("../../../shaders/race/backward_value.wgsl"),
            Self::HashInputs { .. } => include_str!("../../../shaders/race/hash_inputs.wgsl"),
            Self::HashParameters { .. } => include_str!("../../../shaders/race/hash_parameters.wgsl"),
            Self::AddParameters => include_str!("../../../shaders/race/add_parameters.wgsl"),
            Self::FinishParameters => include_str!("../../../shaders/race/finish_parameters.wgsl"),
        }
    }

    /// Stage name, for timings.
    fn stage(self) -> &'static str {
        match self {
            Self::Project { .. } => "project",
            Self::BackwardQuery { .. } => "backward query",
            Self::QuerySums { .. } => "query sums",
            Self::BackwardKey { .. } => "backward key",
            Self::BackwardValue { .. } => "backward value",
            Self::HashInputs { .. } => "hash inputs",
            Self::HashParameters { .. } => "hash parameters",
            Self::AddParameters => "add parameters",
            Self::FinishParameters => "finish parameters",
        }
    }

    /// Storage bindings after the uniform, `true` where written. The first is always the piece's info.
    fn storage(self, ratio: bool) -> &'static [bool] {
        const R: bool = false;
        const W: bool = true;
        match self {
            Self::Project { .. } => &[R, R, R, W],
            Self::BackwardQuery { read: false, .. } => &[R, R, R, R, W, W, R],
            Self::BackwardQuery { read: true, .. } => &[R, R, R, R, W, W],
            Self::QuerySums { .. } if ratio => &[R, R, R, W, R],
            Self::QuerySums { .. } => &[R, R, R, W],
            Self::BackwardKey { absorb: false, .. } => &[R, R, R, R, W, R, R],
            Self::BackwardKey { absorb: true, .. } => &[R, R, R, R, W],
            Self::BackwardValue { absorb: false, .. } => &[R, R, R, W, R, R],
            Self::BackwardValue { absorb: true, .. } => &[R, R, R, W],
            Self::HashInputs { .. } => &[R, R, R, R, W],
            Self::HashParameters { .. } => &[R, R, R, R, W],
            Self::AddParameters => &[R, R, W],
            Self::FinishParameters => &[R, R, W, W],
        }
    }
}

/// `prefix` is `IN`, `IN2` or `OUT`.
fn dtype_define(prefix: &'static str, dtype: DType) -> &'static str {
    match (prefix, dtype) {
        ("IN", DType::F16) => "IN_F16",
        ("IN", DType::Bf16) => "IN_BF16",
        ("IN", _) => "IN_F32",
        ("IN2", DType::F16) => "IN2_F16",
        ("IN2", DType::Bf16) => "IN2_BF16",
        ("IN2", _) => "IN2_F32",
        (_, DType::F16) => "OUT_F16",
        (_, DType::Bf16) => "OUT_BF16",
        _ => "OUT_F32",
    }
}

impl Key {
    fn defines(&self) -> Vec<&'static str> {
        let g = &self.geometry;
        let (input, input2) = match self.kernel {
            Kernel::BackwardQuery { grad, .. } => (grad, g.dtype),
            Kernel::QuerySums { grad } => (grad, g.dtype),
            Kernel::BackwardKey { grad, .. } | Kernel::BackwardValue { grad, .. } => (g.dtype, grad),
            _ => (g.dtype, g.dtype),
        };
        let mut defines = vec![dtype_define("IN", input), dtype_define("IN2", input2)];
        if g.ratio {
            defines.push("RATIO");
        }
        match self.kernel {
            Kernel::BackwardQuery { read: true, .. } => defines.push("READ"),
            Kernel::BackwardKey { absorb: true, .. } | Kernel::BackwardValue { absorb: true, .. } => {
                defines.push("ABSORB");
            }
            _ => {}
        }
        defines
    }

    fn constants(&self) -> Vec<(&'static str, u32)> {
        let g = &self.geometry;
        let mut constants = vec![
            ("Q_HEADS", g.num_q_heads),
            ("KV_HEADS", g.num_kv_heads),
            ("GROUP", g.group),
            ("HEAD_DIM", g.head_dim),
            ("VALUE_DIM", g.value_dim),
            ("TABLES", g.tables),
            ("PLANES", g.planes),
            ("ENSEMBLES", g.ensembles),
            ("CHUNK", CHUNK),
            ("PAIRS", g.channel_pairs()),
        ];
        match self.kernel {
            Kernel::Project { per_head } => {
                constants.push(("PER_HEAD", per_head));
                // Planes of a workgroup, in sixteens.
                constants.push(("COLUMNS", g.bits().div_ceil(16).min(4)));
            }
            Kernel::BackwardQuery { .. } => {
                constants.extend([("COLUMNS", g.bucket_runs()), ("INPUT2", 7)]);
            }
            Kernel::BackwardKey { .. } => constants.extend([("COLUMNS", g.bucket_runs()), ("INPUT2", 6)]),
            Kernel::BackwardValue { .. } => constants.extend([("COLUMNS", runs(g.value_dim)), ("INPUT2", 5)]),
            Kernel::QuerySums { .. } => constants.push(("COLUMNS", runs(g.value_dim))),
            Kernel::HashInputs { queries } | Kernel::HashParameters { queries } => constants.extend([
                ("COLUMNS", runs(g.head_dim)),
                ("PER_HEAD", if queries { g.group } else { 1 }),
                ("S_STRIDE", g.hash_gradient(queries)),
            ]),
            Kernel::AddParameters | Kernel::FinishParameters => {}
        }
        constants.into_iter().map(|(name, value)| (name, value as u32)).collect()
    }
}

impl Stage for Key {
    fn stage(&self) -> &'static str {
        self.kernel.stage()
    }
}

impl KernelKey for Key {
    fn label(&self) -> String {
        let g = &self.geometry;
        let flags = self.defines().join(",");
        format!(
            "race {:?} heads={}/{} dims={}/{} tables={}x{}x{} [{flags}]",
            self.kernel, g.num_q_heads, g.num_kv_heads, g.head_dim, g.value_dim, g.ensembles, g.tables, g.planes,
        )
    }

    fn source(&self) -> KernelSource {
        let assembled = Assembler::assemble(self.kernel.text(), SNIPPETS, &self.defines(), &self.constants());
        // A text that cannot be put together fails to compile with its reason; a test assembles every variant.
        let wgsl = assembled.unwrap_or_else(|reason| format!("error: {reason}"));
        let mut bindings = vec![Binding::Uniform { size: size_of::<Params>() as u64 }];
        let storage = self.kernel.storage(self.geometry.ratio).iter();
        bindings.extend(storage.map(|&written| if written { Binding::ReadWrite } else { Binding::Read }));
        KernelSource { wgsl, bindings, entry: "main" }
    }
}
