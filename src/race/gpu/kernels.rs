//! The kernels: a typed key each, from which alone its shader is made.

use crate::engine::gpu::{Assembler, KernelKey, KernelSource, Stage, dtype_define};
use crate::race::gpu::backward_kernels::BackwardKernel;
use crate::race::gpu::params::Params;
use crate::race::plan::{CHUNK, Geometry, SCAN_WIDTH};
use crate::tensor::DType;

/// What a kernel does; with a [`Geometry`] it names one pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    /// Hashes rows, `per_head` for each token and kv head.
    Project {
        per_head: usize,
    },
    /// Sums over the keys of each chunk.
    ChunkSums,
    /// Sums before each chunk, or with `reverse` after it, and the state's moving on.
    Scan {
        reverse: bool,
    },
    /// Outputs of queries; `read`: from the state alone.
    Output {
        output: DType,
        read: bool,
    },
    /// One token of each sequence: B and the output.
    Step {
        output: DType,
    },
    /// One token of each sequence: A, once B is done.
    StepMass,
    Backward(BackwardKernel),
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

pub(super) const SNIPPETS: &[(&str, &str)] = snippets!(
    "common": ["elements", "output", "reduce", "tanh", "square_weights", "online_softmax"],
    "race": ["info", "params", "input", "input2", "hash", "features", "matrices", "double", "store"],
    "race": ["weights", "tile", "sums", "through_hash", "readings", "hash_rows"],
    "race": ["window_params", "window_last", "window_keys", "window_rows"],
);

impl Kernel {
    fn text(self) -> &'static str {
        match self {
            Self::Project { .. } => include_str!("../../../shaders/race/project.wgsl"),
            Self::Backward(kernel) => kernel.text(),
            Self::ChunkSums => include_str!("../../../shaders/race/chunk_sums.wgsl"),
            Self::Scan { .. } => include_str!("../../../shaders/race/scan.wgsl"),
            Self::Output { .. } => include_str!("../../../shaders/race/output.wgsl"),
            Self::Step { .. } | Self::StepMass => include_str!("../../../shaders/race/step.wgsl"),
        }
    }

    /// Stage name, for timings.
    fn stage(self) -> &'static str {
        match self {
            Self::Project { .. } => "project",
            Self::Backward(kernel) => kernel.stage(),
            Self::ChunkSums => "chunk sums",
            Self::Scan { .. } => "scan",
            Self::Output { .. } => "output",
            Self::Step { .. } => "step",
            Self::StepMass => "step mass",
        }
    }

    /// Storage bindings after the uniform, `true` where written. The first is always the piece's info.
    fn storage(self, geometry: &Geometry) -> &'static [bool] {
        const R: bool = false;
        const W: bool = true;
        match self {
            Self::Project { .. } => &[R, R, R, W],
            Self::Backward(kernel) => kernel.storage(geometry),
            Self::ChunkSums => &[R, R, R, W],
            Self::Scan { .. } => &[R, W, W],
            Self::Output { .. } if geometry.ensembles > 1 => &[R, R, R, R, W, W],
            Self::Output { .. } => &[R, R, R, R, W],
            Self::Step { .. } => &[R, R, R, W, R, R, W],
            Self::StepMass => &[R, R, R, W],
        }
    }
}

impl Key {
    fn defines(&self) -> Vec<&'static str> {
        let g = &self.geometry;
        if let Kernel::Backward(kernel) = self.kernel {
            return kernel.defines(g);
        }
        let mut defines = vec![dtype_define("IN", g.dtype)];
        if g.ratio {
            defines.push("RATIO");
        }
        match self.kernel {
            Kernel::Scan { reverse: true } => defines.push("REVERSE"),
            Kernel::Output { output, .. } => {
                defines.push(dtype_define("OUT", output));
                if g.ensembles > 1 {
                    defines.push("SUMMED");
                }
            }
            Kernel::Step { output } => defines.push(dtype_define("OUT", output)),
            Kernel::StepMass => defines.push("MASS"),
            _ => {}
        }
        if matches!(self.kernel, Kernel::Output { read: true, .. }) {
            defines.push("READ");
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
            Kernel::Backward(kernel) => constants.extend(kernel.constants(g)),
            Kernel::Scan { .. } => constants.push(("WIDTH", SCAN_WIDTH)),
            Kernel::Step { .. } => {
                constants.push(("HEADS", g.step_heads()));
                constants.push(("HASHES", 1 + g.step_heads()));
            }
            Kernel::StepMass => constants.push(("HASHES", 1)),
            _ => {}
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
        KernelSource::new(assembled, size_of::<Params>(), self.kernel.storage(&self.geometry))
    }
}
