//! What a backend must do. [`crate::Race`] checks and composes; executors attend and keep states.
//!
//! Attention over a whole sequence is made of three passes, each of which takes any number of tokens and carries a
//! state, so that prompts, single steps and streams are the same code:
//!
//! | pass | forward | backward |
//! |---|---|---|
//! | [`Pass::Causal`] | o from the state and the tokens so far; the state moves on | needs the state before the tokens and the gradient of the state after them; gives all gradients, and the gradient of the state before |
//! | [`Pass::Absorb`] | the state takes in k and v | gives dk and dv from the gradient of the state, which stays |
//! | [`Pass::Read`] | o from the state, which stays | gives dq, and adds to the gradient of the state |
//!
//! Attention that is not causal is Absorb over all tokens, then Read; its backward is Read over all tokens, then
//! Absorb.

use crate::engine::{Recording, WarmUp};
use crate::error::{Error, Result};
use crate::race::config::Parameters;
use crate::race::cpu::{CpuParameterSums, CpuState};
#[cfg(feature = "cuda")]
use crate::race::cuda::{CudaParameterSums, CudaState};
#[cfg(feature = "wgpu")]
use crate::race::gpu::{GpuParameterSums, GpuState};
use crate::tensor::{DType, Tensor, TensorView};

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Pass {
    Causal,
    Absorb,
    Read,
}

impl Pass {
    pub fn reads(self) -> bool {
        self != Self::Absorb
    }

    pub fn absorbs(self) -> bool {
        self != Self::Read
    }
}

/// One call over a ragged batch, checked.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub op: &'static str,
    pub pass: Pass,
    /// Tokens of each sequence; the tensors' rows after them are padding: read by nobody, zero in results.
    pub lengths: Vec<usize>,
    /// Tokens that the tensors have room for, at least the largest length.
    pub tokens: usize,
    /// Element type of o.
    pub output: DType,
    /// Element type of a backward's dq, dk and dv: f32, or that of the inputs.
    pub gradients: DType,
    /// Zeros that a device may put o into instead of memory of its own, so that nothing is left to fail after the pass.
    #[cfg_attr(not(feature = "wgpu"), allow(dead_code))]
    pub into: Option<Tensor>,
}

impl Call {
    pub fn batch(&self) -> usize {
        self.lengths.len()
    }

    /// For what gives gradients in f32 alone, as `who`.
    #[cfg_attr(not(any(feature = "wgpu", feature = "cuda")), allow(dead_code))]
    pub fn wide_gradients(&self, who: &str) -> Result<()> {
        if self.gradients == DType::F32 {
            return Ok(());
        }
        let why = format!("{who} gives gradients in F32, not in {:?}", self.gradients);
        Err(Error::Unsupported { op: self.op, why })
    }
}

/// Inputs of a pass: q where it reads, k and v where it absorbs, the gradient of o in a backward that reads.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Inputs<'a> {
    pub q: Option<TensorView<'a>>,
    pub k: Option<TensorView<'a>>,
    pub v: Option<TensorView<'a>>,
    pub grad_o: Option<TensorView<'a>>,
}

/// Gradients that one backward pass gives, in the shapes of the inputs.
#[derive(Debug, Default)]
pub(crate) struct InputGradients {
    pub dq: Option<Tensor>,
    pub dk: Option<Tensor>,
    pub dv: Option<Tensor>,
}

/// A state (A and B of spec §4 per sequence, kv head and ensemble), or the gradient of one, where its executor keeps
/// it: in more than f32, so that sums over a billion tokens stay right.
#[derive(Debug)]
pub(crate) enum StateStorage {
    Cpu(CpuState),
    #[cfg(feature = "wgpu")]
    Gpu(GpuState),
    #[cfg(feature = "cuda")]
    Cuda(CudaState),
}

/// Sums of the gradients of β and hyperplanes over all passes of a backward.
#[derive(Debug)]
pub(crate) enum ParameterSums {
    Cpu(CpuParameterSums),
    #[cfg(feature = "wgpu")]
    Gpu(GpuParameterSums),
    #[cfg(feature = "cuda")]
    Cuda(CudaParameterSums),
}

/// Access to what is here; what is elsewhere is refused.
macro_rules! access {
    ($storage:ident, $tensor:literal, $variant:ident, $kept:ty, $by:ident, $by_mut:ident, $here:literal) => {
        // Without a GPU path nothing can be elsewhere.
        #[allow(
            unreachable_patterns,
            unused_variables,
            dead_code,
            reason = "where there is one path only, or one to come"
        )]
        impl $storage {
            pub fn $by(&self, op: &'static str) -> Result<&$kept> {
                match self {
                    Self::$variant(kept) => Ok(kept),
                    other => Err(elsewhere(op, $tensor, other.place(), $here)),
                }
            }

            pub fn $by_mut(&mut self, op: &'static str) -> Result<&mut $kept> {
                match self {
                    Self::$variant(kept) => Ok(kept),
                    other => Err(elsewhere(op, $tensor, other.place(), $here)),
                }
            }
        }
    };
}

