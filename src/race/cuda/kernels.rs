//! The kernels: a typed key each, from which alone its source is made.

use super::shared::Fit;
use crate::engine::cuda::{KernelKey, KernelSource, Stage};
use crate::race::plan::Geometry;
use crate::tensor::DType;

/// What a kernel does; with a [`Geometry`] it names one. `terms` is the number of parts that computed numbers have in
/// products (bf16; TF32 where inputs are f32), `grad` the dtype of the gradient of o, `channels` those of v that a block
/// has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    // Walking through spans, on the tensor cores.
    Sums { terms: usize },
    Forward { terms: usize, fit: Fit, output: DType },
    BackwardQuery { terms: usize, fit: Fit, gradients: DType },
    BackwardKey { terms: usize, fit: Fit, gradients: DType },
    // For both.
    Scan { reverse: bool },
    AddParameters,
    FinishParameters,
    Step { output: DType, channels: usize },
    Fold,
    // For any shape.
    Hash { queries: bool },
    ChunkSums,
    GroupTotals,
    GroupPrefix { reverse: bool },
    ReadWeights { read: bool },
    Products,
    Output { output: DType, read: bool },
    Gains { grad: DType },
    Values { grad: DType, read: bool },
    Query { read: bool },
    QuerySums { grad: DType },
    Key { absorb: bool },
    Value { grad: DType, absorb: bool },
    ThroughHash { queries: bool },
    HashInputs { queries: bool },
    HashParameters { queries: bool },
}

/// One kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub kernel: Kernel,
    pub geometry: Geometry,
}

/// File, text and function of a kernel.
macro_rules! kernel {
    ($folder:literal, $name:literal, $entry:literal) => {
        (
            concat!("race/", $folder, $name, ".cu"),
            include_str!(concat!("../../../shaders/cuda/race/", $folder, $name, ".cu")),
            $entry,
        )
    };
}
pub(super) use kernel;

/// Those of the window beside RACE too.
pub(super) const HEADERS: &[(&str, &str)] = &[
    ("numbers.cuh", include_str!("../../../shaders/cuda/common/numbers.cuh")),
    ("machine.cuh", include_str!("../../../shaders/cuda/race/machine.cuh")),
    ("walk.cuh", include_str!("../../../shaders/cuda/race/walk.cuh")),
    ("tiles.cuh", include_str!("../../../shaders/cuda/race/tiles.cuh")),
    ("fragments_bf16.cuh", include_str!("../../../shaders/cuda/race/fragments_bf16.cuh")),
    ("fragments_tf32.cuh", include_str!("../../../shaders/cuda/race/fragments_tf32.cuh")),
    ("hash.cuh", include_str!("../../../shaders/cuda/race/hash.cuh")),
    ("state.cuh", include_str!("../../../shaders/cuda/race/state.cuh")),
    ("any.cuh", include_str!("../../../shaders/cuda/race/any/any.cuh")),
    ("product.cuh", include_str!("../../../shaders/cuda/race/any/product.cuh")),
    ("masses.cuh", include_str!("../../../shaders/cuda/race/any/masses.cuh")),
    ("groups.cuh", include_str!("../../../shaders/cuda/race/any/groups.cuh")),
    ("pending.cuh", include_str!("../../../shaders/cuda/race/any/pending.cuh")),
    ("window.cuh", include_str!("../../../shaders/cuda/race/window.cuh")),
    ("window_tiles.cuh", include_str!("../../../shaders/cuda/race/window_tiles.cuh")),
    ("window_tile.cuh", include_str!("../../../shaders/cuda/race/any/window_tile.cuh")),
];

