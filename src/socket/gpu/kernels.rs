//! The kernels: a typed key each, from which alone its shader is made.

use crate::engine::gpu::{Assembler, KernelKey, KernelSource, Stage, dtype_define};
use crate::socket::config::Scoring;
use crate::socket::gpu::params::Params;
use crate::socket::plan::{AttendRows, BINS, CANDIDATES, Geometry, HISTOGRAM_ROW};
use crate::tensor::DType;

/// What a kernel does; with a [`Geometry`] it names one pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    StoreKv,
    MeanKeys,
    HashKeys,
    HashStep,
    HashQuery {
        q: DType,
    },
    /// Coarse: four heads to a look-up, to be made exact near the threshold.
    Score {
        chunk: usize,
        coarse: bool,
    },
    Bounds {
        coarse: bool,
    },
    Candidates {
        chunk: usize,
        coarse: bool,
    },
    /// After coarse candidates: `slices` workgroups share a row's list.
    Rescore {
        slices: usize,
    },
    /// May do what `Rescore` does first.
    Threshold {
        rescore: bool,
    },
    Collect,
    Attend {
        q: DType,
        chunk: usize,
        sparse: bool,
    },
    /// `split` workgroups share the channels of one merge.
    MergePartials {
        output: DType,
        split: usize,
    },
    Prefill {
        q: DType,
    },
}

/// One pipeline.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key {
    pub kernel: Kernel,
    pub geometry: Geometry,
}

macro_rules! snippets {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../shaders/common/", $name, ".wgsl")))),*]
    };
}

pub(super) const SNIPPETS: &[(&str, &str)] = snippets!(
    "params",
    "place",
    "rows",
    "entries",
    "runs",
    "items",
    "elements",
    "query",
    "stored",
    "pieces",
    "square_weights",
    "online_softmax",
    "scan",
    "reduce",
    "tanh",
    "order",
    "header",
    "ranges",
    "find_bin",
    "exact_key",
    "rescore_candidate",
    "key_scalars",
    "output",
);

impl Kernel {
    fn text(self, g: &Geometry) -> &'static str {
        match self {
            Self::Attend { chunk, sparse, .. } if g.attend_rows(chunk, sparse).is_some() => {
                include_str!("../../../shaders/attention/attend_rows.wgsl")
            }
            Self::StoreKv => include_str!("../../../shaders/cache/store_kv.wgsl"),
            Self::MeanKeys => include_str!("../../../shaders/cache/mean_keys.wgsl"),
            Self::HashKeys => include_str!("../../../shaders/socket/hash_keys.wgsl"),
            Self::HashStep => include_str!("../../../shaders/socket/hash_step.wgsl"),
            Self::HashQuery { .. } => include_str!("../../../shaders/socket/hash_query.wgsl"),
            Self::Score { .. } => include_str!("../../../shaders/socket/score.wgsl"),
            Self::Bounds { .. } => include_str!("../../../shaders/socket/bounds.wgsl"),
            Self::Candidates { .. } => include_str!("../../../shaders/socket/candidates.wgsl"),
            Self::Rescore { .. } => include_str!("../../../shaders/socket/rescore.wgsl"),
            Self::Threshold { .. } => include_str!("../../../shaders/socket/threshold.wgsl"),
            Self::Collect => include_str!("../../../shaders/socket/collect.wgsl"),
            Self::Attend { .. } => include_str!("../../../shaders/attention/attend.wgsl"),
            Self::MergePartials { .. } => include_str!("../../../shaders/attention/merge_partials.wgsl"),
            Self::Prefill { .. } => include_str!("../../../shaders/attention/prefill.wgsl"),
        }
    }

    /// Stage name, for timings.
    fn stage(self) -> &'static str {
        match self {
            Self::StoreKv => "store",
            Self::MeanKeys => "mean",
            Self::HashKeys | Self::HashStep => "hash keys",
            Self::HashQuery { .. } => "hash query",
            Self::Score { .. } => "score",
            Self::Bounds { .. } => "bounds",
            Self::Candidates { .. } => "candidates",
            Self::Rescore { .. } => "rescore",
            Self::Threshold { .. } => "threshold",
            Self::Collect => "collect",
            Self::Attend { .. } => "attend",
            Self::MergePartials { .. } => "merge",
            Self::Prefill { .. } => "prefill",
        }
    }

    /// Storage bindings after the uniform: `true` where written.
    fn storage(self) -> &'static [bool] {
        const R: bool = false;
        const W: bool = true;
        match self {
            Self::StoreKv => &[R, R, R, R, W, W, W],
            Self::MeanKeys => &[R, R, R, W],
            Self::HashKeys | Self::HashStep => &[R, R, R, R, R, W, W],
            Self::HashQuery { .. } => &[R, R, R, R, W, W],
            Self::Score { .. } => &[R, R, R, R, W, W],
            Self::Bounds { .. } => &[R, R, W, W],
            Self::Candidates { .. } => &[R, R, R, R, W, W, W],
            Self::Rescore { .. } => &[R, R, R, W, R, W],
            Self::Threshold { rescore: false } => &[R, W, R, R],
            Self::Threshold { rescore: true } => &[R, W, R, W, R, R],
            Self::Collect => &[R, R, W, W],
            Self::Attend { sparse: true, .. } => &[R, R, R, R, R, W, R],
            Self::Attend { sparse: false, .. } => &[R, R, R, R, R, W],
            Self::MergePartials { .. } => &[R, R, W, W],
            Self::Prefill { .. } => &[R, R, R, R, R, W],
        }
    }
}

