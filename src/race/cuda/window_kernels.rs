//! The kernels of the window.

use super::kernels::code;
use crate::engine::cuda::{KernelKey, KernelSource, Stage, Strides};
use crate::race::window::WindowSpec;
use crate::tensor::DType;
use bytemuck::{Pod, Zeroable};

/// Sequences that fit the parameters.
const NEAR: usize = 16;

/// Twin of `Sequence` in shaders/cuda/race/window.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct Sequence {
    /// Tokens of the call.
    pub length: u32,
    /// Tokens before it that the window reaches.
    pub past: u32,
    /// Slot of the call's first token.
    pub slot: u32,
    pub reserved: u32,
}

/// Twin of `Params` in shaders/cuda/race/window.cuh, which asserts its size. A kernel reads the fields that concern it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct Params {
    pub q: Strides,
    pub k: Strides,
    pub v: Strides,
    pub grad_o: Strides,
    pub batch: u32,
    /// Tokens that the tensors have room for.
    pub tokens: u32,
    /// Tokens of the window.
    pub window: u32,
    /// Tiles of a sequence, or shares of the gates' gradients.
    pub tiles: u32,
    /// Tiles of keys before the call.
    pub ring_tiles: u32,
    pub gates: u32,
    /// Scale of the logits.
    pub scale: f32,
    pub reserved: u32,
    pub near: [Sequence; NEAR],
}

/// What shapes the kernels: all that their text depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct WindowGeometry {
    pub num_q_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub dtype: DType,
}

impl WindowGeometry {
    pub fn new(spec: &WindowSpec) -> Self {
        let shape = &spec.shape;
        Self {
            num_q_heads: shape.num_q_heads,
            num_kv_heads: shape.num_kv_heads,
            head_dim: shape.head_dim,
            value_dim: shape.value_dim,
            dtype: shape.dtype,
        }
    }

    pub fn group(&self) -> usize {
        self.num_q_heads / self.num_kv_heads
    }

    /// Channels of k and v.
    pub fn channels(&self) -> usize {
        self.head_dim + self.value_dim
    }

    /// Elements of a ring's row: k's channels and v's, an even number.
    pub fn ring_row(&self) -> usize {
        self.channels().next_multiple_of(2)
    }
}

/// What a kernel does. `grad` is the dtype of the gradient of o.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum WindowKernel {
    /// o, mixed with RACE's.
    Attend { output: DType },
    /// The same for one token of each sequence, which the ring takes in.
    Step { output: DType },
    /// o again, and the gradient of o parted.
    Halve { grad: DType },
    /// The last keys and values into the ring.
    Store,
    /// Gradients of the gates from shares.
    Gates,
    /// The gradient of the ring to the tokens of the call.
    HandOver,
    /// dq.
    Query { grad: DType },
    /// dk and dv, of tokens of the call and before it.
    Key { grad: DType },
}

/// One kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct WindowKey {
    pub kernel: WindowKernel,
    pub geometry: WindowGeometry,
}

macro_rules! kernel {
    ($folder:literal, $name:literal, $entry:literal) => {
        (
            concat!("race/", $folder, $name, ".cu"),
            include_str!(concat!("../../../shaders/cuda/race/", $folder, $name, ".cu")),
            $entry,
        )
    };
}

const HEADERS: &[(&str, &str)] = &[
    ("numbers.cuh", include_str!("../../../shaders/cuda/common/numbers.cuh")),
    ("machine.cuh", include_str!("../../../shaders/cuda/race/machine.cuh")),
    ("window.cuh", include_str!("../../../shaders/cuda/race/window.cuh")),
    ("window_tile.cuh", include_str!("../../../shaders/cuda/race/any/window_tile.cuh")),
];

impl WindowKernel {
    /// File, text, function.
    fn text(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Attend { .. } | Self::Halve { .. } => kernel!("any/", "window_attend", "any_window_attend"),
            Self::Query { .. } => kernel!("any/", "window_query", "any_window_query"),
            Self::Key { .. } => kernel!("any/", "window_key", "any_window_key"),
            Self::Step { .. } => kernel!("", "window_step", "window_step"),
            Self::Store => kernel!("", "window_store", "window_store"),
            Self::Gates => kernel!("", "window_gates", "window_gates"),
            Self::HandOver => kernel!("", "window_hand_over", "window_hand_over"),
        }
    }

    fn defines(self) -> Vec<(&'static str, String)> {
        match self {
            Self::Attend { output } | Self::Step { output } => vec![("OUT_TYPE", code(output))],
            Self::Halve { grad } => {
                vec![("HALVE", "1".into()), ("GRAD_TYPE", code(grad)), ("HALF_TYPE", code(DType::F32))]
            }
            Self::Query { grad } | Self::Key { grad } => vec![("GRAD_TYPE", code(grad))],
            Self::Store | Self::Gates | Self::HandOver => Vec::new(),
        }
    }

    /// All of a geometry, for a test that goes through them.
    #[cfg(test)]
    pub fn every(output: DType, grad: DType) -> Vec<Self> {
        vec![
            Self::Attend { output },
            Self::Step { output },
            Self::Halve { grad },
            Self::Store,
            Self::Gates,
            Self::HandOver,
            Self::Query { grad },
            Self::Key { grad },
        ]
    }
}

impl Stage for WindowKey {
    fn stage(&self) -> &'static str {
        match self.kernel {
            WindowKernel::Attend { .. } => "window",
            WindowKernel::Step { .. } => "window step",
            WindowKernel::Halve { .. } => "window halve",
            WindowKernel::Store => "window store",
            WindowKernel::Gates => "window gates",
            WindowKernel::HandOver => "window hand over",
            WindowKernel::Query { .. } => "window query",
            WindowKernel::Key { .. } => "window key",
        }
    }
}

impl KernelKey for WindowKey {
    fn label(&self) -> String {
        let g = &self.geometry;
        format!(
            "race window {:?} heads={}/{} dims={}/{} {:?}",
            self.kernel, g.num_q_heads, g.num_kv_heads, g.head_dim, g.value_dim, g.dtype,
        )
    }

    fn source(&self) -> KernelSource {
        let g = &self.geometry;
        let (file, text, entry) = self.kernel.text();
        let mut defines = self.kernel.defines();
        let constants = [
            ("KV_HEADS", g.num_kv_heads),
            ("GROUP", g.group()),
            ("HEAD_DIM", g.head_dim),
            ("VALUE_DIM", g.value_dim),
            ("PARAMS_BYTES", size_of::<Params>()),
        ];
        defines.extend(constants.map(|(name, value)| (name, value.to_string())));
        defines.push(("IN_TYPE", code(g.dtype)));
        KernelSource { file, text, headers: HEADERS, defines, options: &[], entry }
    }
}