impl Kernel {
    /// File, text, function.
    fn text(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Sums { .. } => kernel!("", "sums", "race_sums"),
            Self::Forward { .. } => kernel!("", "forward", "race_forward"),
            Self::BackwardQuery { .. } => kernel!("", "backward_query", "race_backward_query"),
            Self::BackwardKey { .. } => kernel!("", "backward_key", "race_backward_key"),
            Self::Scan { reverse: false } => kernel!("", "scan", "race_scan"),
            Self::Scan { reverse: true } => kernel!("", "scan", "race_scan_back"),
            Self::AddParameters => kernel!("", "add_parameters", "race_add_parameters"),
            Self::FinishParameters => kernel!("any/", "finish_parameters", "any_finish_parameters"),
            Self::Step { .. } => kernel!("any/", "step", "any_step"),
            Self::Fold => kernel!("any/", "fold", "any_fold"),
            Self::Hash { .. } => kernel!("any/", "hash", "any_hash"),
            Self::ChunkSums => kernel!("any/", "chunk_sums", "any_chunk_sums"),
            Self::GroupTotals => kernel!("any/", "group_totals", "any_group_totals"),
            Self::GroupPrefix { .. } => kernel!("any/", "group_prefix", "any_group_prefix"),
            Self::ReadWeights { .. } => kernel!("any/", "read_weights", "any_read_weights"),
            Self::Products => kernel!("any/", "products", "any_products"),
            Self::Output { .. } => kernel!("any/", "output", "any_output"),
            Self::Gains { .. } => kernel!("any/", "gains", "any_gains"),
            Self::Values { .. } => kernel!("any/", "values", "any_values"),
            Self::Query { .. } => kernel!("any/", "query", "any_query"),
            Self::QuerySums { .. } => kernel!("any/", "query_sums", "any_query_sums"),
            Self::Key { .. } => kernel!("any/", "key", "any_key"),
            Self::Value { .. } => kernel!("any/", "value", "any_value"),
            Self::ThroughHash { .. } => kernel!("any/", "through_hash", "any_through_hash"),
            Self::HashInputs { .. } => kernel!("any/", "hash_inputs", "any_hash_inputs"),
            Self::HashParameters { .. } => kernel!("any/", "hash_parameters", "any_hash_parameters"),
        }
    }

    /// Constants besides those of the geometry.
    fn defines(self, g: &Geometry) -> Vec<(&'static str, String)> {
        let per_head = |queries: bool| {
            let width = if queries { g.buckets() + 1 } else { g.buckets() };
            vec![("PER_HEAD", (if queries { g.group } else { 1 }).to_string()), ("W_ROW", width.to_string())]
        };
        let flag = |name, on: bool| if on { vec![(name, "1".to_string())] } else { Vec::new() };
        let mut defines = match self {
            Self::Sums { terms } => vec![("TERMS", terms.to_string())],
            Self::BackwardQuery { terms, fit, gradients } | Self::BackwardKey { terms, fit, gradients } => vec![
                ("TERMS", terms.to_string()),
                ("BACKWARD_BLOCKS", fit.blocks.to_string()),
                ("STAGES", fit.stages.to_string()),
                ("LATE_STAGES", fit.late_stages.to_string()),
                ("GRADIENT_TYPE", code(gradients)),
            ],
            Self::Forward { terms, fit, output } => vec![
                ("TERMS", terms.to_string()),
                ("OUT_TYPE", code(output)),
                ("FORWARD_BLOCKS", fit.blocks.to_string()),
                ("FORWARD_STAGES", fit.stages.to_string()),
            ],
            Self::Scan { reverse } | Self::GroupPrefix { reverse } => flag("REVERSED", reverse),
            Self::ReadWeights { read } | Self::Query { read } => flag("READ", read),
            Self::Output { output, read } => [vec![("OUT_TYPE", code(output))], flag("READ", read)].concat(),
            Self::Step { output, channels } => vec![("OUT_TYPE", code(output)), ("CHANNELS", channels.to_string())],
            Self::Gains { grad } | Self::QuerySums { grad } => vec![("GRAD_TYPE", code(grad))],
            Self::Values { grad, read } => [vec![("GRAD_TYPE", code(grad))], flag("READ", read)].concat(),
            Self::Key { absorb } => flag("ABSORB", absorb),
            Self::Value { grad, absorb } => [vec![("GRAD_TYPE", code(grad))], flag("ABSORB", absorb)].concat(),
            Self::Hash { queries }
            | Self::ThroughHash { queries }
            | Self::HashInputs { queries }
            | Self::HashParameters { queries } => per_head(queries),
            Self::AddParameters | Self::FinishParameters | Self::Fold => Vec::new(),
            Self::ChunkSums | Self::GroupTotals | Self::Products => Vec::new(),
        };
        // Headers speak of both kinds of kernels that walk.
        for (name, value) in [("STAGES", "1".into()), ("GRADIENT_TYPE", code(DType::F32))] {
            if !defines.iter().any(|(given, _)| *given == name) {
                defines.push((name, value));
            }
        }
        defines
    }
}

/// An element type in shaders/cuda/race/machine.cuh.
pub(super) fn code(dtype: DType) -> String {
    match dtype {
        DType::F16 => "1",
        DType::Bf16 => "2",
        _ => "0",
    }
    .into()
}

impl Stage for Key {
    fn stage(&self) -> &'static str {
        self.kernel.text().2
    }
}

impl KernelKey for Key {
    fn label(&self) -> String {
        let g = &self.geometry;
        let normalization = if g.ratio { "ratio" } else { "bucket" };
        format!(
            "race {:?} group={} dims={}/{} {:?} tables={}x{}x{} {normalization}",
            self.kernel, g.group, g.head_dim, g.value_dim, g.dtype, g.ensembles, g.tables, g.planes,
        )
    }

    fn source(&self) -> KernelSource {
        let g = &self.geometry;
        let (file, text, entry) = self.kernel.text();
        let mut defines = self.kernel.defines(g);
        let constants = [
            ("GROUP", g.group),
            ("HEAD_DIM", g.head_dim),
            ("VALUE_DIM", g.value_dim),
            ("TABLES", g.tables),
            ("PLANES", g.planes),
            ("ENSEMBLES", g.ensembles),
        ];
        defines.extend(constants.map(|(name, value)| (name, value.to_string())));
        defines.push(("IN_TYPE", code(g.dtype)));
        if g.ratio {
            defines.push(("RATIO", "1".into()));
        }
        KernelSource { file, text, headers: HEADERS, defines, options: &[], entry }
    }
}
