//! The kernels of the window.

use super::kernels::SNIPPETS;
use crate::engine::gpu::{Assembler, GridParams, KernelKey, KernelSource, Stage, Strides, dtype_define};
use crate::race::window::WindowGeometry;
use crate::tensor::DType;
use bytemuck::{Pod, Zeroable};

/// Twin of `Params` in shaders/race/window_params.wgsl. A kernel reads the fields that concern it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct WindowParams {
    /// Workgroups that have work; the folded grid may hold more.
    pub groups: u32,
    /// Workgroups along x of the folded grid.
    pub group_width: u32,
    /// Sequences of the piece.
    pub batch: u32,
    /// Tokens that the piece has room for.
    pub tokens: u32,
    /// First of them, counted from the call's.
    pub first: u32,
    /// First token of the first input, and of what is kept.
    pub in_first: u32,
    /// First token of keys and values.
    pub in2_first: u32,
    /// What the kernel defines.
    pub flags: u32,
    pub input: Strides,
    pub input2: Strides,
    pub input3: Strides,
    /// First element of the result, and elements from one sequence's to the next's.
    pub out_at: u32,
    pub out_batch: u32,
    /// Likewise for the second result, or RACE's o.
    pub out2_at: u32,
    pub out2_batch: u32,
    /// First element of the ring of the piece's first sequence.
    pub ring_at: u32,
    /// As `out_at` for what is kept.
    pub keep_at: u32,
    pub keep_batch: u32,
    /// Scale of the logits.
    pub scale: f32,
    /// Zero, which no compiler knows.
    pub zero: u32,
    /// Tokens of the window.
    pub window: u32,
    pub reserved: [u32; 2],
}

impl GridParams for WindowParams {
    fn with_grid(self, groups: u32, group_width: u32) -> Self {
        Self { groups, group_width, ..self }
    }
}

impl WindowGeometry {
    /// Elements that a backward pass keeps of a token and query head.
    pub fn keep_row(&self) -> usize {
        self.value_dim + 2
    }
}

/// What a kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum WindowKernel {
    /// o, mixed with RACE's.
    Attend { output: DType },
    /// o and lse for a backward pass.
    Keep,
    /// The last keys and values into the ring.
    Store,
    /// Parts the gradient of o, of dtype `grad`.
    Halve { grad: DType },
    /// Gradients of the gates from shares.
    Gates,
    /// The gradient of the ring to the tokens of the call.
    HandOver,
    /// dq.
    Query,
    /// dk and dv; `ring`: of the tokens before the call.
    Key { ring: bool },
}

impl WindowKernel {
    fn text(self) -> &'static str {
        match self {
            Self::Attend { .. } | Self::Keep => include_str!("../../../shaders/race/window_attend.wgsl"),
            Self::Store => include_str!("../../../shaders/race/window_store.wgsl"),
            Self::Halve { .. } => include_str!("../../../shaders/race/window_halve.wgsl"),
            Self::Gates => include_str!("../../../shaders/race/window_gates.wgsl"),
            Self::HandOver => include_str!("../../../shaders/race/window_hand_over.wgsl"),
            Self::Query => include_str!("../../../shaders/race/window_query.wgsl"),
            Self::Key { .. } => include_str!("../../../shaders/race/window_key.wgsl"),
        }
    }

    /// Storage bindings after the uniform, `true` where written. The first is always the piece's info.
    fn storage(self) -> &'static [bool] {
        const R: bool = false;
        const W: bool = true;
        match self {
            Self::Attend { .. } | Self::Query => &[R, R, R, R, R, R, W],
            Self::Keep => &[R, R, R, R, R, W],
            Self::Store => &[R, R, R, W],
            Self::Halve { .. } => &[R, R, W, W, W],
            Self::Gates => &[R, R, W],
            Self::HandOver => &[R, W, W, W],
            Self::Key { ring: false } => &[R, R, R, R, R, W, W],
            Self::Key { ring: true } => &[R, R, R, R, W],
        }
    }

    /// All of a geometry, for a test that goes through them.
    #[cfg(test)]
    pub fn every(geometry: &WindowGeometry) -> Vec<Self> {
        let mut all = vec![Self::Keep, Self::Store, Self::Gates, Self::HandOver, Self::Query];
        all.extend([false, true].map(|ring| Self::Key { ring }));
        all.extend([DType::F32, DType::F16, DType::Bf16].map(|output| Self::Attend { output }));
        all.extend([DType::F32, geometry.dtype].map(|grad| Self::Halve { grad }));
        all
    }
}

/// One pipeline.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WindowKey {
    pub kernel: WindowKernel,
    pub geometry: WindowGeometry,
}

impl WindowKey {
    fn defines(&self) -> Vec<&'static str> {
        let kernel = self.kernel;
        let input = if let WindowKernel::Halve { grad } = kernel { grad } else { self.geometry.dtype };
        let mut defines = vec![dtype_define("IN", input)];
        match kernel {
            WindowKernel::Attend { output } => defines.extend([dtype_define("OUT", output), "RING_AT"]),
            WindowKernel::Keep => defines.extend(["KEEP", "RING_AT"]),
            WindowKernel::Query => defines.push("RING_AT"),
            WindowKernel::Key { ring: true } => defines.extend(["RING", "RING_AT"]),
            _ => {}
        }
        defines
    }

    fn constants(&self) -> Vec<(&'static str, u32)> {
        let g = &self.geometry;
        let ring_binding = if self.kernel == (WindowKernel::Key { ring: true }) { 3 } else { 5 };
        let constants = [
            ("Q_HEADS", g.num_q_heads),
            ("KV_HEADS", g.num_kv_heads),
            ("GROUP", g.group()),
            ("HEAD_DIM", g.head_dim),
            ("VALUE_DIM", g.value_dim),
            ("COLUMNS", 1),
            ("RING_BINDING", ring_binding),
        ];
        constants.map(|(name, value)| (name, value as u32)).into()
    }
}

impl Stage for WindowKey {
    fn stage(&self) -> &'static str {
        match self.kernel {
            WindowKernel::Attend { .. } => "window",
            WindowKernel::Keep => "window again",
            WindowKernel::Store => "window store",
            WindowKernel::Halve { .. } => "window halve",
            WindowKernel::Gates => "window gates",
            WindowKernel::HandOver => "window hand over",
            WindowKernel::Query => "window query",
            WindowKernel::Key { .. } => "window key",
        }
    }
}

impl KernelKey for WindowKey {
    fn label(&self) -> String {
        let g = &self.geometry;
        let flags = self.defines().join(",");
        format!(
            "race window {:?} heads={}/{} dims={}/{} [{flags}]",
            self.kernel, g.num_q_heads, g.num_kv_heads, g.head_dim, g.value_dim,
        )
    }

    fn source(&self) -> KernelSource {
        let assembled = Assembler::assemble(self.kernel.text(), SNIPPETS, &self.defines(), &self.constants());
        KernelSource::new(assembled, size_of::<WindowParams>(), self.kernel.storage())
    }
}
