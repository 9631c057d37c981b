//! The exact window beside RACE: `o = g·o_window + (1 − g)·o_race`, with one gate g per query head.
//!
//! The window is a fourth pass beside the three of [`crate::race::executor`]: causal softmax attention over the last W
//! tokens. A state keeps the keys and values of its last W tokens in a ring, in their own dtype: the token at position p
//! of its sequence stands in slot p modulo W, so a step writes one slot. A segment's first tokens attend to the ring that
//! the segment before left.
//!
//! The gradient of a ring belongs to the gradient of the state: a backward pass adds what arrives for the tokens that it
//! wrote itself to their dk and dv, and hands on the rest, together with what its own queries send to the tokens before
//! the segment.
//!
//! | forward | |
//! |---|---|
//! | RACE | o_race, in f32 (on the tensor cores of CUDA in o's dtype) |
//! | window | o_window, mixed with o_race into o; then the ring takes in the last keys and values |
//!
//! | backward | |
//! |---|---|
//! | RACE, window | both outputs again, for dg = Σ grad_o·(o_window − o_race); o_window's lse is kept |
//! | gate | (1 − g)·grad_o in the place of o_race |
//! | RACE | its backward, given that |
//! | window | its backward, given g·grad_o, from lse; adds to dq, dk and dv |
//!
//! Both outputs are computed again rather than kept by the caller, as all of RACE's backward is. Beyond inputs and
//! results, a forward call holds o_race, 4·Dv bytes per token and query head (or o's own size where o_race has its
//! dtype). A backward call holds as much for (1 − g)·grad_o (on the CPU twice that while it replaces o_race), and beside
//! it lse and g·grad_o·o_window, 8 bytes, or 4·(Dv + 2) on the wgpu path, where the window's kernels read g·grad_o with
//! them. The ring takes W·(D + Dv) elements per sequence and kv head.
//!
//! dg needs both outputs of every query head. RACE's share of it, Σ grad_o·o_race, is the same number as Σ v·dv where
//! o is linear in v, but only for the query heads of a kv head together: so o_race is computed again.

use crate::engine::{Recording, WarmUp};
use crate::error::{Error, Result};
use crate::race::attention::Race;
use crate::race::config::{Gate, RaceConfig, RaceShape};
use crate::race::cpu::CpuRing;
#[cfg(feature = "cuda")]
use crate::race::cuda::CudaRing;
use crate::race::executor::{Call, InputGradients, Inputs, ParameterSums, Pass, access, elsewhere, place};
#[cfg(feature = "wgpu")]
use crate::race::gpu::GpuRing;
use crate::race::state::{RaceState, StateGradient};
use crate::tensor::{DType, Tensor};

/// What an executor of the window is made for.
#[derive(Clone, Debug)]
pub(crate) struct WindowSpec {
    pub shape: RaceShape,
    /// Tokens of the window, at least 1.
    pub tokens: usize,
    /// Scale of the logits.
    pub scale: f32,
    pub gate: Gate,
}

impl WindowSpec {
    /// `None` where there is no window.
    pub fn new(config: &RaceConfig, shape: &RaceShape) -> Option<Self> {
        let scale = config.window_scale.unwrap_or((1.0 / (shape.head_dim as f64).sqrt()) as f32);
        let spec = Self { shape: *shape, tokens: config.window, scale, gate: config.gate.clone() };
        (config.window > 0).then_some(spec)
    }
}

/// A call, and where in its sequence each begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WindowCall<'a> {
    pub call: &'a Call,
    /// Tokens that each sequence has taken in before.
    pub seen: &'a [u64],
}

impl WindowCall<'_> {
    /// Tokens before the call's first that the window of sequence `b` reaches.
    pub fn past(&self, b: usize, window: usize) -> usize {
        self.seen[b].min(window as u64 - 1) as usize
    }

    /// Slot of the first token of sequence `b`.
    pub fn slot(&self, b: usize, window: usize) -> usize {
        (self.seen[b] % window as u64) as usize
    }
}

/// The last keys and values of a batch of sequences where their executor keeps them; or their gradients, in f32.
#[derive(Debug)]
pub(crate) enum Ring {
    Cpu(CpuRing),
    #[cfg(feature = "wgpu")]
    Gpu(GpuRing),
    #[cfg(feature = "cuda")]
    Cuda(CudaRing),
}