macro_rules! place {
    ($storage:ident) => {
        impl $storage {
            fn place(&self) -> &'static str {
                match self {
                    Self::Cpu(_) => "the CPU",
                    #[cfg(feature = "wgpu")]
                    Self::Gpu(_) => "a GPU",
                    #[cfg(feature = "cuda")]
                    Self::Cuda(_) => "a CUDA device",
                }
            }
        }
    };
}

place!(StateStorage);
place!(ParameterSums);
access!(StateStorage, "state", Cpu, CpuState, cpu, cpu_mut, "the CPU");
access!(ParameterSums, "parameter sums", Cpu, CpuParameterSums, cpu, cpu_mut, "the CPU");
#[cfg(feature = "wgpu")]
access!(StateStorage, "state", Gpu, GpuState, gpu, gpu_mut, "a GPU");
#[cfg(feature = "wgpu")]
access!(ParameterSums, "parameter sums", Gpu, GpuParameterSums, gpu, gpu_mut, "a GPU");
#[cfg(feature = "cuda")]
access!(StateStorage, "state", Cuda, CudaState, cuda, cuda_mut, "a CUDA device");
#[cfg(feature = "cuda")]
access!(ParameterSums, "parameter sums", Cuda, CudaParameterSums, cuda, cuda_mut, "a CUDA device");

pub(crate) use {access, place};

pub(crate) fn elsewhere(op: &'static str, tensor: &'static str, got: &'static str, expected: &'static str) -> Error {
    Error::WrongDevice { op, tensor, got, expected }
}

impl StateStorage {
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Cpu(state) => state.bytes(),
            #[cfg(feature = "wgpu")]
            Self::Gpu(state) => state.bytes(),
            #[cfg(feature = "cuda")]
            Self::Cuda(state) => state.bytes(),
        }
    }
}

/// A state in its backend-free form.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct StateData {
    /// `[batch, num_kv_heads, ensembles, buckets]`.
    pub a: Vec<f64>,
    /// `[batch, num_kv_heads, ensembles, buckets, value_dim]`.
    pub b: Vec<f64>,
}

/// A backend of [`crate::Race`]. A failed call leaves states and sums as they were.
pub(crate) trait RaceExecutor: Send {
    /// Takes new hyperplanes and β.
    fn set_parameters(&mut self, parameters: &Parameters) -> Result<()>;
    /// A state of zeros.
    fn new_state(&self, op: &'static str, batch: usize) -> Result<StateStorage>;
    /// A copy of its own.
    fn fork(&self, op: &'static str, state: &StateStorage) -> Result<StateStorage>;
    /// Sums of zero.
    fn new_sums(&self, op: &'static str) -> Result<ParameterSums>;
    /// Runs a forward pass: o where it reads, and `state` moved on where it absorbs.
    fn forward(
        &mut self,
        rec: Recording<'_>,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &mut StateStorage,
    ) -> Result<Option<Tensor>>;
    /// Runs a backward pass. `state` is the one before the tokens ([`Pass::Causal`]) or after all of them
    /// ([`Pass::Read`], [`Pass::Absorb`]); `grad_state` becomes the gradient of the state before the tokens.
    fn backward(
        &mut self,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &StateStorage,
        grad_state: &mut StateStorage,
        sums: &mut ParameterSums,
    ) -> Result<InputGradients>;
    /// Gradients of β (one, or one per kv head) and of the hyperplanes (in the layout of [`Parameters`]), f32.
    fn finish_sums(&self, op: &'static str, sums: ParameterSums) -> Result<(Tensor, Tensor)>;
    /// A state in its backend-free form; waits for the device.
    fn export(&self, op: &'static str, state: &StateStorage) -> Result<StateData>;
    /// The reverse.
    fn import(&self, op: &'static str, data: &StateData) -> Result<StateStorage>;
    /// Compiles whatever calls of these passes need, once it is run.
    fn warm_up(&self, _output: DType) -> WarmUp {
        WarmUp::default()
    }
}

/// An input that the pass takes.
pub(crate) fn needed<'a>(
    op: &'static str,
    tensor: &'static str,
    view: Option<TensorView<'a>>,
) -> Result<TensorView<'a>> {
    view.ok_or_else(|| Error::Unsupported { op, why: format!("{tensor} is needed by this pass") })
}
