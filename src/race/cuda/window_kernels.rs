//! The kernels of the window.

use super::kernels::{HEADERS, code, kernel};
use crate::engine::cuda::{KernelKey, KernelSource, Stage, Strides};
use crate::race::window::WindowGeometry;
use crate::tensor::DType;
use bytemuck::{Pod, Zeroable};

/// Sequences whose lengths fit the parameters.
const NEAR: usize = 16;

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
    /// Tokens of each sequence of few.
    pub near: [u32; NEAR],
}

impl WindowGeometry {
    /// Channels of k and v.
    pub fn channels(&self) -> usize {
        self.head_dim + self.value_dim
    }

    /// Whether the tensor cores take it where blocks may have `most` bytes of shared memory, if its rows are aligned.
    pub fn has_tiles(&self, most: usize) -> bool {
        let fits = |dim: usize| dim.is_multiple_of(16) && dim <= 128;
        fits(self.head_dim) && fits(self.value_dim) && self.tile_bytes(true) <= most
    }

    /// Parts of an input's element in shared memory, and tiles that a block has under way.
    fn parts_and_stages(&self) -> (usize, usize) {
        if self.dtype == DType::F32 { (3, 1) } else { (1, 3) }
    }

    /// Dynamic shared memory of a block on the tensor cores: tiles of its 64 rows, with both sides of them in a
    /// `backward`, and those of 32 rows of the other side.
    fn tile_bytes(&self, backward: bool) -> usize {
        let (parts, stages) = self.parts_and_stages();
        let [keys, values] = [self.head_dim, self.value_dim].map(|dim| (dim + 8) * 2 * parts);
        let own = 64 * if backward { keys + values } else { keys };
        // Where the results of 64 rows of o are at the end.
        (own + stages * 32 * (keys + values)).max(64 * (self.value_dim + 4) * 4)
    }
}

/// How kernels that tile rows do so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Way {
    /// Any shape and type, in f32.
    Any,
    /// On the tensor cores, computed operands in `terms` bf16 parts.
    Tiles { terms: usize },
}

impl Way {
    /// Rows of a tile.
    pub fn rows(self) -> usize {
        match self {
            Self::Any => 32,
            Self::Tiles { .. } => 64,
        }
    }

    /// Threads of a block.
    pub fn threads(self) -> u32 {
        match self {
            Self::Any => 256,
            Self::Tiles { .. } => 128,
        }
    }
}

/// What a kernel does. `grad` is the dtype of the gradient of o.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum WindowKernel {
    /// o, mixed with RACE's, which is of dtype `race`.
    Attend { way: Way, output: DType, race: DType },
    /// The same for one token of each sequence, which the ring takes in.
    Step { output: DType },
    /// o again, and the gradient of o parted: RACE's part takes the place of its o.
    Halve { way: Way, grad: DType, race: DType },
    /// The last keys and values into the ring.
    Store,
    /// Gradients of the gates from shares.
    Gates,
    /// Counts the tokens that the ring took in.
    Count,
    /// The gradient of the ring to the tokens of the call.
    HandOver,
    /// dq.
    Query { way: Way, grad: DType },
    /// dk and dv, of tokens of the call and before it.
    Key { way: Way, grad: DType },
}

/// One kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct WindowKey {
    pub kernel: WindowKernel,
    pub geometry: WindowGeometry,
}

impl WindowKernel {
    /// File, text, function.
    fn text(self) -> (&'static str, &'static str, &'static str) {
        match (self, self.way()) {
            (Self::Attend { .. } | Self::Halve { .. }, Way::Any) => {
                kernel!("any/", "window_attend", "any_window_attend")
            }
            (Self::Query { .. }, Way::Any) => kernel!("any/", "window_query", "any_window_query"),
            (Self::Key { .. }, Way::Any) => kernel!("any/", "window_key", "any_window_key"),
            (Self::Attend { .. } | Self::Halve { .. }, _) => kernel!("", "window_attend", "window_attend"),
            (Self::Query { .. }, _) => kernel!("", "window_query", "window_query"),
            (Self::Key { .. }, _) => kernel!("", "window_key", "window_key"),
            (Self::Step { .. }, _) => kernel!("", "window_step", "window_step"),
            (Self::Store, _) => kernel!("", "window_store", "window_store"),
            (Self::Count, _) => kernel!("", "window_count", "window_count"),
            (Self::Gates, _) => kernel!("", "window_gates", "window_gates"),
            (Self::HandOver, _) => kernel!("", "window_hand_over", "window_hand_over"),
        }
    }

    fn way(self) -> Way {
        match self {
            Self::Attend { way, .. } | Self::Halve { way, .. } | Self::Query { way, .. } | Self::Key { way, .. } => way,
            Self::Step { .. } | Self::Store | Self::Count | Self::Gates | Self::HandOver => Way::Any,
        }
    }

    fn defines(self) -> Vec<(&'static str, String)> {
        let mut defines = match self {
            Self::Attend { output, race, .. } => vec![("OUT_TYPE", code(output)), ("RACE_TYPE", code(race))],
            Self::Step { output } => vec![("OUT_TYPE", code(output)), ("RACE_TYPE", code(DType::F32))],
            Self::Halve { grad, race, .. } => {
                vec![("HALVE", "1".into()), ("GRAD_TYPE", code(grad)), ("RACE_TYPE", code(race))]
            }
            Self::Query { grad, .. } | Self::Key { grad, .. } => vec![("GRAD_TYPE", code(grad))],
            Self::Store | Self::Count | Self::Gates | Self::HandOver => Vec::new(),
        };
        if let Way::Tiles { terms } = self.way() {
            defines.push(("TERMS", terms.to_string()));
        }
        defines
    }

    /// All of a geometry, for a test that goes through them.
    #[cfg(test)]
    pub fn every(way: Way, output: DType, grad: DType) -> Vec<Self> {
        let race = if way == Way::Any { DType::F32 } else { output };
        let attending = [Self::Attend { way, output, race }, Self::Halve { way, grad, race }];
        let of_gradients = [Self::Query { way, grad }, Self::Key { way, grad }];
        let small = [Self::Step { output }, Self::Store, Self::Count, Self::Gates, Self::HandOver];
        let small = small.into_iter().filter(|_| way == Way::Any);
        attending.into_iter().chain(of_gradients).chain(small).collect()
    }
}

impl WindowKey {
    /// Bytes of dynamic shared memory.
    pub fn shared(&self) -> u32 {
        let backward = matches!(self.kernel, WindowKernel::Query { .. } | WindowKernel::Key { .. });
        if self.kernel.way() == Way::Any { 0 } else { self.geometry.tile_bytes(backward) as u32 }
    }
}

impl Stage for WindowKey {
    fn stage(&self) -> &'static str {
        match self.kernel {
            WindowKernel::Attend { .. } => "window",
            WindowKernel::Step { .. } => "window step",
            WindowKernel::Halve { .. } => "window halve",
            WindowKernel::Store => "window store",
            WindowKernel::Count => "window count",
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
            ("WINDOW_STAGES", g.parts_and_stages().1),
        ];
        defines.extend(constants.map(|(name, value)| (name, value.to_string())));
        defines.push(("IN_TYPE", code(g.dtype)));
        KernelSource { file, text, headers: HEADERS, defines, options: &[], entry }
    }
}