/// A ring in its backend-free form, see [`crate::StateParts`].
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct RingData {
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

place!(Ring);
access!(Ring, "state", Cpu, CpuRing, cpu, cpu_mut, "the CPU");
#[cfg(feature = "wgpu")]
access!(Ring, "state", Gpu, GpuRing, gpu, gpu_mut, "a GPU");
#[cfg(feature = "cuda")]
access!(Ring, "state", Cuda, CudaRing, cuda, cuda_mut, "a CUDA device");

impl Ring {
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Cpu(ring) => ring.bytes(),
            #[cfg(feature = "wgpu")]
            Self::Gpu(ring) => ring.bytes(),
            #[cfg(feature = "cuda")]
            Self::Cuda(ring) => ring.bytes(),
        }
    }
}

/// A forward pass of the window that has everything that it needs.
pub(crate) trait Prepared {
    /// Where RACE may put its o.
    fn race_o(&self) -> Option<Tensor> {
        None
    }

    /// Runs it: o mixed from the window's and RACE's where RACE gave one, and the ring moved on.
    fn run(self: Box<Self>, rec: Recording<'_>, ring: &mut Ring, race: Option<Tensor>) -> Result<Option<Tensor>>;
}

/// Between the two halves of a backward pass.
pub(crate) struct Halved {
    /// (1 − g)·grad_o.
    pub race: Tensor,
    /// What the window's half goes on from.
    pub kept: Kept,
    /// Gradient of the gates: one, or one per query head.
    pub d_gate: Tensor,
}

/// What the window's half of a backward pass goes on from.
pub(crate) enum Kept {
    /// lse and g·grad_o·o_window, `[batch, token, num_q_heads]`.
    Cpu(Vec<[f32; 2]>),
    /// g·grad_o, lse and g·grad_o·o_window, `[batch, token, num_q_heads, value_dim + 2]`.
    #[cfg(feature = "wgpu")]
    Gpu(wgpu::Buffer),
    /// As on the CPU.
    #[cfg(feature = "cuda")]
    Cuda(crate::engine::cuda::Buffer),
}

place!(Kept);

// Without a GPU path nothing can be elsewhere.
#[allow(unreachable_patterns, unused_variables, reason = "where there is one path only")]
impl Kept {
    pub fn cpu(self, op: &'static str) -> Result<Vec<[f32; 2]>> {
        match self {
            Self::Cpu(rows) => Ok(rows),
            other => Err(elsewhere(op, "state", other.place(), "the CPU")),
        }
    }

    #[cfg(feature = "wgpu")]
    pub fn gpu(self, op: &'static str) -> Result<wgpu::Buffer> {
        match self {
            Self::Gpu(buffer) => Ok(buffer),
            other => Err(elsewhere(op, "state", other.place(), "a GPU")),
        }
    }

    #[cfg(feature = "cuda")]
    pub fn cuda(self, op: &'static str) -> Result<crate::engine::cuda::Buffer> {
        match self {
            Self::Cuda(buffer) => Ok(buffer),
            other => Err(elsewhere(op, "state", other.place(), "a CUDA device")),
        }
    }
}

/// What shapes the kernels: all that their text depends on.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct WindowGeometry {
    pub num_q_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub dtype: DType,
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
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

    /// Elements of a ring's row: k's channels and v's, an even number.
    pub fn ring_row(&self) -> usize {
        (self.head_dim + self.value_dim).next_multiple_of(2)
    }
}

