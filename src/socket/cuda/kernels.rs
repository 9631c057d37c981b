//! The kernels: a typed key each, from which alone its text and constants follow.

use super::plan::{BINS, CANDIDATES, Fast, MOST_BULK_STAGES, Sizes};
#[cfg(test)]
use crate::engine::cuda::BULK_COPIES;
use crate::engine::cuda::{HEADERS, KernelKey, KernelSource, Stage};
use crate::socket::config::Scoring;
use crate::tensor::DType;

/// What a kernel does; with [`Sizes`] it names one compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    StoreKv,
    MeanKeys,
    HashKeys,
    HashTiles,
    HashStep,
    HashQuery {
        q: DType,
    },
    Score {
        /// Keys are copied by the hardware.
        runs: bool,
    },
    Select,
    Collect,
    /// On the matrix unit.
    Attend {
        q: DType,
        output: DType,
        sparse: bool,
    },
    /// The same over all keys, which the hardware copies in runs.
    AttendBulk {
        q: DType,
        output: DType,
    },
    /// In f32.
    AttendAny {
        q: DType,
        output: DType,
        sparse: bool,
    },
    Prefill {
        q: DType,
        output: DType,
    },
}

/// One compiled kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key {
    pub kernel: Kernel,
    pub sizes: Sizes,
}

const SOCKET_HEADERS: &[(&str, &str)] = &[
    HEADERS[0],
    ("ptx.cuh", include_str!("../../../shaders/cuda/common/ptx.cuh")),
    ("params.cuh", include_str!("../../../shaders/cuda/common/params.cuh")),
    ("partials.cuh", include_str!("../../../shaders/cuda/common/partials.cuh")),
    ("bulk.cuh", include_str!("../../../shaders/cuda/common/bulk.cuh")),
    ("attend_tile.cuh", include_str!("../../../shaders/cuda/attention/attend_tile.cuh")),
    ("scoring.cuh", include_str!("../../../shaders/cuda/common/scoring.cuh")),
    ("score_levels.cuh", include_str!("../../../shaders/cuda/socket/score_levels.cuh")),
    ("score_halves.cuh", include_str!("../../../shaders/cuda/socket/score_halves.cuh")),
    ("score_bytes.cuh", include_str!("../../../shaders/cuda/socket/score_bytes.cuh")),
    ("score_codes.cuh", include_str!("../../../shaders/cuda/socket/score_codes.cuh")),
    ("score_any.cuh", include_str!("../../../shaders/cuda/socket/score_any.cuh")),
];

macro_rules! text {
    ($path:literal) => {
        ($path, include_str!(concat!("../../../shaders/cuda/", $path)))
    };
}

impl Kernel {
    /// File, text and function.
    fn text(self) -> (&'static str, &'static str, &'static str) {
        let ((file, text), entry) = match self {
            Self::StoreKv => (text!("cache/store_kv.cu"), "store_kv"),
            Self::MeanKeys => (text!("cache/mean_keys.cu"), "mean_keys"),
            Self::HashKeys => (text!("socket/hash_keys.cu"), "hash_keys"),
            Self::HashTiles => (text!("socket/hash_tiles.cu"), "hash_tiles"),
            Self::HashStep => (text!("socket/hash_step.cu"), "hash_step"),
            Self::HashQuery { .. } => (text!("socket/hash_query.cu"), "hash_query"),
            Self::Score { .. } => (text!("socket/score.cu"), "score"),
            Self::Select => (text!("socket/select.cu"), "select_keys"),
            Self::Collect => (text!("socket/collect.cu"), "collect"),
            Self::Attend { .. } => (text!("attention/attend.cu"), "attend"),
            Self::AttendBulk { .. } => (text!("attention/attend_bulk.cu"), "attend_bulk"),
            Self::AttendAny { .. } => (text!("attention/attend_any.cu"), "attend_any"),
            Self::Prefill { .. } => (text!("attention/prefill.cu"), "prefill"),
        };
        (file, text, entry)
    }
}

fn dtype(dtype: DType) -> usize {
    match dtype {
        DType::F16 => 1,
        DType::Bf16 => 2,
        _ => 0,
    }
}

