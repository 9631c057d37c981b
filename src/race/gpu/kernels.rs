//! The kernels: a typed key each, from which alone its shader is made.

use crate::engine::gpu::{Assembler, KernelKey, KernelSource, Stage, dtype_define};
use crate::race::gpu::backward_kernels::BackwardKernel;
use crate::race::gpu::params::Params;
use crate::race::plan::{CHUNK, Geometry, RUN, SCAN_WIDTH, SEGMENT};
use crate::tensor::DType;

/// What a kernel does; with a [`Geometry`] it names one pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    /// Hashes rows, `per_head` for each token and kv head; `wide`: rows are whole vectors of four.
    Project {
        per_head: usize,
        wide: bool,
    },
    /// Sums over the keys of each run, and the parts of its chunks; `wide`: rows of v are whole vectors of four.
    ChunkSums {
        wide: bool,
    },
    /// Sums over the runs of each segment.
    ScanParts {
        reverse: bool,
    },
    /// Sums before each segment, or with `reverse` after it, and the state's moving on.
    Scan {
        reverse: bool,
    },
    /// Sums before or after each run, from those of its segment.
    ScanSpread {
        reverse: bool,
    },
    /// Outputs of queries; `read`: from the state alone. Of bucket normalisations, and of several ensembles.
    Output {
        output: DType,
        read: bool,
    },
    /// The same for [`crate::Normalization::Ratio`] and one ensemble; `wide`: rows of v are whole vectors of four,
    /// `wide_out`: those of o.
    OutputRatio {
        output: DType,
        read: bool,
        wide: bool,
        wide_out: bool,
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
    "race": ["info", "params", "input", "hash", "features", "matrices", "double", "store"],
    "race": ["weights", "tile", "sums", "through_hash", "readings", "hash_rows"],
    "race": ["window_params", "window_last", "window_keys", "window_rows"],
    "race": ["quad", "quads", "panels", "meets", "segments", "stored_matrix", "matrix_quads", "store_quads"],
);

impl Kernel {
    fn text(self) -> &'static str {
        match self {
            Self::Project { .. } => include_str!("../../../shaders/race/project.wgsl"),
            Self::Backward(kernel) => kernel.text(),
            Self::ChunkSums { .. } => include_str!("../../../shaders/race/chunk_sums.wgsl"),
            Self::Scan { .. } => include_str!("../../../shaders/race/scan.wgsl"),
            Self::ScanParts { .. } | Self::ScanSpread { .. } => include_str!("../../../shaders/race/scan_chunks.wgsl"),
            Self::Output { .. } => include_str!("../../../shaders/race/output.wgsl"),
            Self::OutputRatio { .. } => include_str!("../../../shaders/race/read_chunk.wgsl"),
            Self::Step { .. } | Self::StepMass => include_str!("../../../shaders/race/step.wgsl"),
        }
    }

    /// Whether it works on runs, and on nothing of their chunks.
    fn is_scan(self) -> bool {
        matches!(self, Self::ScanParts { .. } | Self::Scan { .. } | Self::ScanSpread { .. })
    }

    /// Stage name, for timings.
    fn stage(self) -> &'static str {
        match self {
            Self::Project { .. } => "project",
            Self::Backward(kernel) => kernel.stage(),
            Self::ChunkSums { .. } => "chunk sums",
            Self::ScanParts { .. } => "scan parts",
            Self::ScanSpread { .. } => "scan spread",
            Self::Scan { .. } => "scan",
            Self::Output { .. } | Self::OutputRatio { .. } => "output",
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
            Self::Backward(kernel) => kernel.storage(),
            Self::ChunkSums { .. } => &[R, R, R, W],
            Self::ScanParts { .. } | Self::ScanSpread { .. } => &[R, W, W],
            Self::Scan { .. } => &[R, W, W, W],
            Self::Output { .. } if geometry.ensembles > 1 => &[R, R, R, R, W, W],
            Self::Output { .. } | Self::OutputRatio { .. } => &[R, R, R, R, W],
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
            Kernel::ScanParts { reverse } | Kernel::Scan { reverse } | Kernel::ScanSpread { reverse } => {
                if reverse {
                    defines.push("REVERSE");
                }
                if matches!(self.kernel, Kernel::ScanSpread { .. }) {
                    defines.push("SPREAD");
                }
            }
            Kernel::Project { wide, .. } => defines.extend(wide.then_some("WIDE")),
            Kernel::ChunkSums { wide } => {
                defines.extend(wide.then_some("WIDE"));
                defines.extend(g.value_dim.is_multiple_of(4).then_some("QUADS"));
            }
            Kernel::Output { output, .. } => {
                defines.push(dtype_define("OUT", output));
                if g.ensembles > 1 {
                    defines.push("SUMMED");
                }
            }
            Kernel::OutputRatio { output, read, wide, wide_out } => {
                defines.push(dtype_define("OUT", output));
                let flags =
                    [("ALONE", read), ("WIDE", wide), ("WIDE_OUT", wide_out), ("QUADS", g.value_dim.is_multiple_of(4))];
                defines.extend(flags.iter().filter(|(_, on)| *on).map(|(name, _)| *name));
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
            ("CHUNK", if self.kernel.is_scan() { RUN * CHUNK } else { CHUNK }),
            ("RUN", RUN),
            ("SEGMENT", SEGMENT),
            ("MATRIX_ROW", g.matrix_row()),
            ("PAIRS", g.channel_pairs()),
        ];
        match self.kernel {
            Kernel::Project { per_head, .. } => {
                constants.push(("PER_HEAD", per_head));
                constants.push(("FOURS", g.plane_fours()));
            }
            Kernel::Backward(kernel) => constants.extend(kernel.constants(g)),
            Kernel::Scan { .. } => constants.push(("WIDTH", SCAN_WIDTH)),
            Kernel::Step { .. } => {
                constants.push(("HEADS", g.step_heads()));
                constants.push(("HASHES", 1 + g.step_heads()));
            }
            Kernel::StepMass => constants.push(("HASHES", 1)),
            Kernel::OutputRatio { .. } => constants.push(("OUT", 5)),
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