/// A backend of the window. [`crate::Race`] checks and composes; a failed call leaves rings as they were.
pub(crate) trait WindowExecutor: Send {
    /// Takes new gates.
    fn set_gate(&mut self, gate: &Gate) -> Result<()>;
    /// A ring of zeros; of a gradient, f32.
    fn new_ring(&self, op: &'static str, batch: usize, gradient: bool) -> Result<Ring>;
    /// A copy of its own.
    fn fork(&self, op: &'static str, ring: &Ring) -> Result<Ring>;
    /// Element type in which it takes RACE's o of prompts whose o is `output`.
    fn prompt_dtype(&self, _output: DType) -> DType {
        DType::F32
    }
    /// Element type in which it takes RACE's o, and gives RACE's half of the gradient of o.
    fn race_dtype(&self, _call: &Call, _inputs: &Inputs<'_>) -> DType {
        DType::F32
    }
    /// Takes all that can fail of a forward pass ([`Pass::Causal`], or [`Pass::Absorb`]: the ring alone moves on).
    fn prepare<'a>(
        &'a mut self,
        call: WindowCall<'a>,
        inputs: &Inputs<'a>,
        ring: &Ring,
    ) -> Result<Box<dyn Prepared + 'a>>;
    /// Computes the window's output again, and parts the gradient of o; `race` is RACE's o.
    fn halve(&mut self, call: WindowCall<'_>, inputs: &Inputs<'_>, ring: &Ring, race: Tensor) -> Result<Halved>;
    /// Adds the window's half to `gradients`; `gradient` becomes that of the ring before the tokens.
    fn backward(
        &mut self,
        call: WindowCall<'_>,
        inputs: &Inputs<'_>,
        ring: &Ring,
        kept: Kept,
        gradient: &mut Ring,
        gradients: InputGradients,
    ) -> Result<InputGradients>;
    /// Refuses a ring that has taken in other tokens than `tokens` of each sequence, as after replays of a graph.
    fn check_count(&self, _op: &'static str, _ring: &Ring, _tokens: &[u64]) -> Result<()> {
        Ok(())
    }
    /// A ring in its backend-free form; waits for the device.
    fn export(&self, op: &'static str, ring: &Ring) -> Result<RingData>;
    /// The reverse; `tokens` is what each sequence has taken in.
    fn import(&self, op: &'static str, data: &RingData, tokens: &[u64], gradient: bool) -> Result<Ring>;
    /// Compiles whatever forward passes need, once it is run.
    fn warm_up(&self, _output: DType) -> WarmUp {
        WarmUp::default()
    }
}

fn missing(op: &'static str) -> Error {
    Error::Unsupported { op, why: "the state has no ring for the window".into() }
}

/// RACE and window, passes of both.
impl Race {
    /// A forward pass over the state, `call` being checked.
    pub(crate) fn forward_pass(
        &mut self,
        call: &Call,
        mut rec: Recording<'_>,
        inputs: &Inputs<'_>,
        state: &mut RaceState,
    ) -> Result<Option<Tensor>> {
        let Some(window) = &mut self.window else {
            return self.executor.forward(rec, call, inputs, &mut state.storage);
        };
        let op = call.op;
        if call.pass == Pass::Read {
            let why = "a window attends to tokens, which reading from a state alone does not give".into();
            return Err(Error::Unsupported { op, why });
        }
        let ring = state.ring.as_mut().ok_or_else(|| missing(op))?;
        let race_dtype = window.race_dtype(call, inputs);
        let prepared = window.prepare(WindowCall { call, seen: &state.tokens }, inputs, ring)?;
        let of_race = Call { output: race_dtype, into: prepared.race_o(), ..call.clone() };
        let o = self.executor.forward(rec.part(), &of_race, inputs, &mut state.storage)?;
        prepared.run(rec, ring, o)
    }

    /// A backward pass, `call` being checked: gradients of the inputs, and of the gates where there is a window.
    pub(crate) fn backward_pass(
        &mut self,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &RaceState,
        gradient: &mut StateGradient,
        sums: &mut ParameterSums,
    ) -> Result<(InputGradients, Option<Tensor>)> {
        let op = call.op;
        let executor = &mut self.executor;
        let Some(window) = &mut self.window else {
            let gradients = executor.backward(call, inputs, &state.storage, &mut gradient.storage, sums)?;
            return Ok((gradients, None));
        };
        call.wide_gradients("RACE with an exact window")?;
        let (ring, grad_ring) = state.ring.as_ref().zip(gradient.ring.as_mut()).ok_or_else(|| missing(op))?;
        let of_window = WindowCall { call, seen: &state.tokens };
        let of_race = Call { output: window.race_dtype(call, inputs), ..call.clone() };
        let mut moving = executor.fork(op, &state.storage)?;
        let o = executor.forward(Recording::Run, &of_race, inputs, &mut moving)?.ok_or_else(|| missing(op))?;
        drop(moving);
        let Halved { race, kept, d_gate } = window.halve(of_window, inputs, ring, o)?;
        let half = Inputs { grad_o: race.view(), ..*inputs };
        let gradients = executor.backward(call, &half, &state.storage, &mut gradient.storage, sums)?;
        drop(race);
        let gradients = window.backward(of_window, inputs, ring, kept, grad_ring, gradients)?;
        Ok((gradients, Some(d_gate)))
    }
}