impl Key {
    fn defines(&self) -> Vec<&'static str> {
        let g = &self.geometry;
        let mut defines = vec![dtype_define("KV", g.dtype)];
        defines.push(match g.scoring {
            Scoring::SoftCollision => "SOFT_COLLISION",
            Scoring::SignProjection => "SIGN_PROJECTION",
            Scoring::HardCollision => "HARD_COLLISION",
            Scoring::Hamming => "HAMMING",
        });
        let flags = [
            ("PRODUCT", g.scoring.multiplies()),
            ("SCALARS", g.gain),
            ("BIAS", g.bias),
            ("VALUE_NORM", g.value_norm),
            ("CENTER", g.center),
            ("NORMALIZE", g.normalize),
            ("DISJOINT", g.disjoint),
            ("MEAN_QUERY", g.mean_query()),
            ("MEAN_SCORE", g.mean_score()),
            ("SUBGROUPS", g.subgroup > 0),
        ];
        defines.extend(flags.iter().filter(|(_, on)| *on).map(|(name, _)| *name));
        match self.kernel {
            Kernel::HashQuery { q } | Kernel::Prefill { q } => defines.push(dtype_define("Q", q)),
            Kernel::Attend { q, sparse, .. } => {
                defines.push(dtype_define("Q", q));
                if sparse {
                    defines.push("SPARSE");
                }
            }
            Kernel::Score { coarse, .. } => {
                if g.score_blocks(coarse).paired {
                    defines.push("PAIRS");
                }
                if coarse {
                    defines.push("COARSE");
                }
            }
            Kernel::Bounds { coarse: true } | Kernel::Candidates { coarse: true, .. } | Kernel::Rescore { .. } => {
                defines.push("COARSE")
            }
            Kernel::Threshold { rescore: true } => defines.push("RESCORE"),
            Kernel::MergePartials { output, .. } => defines.push(dtype_define("OUT", output)),
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
            ("K_PIECES", g.k_pieces()),
            ("V_PIECES", g.v_pieces()),
            ("PAGE", g.page),
            ("SLOT_WORDS", g.slot_words()),
            ("TABLES", g.tables),
            ("PLANES", g.planes),
            ("TABLES_PER_WORD", g.tables_per_word()),
            ("BITS", g.tables * g.planes),
            ("WORDS", g.words),
            ("INDEX_WORDS", g.index_words()),
            ("DIGITS", g.digits()),
            ("ENTRIES", g.table_entries()),
            ("SCORING_HEADS", g.scoring_heads()),
            ("SCORE_ROWS", g.score_rows()),
            ("PART_STRIDE", g.part_stride()),
            ("BINS", BINS),
            ("HISTOGRAM_ROW", HISTOGRAM_ROW),
            ("CANDIDATES", CANDIDATES),
            ("SUBGROUP", g.subgroup),
        ];
        let mut width = 256;
        match self.kernel {
            Kernel::HashKeys => width = 128,
            Kernel::HashQuery { .. } => constants.push(("BLOCK_BITS", g.query_block())),
            Kernel::Score { chunk, coarse } => {
                let blocks = g.score_blocks(coarse);
                constants.push(("BLOCK_TABLES", blocks.tables));
                constants.push(("PASS_PAIRS", blocks.pairs));
                constants.push(("CHUNK", chunk));
                constants.push(("TOKENS", chunk.div_ceil(256)));
            }
            Kernel::Candidates { chunk, .. } => constants.extend([("CHUNK", chunk), ("QUADS", 4)]),
            Kernel::Rescore { slices } => constants.push(("SLICES", slices)),
            Kernel::Attend { chunk, sparse, .. } => {
                let heads = g.attend_heads(chunk, sparse);
                constants.push(("HEADS", heads));
                constants.push(("HEAD_TILES", g.group.div_ceil(heads)));
                constants.push(("CHUNK", chunk));
                if let Some(plan) = g.attend_rows(chunk, sparse) {
                    width = plan.width;
                    constants.extend(row_constants(&plan, g, chunk));
                } else {
                    constants.push(("TILE", g.attend_tile(chunk, sparse).1));
                    constants.push(("K_STEPS", g.k_pieces().div_ceil(4)));
                    constants.push(("ROW_GROUPS", (256 / g.v_pieces()).min(64)));
                }
            }
            Kernel::MergePartials { split, .. } => constants.push(("MERGE_SPLIT", split)),
            _ => {}
        }
        constants.push(("WIDTH", width));
        if matches!(self.kernel, Kernel::Attend { .. }) {
            constants.push(("PIECE", g.piece()));
        }
        constants.into_iter().map(|(name, value)| (name, value as u32)).collect()
    }
}