impl Key {
    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        match self.kernel {
            Kernel::Score { runs } => self.sizes.score_threads(runs),
            Kernel::HashStep | Kernel::Select => 512,
            Kernel::Attend { .. } | Kernel::Prefill { .. } => 128,
            Kernel::AttendBulk { .. } => 160,
            _ => 256,
        }
    }

    fn constants(&self) -> Vec<(&'static str, usize)> {
        let (s, g) = (&self.sizes, &self.sizes.g);
        let mut all = vec![
            ("Q_HEADS", g.num_q_heads),
            ("KV_HEADS", g.num_kv_heads),
            ("GROUP", g.group),
            ("HEAD_DIM", g.head_dim),
            ("VALUE_DIM", g.value_dim),
            ("KV_DTYPE", dtype(g.dtype)),
            ("PAGE", g.page),
            ("INDEX_WORDS", g.index_words()),
        ];
        let scoring = [
            ("TABLES", g.tables),
            ("PLANES", g.planes),
            (
                "SCORING",
                match g.scoring {
                    Scoring::SoftCollision => 0,
                    Scoring::SignProjection => 1,
                    Scoring::HardCollision => 2,
                    Scoring::Hamming => 3,
                },
            ),
            ("WORDS", g.words),
            ("SCORING_HEADS", g.scoring_heads()),
            ("SCORE_ROWS", g.score_rows()),
            ("GAIN", g.gain.into()),
            ("BIAS", g.bias.into()),
            ("VALUE_NORM", g.value_norm.into()),
            ("CENTER", g.center.into()),
            ("NORMALIZE", g.normalize.into()),
            ("DISJOINT", g.disjoint.into()),
            ("MEAN_QUERY", g.mean_query().into()),
            ("MEAN_SCORE", (g.per_group && !g.mean_query()).into()),
            (
                "FAST",
                match s.fast() {
                    Fast::No => 0,
                    Fast::Halves => 1,
                    Fast::Bytes => 2,
                    Fast::Codes => 3,
                },
            ),
            ("CANDIDATES", CANDIDATES),
            ("BINS", BINS),
        ];
        let attention = |q: DType, output: DType, sparse: bool| {
            let (heads, tiles) = s.head_tiles();
            [
                ("Q_DTYPE", dtype(q)),
                ("OUT_DTYPE", dtype(output)),
                ("SPARSE", sparse.into()),
                ("HEADS", heads),
                ("HEAD_TILES", tiles),
                ("STAGES", s.stages(sparse)),
                ("Q_SPLITS", s.query_parts(q)),
                ("P_SPLITS", s.weight_parts(output)),
            ]
        };
        match self.kernel {
            Kernel::StoreKv | Kernel::MeanKeys => {}
            Kernel::HashKeys | Kernel::HashTiles | Kernel::HashStep | Kernel::Select | Kernel::Collect => {
                all.extend(scoring);
            }
            Kernel::HashQuery { q } => {
                all.extend(scoring);
                all.push(("Q_DTYPE", dtype(q)));
            }
            Kernel::Score { runs } => {
                all.extend(scoring);
                let (tables, heads) = s.score_blocks();
                all.extend([("BLOCK_TABLES", tables), ("HEADS_PER_PASS", heads)]);
                all.push(("BULK", runs.into()));
                if let Some((stages, _)) = s.score_stages().filter(|_| runs) {
                    all.push(("STAGES", stages));
                }
            }
            Kernel::Attend { q, output, sparse } | Kernel::AttendAny { q, output, sparse } => {
                all.extend(attention(q, output, sparse));
                if sparse {
                    all.extend(scoring);
                }
            }
            Kernel::AttendBulk { q, output } => {
                all.extend(
                    attention(q, output, false).into_iter().filter(|(name, _)| !["SPARSE", "STAGES"].contains(name)),
                );
                let together = if s.bulk_stages(q, 2) >= 2 { 2 } else { 1 };
                all.extend([("MOST_STAGES", MOST_BULK_STAGES), ("BLOCKS_TOGETHER", together)]);
            }
            Kernel::Prefill { q, output } => {
                all.extend(attention(q, output, false).into_iter().filter(|(name, _)| *name != "P_SPLITS"));
                all.extend([("P_SPLITS", s.prefill_weight_parts(output)), ("KEYS", s.prefill_keys(output))]);
            }
        }
        all
    }
}

impl Stage for Key {
    fn stage(&self) -> &'static str {
        match self.kernel {
            Kernel::StoreKv => "store",
            Kernel::MeanKeys => "mean",
            Kernel::HashKeys | Kernel::HashTiles | Kernel::HashStep => "hash keys",
            Kernel::HashQuery { .. } => "hash query",
            Kernel::Score { .. } => "score",
            Kernel::Select => "select",
            Kernel::Collect => "collect",
            Kernel::Attend { .. } | Kernel::AttendBulk { .. } | Kernel::AttendAny { .. } => "attend",
            Kernel::Prefill { .. } => "prefill",
        }
    }
}

impl KernelKey for Key {
    #[cfg(test)]
    fn least_capability(&self) -> i32 {
        if matches!(self.kernel, Kernel::AttendBulk { .. } | Kernel::Score { runs: true }) { BULK_COPIES } else { 0 }
    }

    fn label(&self) -> String {
        let constants: Vec<_> = self.constants().iter().map(|(name, value)| format!("{name}={value}")).collect();
        format!("{} {}", self.kernel.text().2, constants.join(" "))
    }

    fn source(&self) -> KernelSource {
        let (file, text, entry) = self.kernel.text();
        let defines = self.constants().into_iter().map(|(name, value)| (name, value.to_string())).collect();
        KernelSource { file, text, headers: SOCKET_HEADERS, defines, options: &[], entry }
    }
}