/// How often the steps of attend_rows.wgsl are written out.
fn row_constants(plan: &AttendRows, g: &Geometry, chunk: usize) -> Vec<(&'static str, usize)> {
    let values = plan.rows * plan.slots;
    let fold = |half: usize| if half < values { half } else { 0 };
    vec![
        ("LANES", plan.lanes),
        ("SLOTS", plan.slots),
        ("ROWS", plan.rows),
        ("HALVES", g.piece() / 4),
        ("FOLD_16", fold(16)),
        ("FOLD_8", fold(8)),
        ("FOLD_4", fold(4)),
        ("FOLD_2", fold(2)),
        ("FOLD_1", fold(1)),
        ("ADDED", (plan.lanes / values).ilog2() as usize),
        ("ROW_BITS", plan.rows.ilog2() as usize),
        ("SCORED", plan.heads.min(g.score_rows())),
        ("QUADS", (chunk / (4 * plan.width)).max(1)),
    ]
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
            "{} {:?} heads={}/{} dims={}/{} page={} tables={}x{} subgroup={} memory={} [{flags}]",
            self.kernel.stage(),
            self.kernel,
            g.num_q_heads,
            g.num_kv_heads,
            g.head_dim,
            g.value_dim,
            g.page,
            g.tables,
            g.planes,
            g.subgroup,
            g.workgroup_memory,
        )
    }

    fn source(&self) -> KernelSource {
        let text = self.kernel.text(&self.geometry);
        let assembled = Assembler::assemble(text, SNIPPETS, &self.defines(), &self.constants());
        KernelSource::new(assembled, size_of::<Params>(), self.kernel.storage())
    }
}
