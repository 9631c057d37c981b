//! The public operations: checks, and the passes that compose them.

use crate::device::Device;
use crate::engine::Recording;
use crate::error::{Error, Result};
use crate::race::config::{Beta, Gate, Parameters, RaceConfig, RaceShape, check_gate};
use crate::race::executor::{Call, InputGradients, Inputs, Pass, RaceExecutor};
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use crate::race::plan::Geometry;
use crate::race::state::{RaceState, StateGradient, StateShape};
use crate::race::window::{WindowExecutor, WindowSpec};
use crate::tensor::{DType, Tensor, TensorView};

/// Tokens of one sequence at most; far below what its sums hold exactly.
const MAX_TOKENS: u64 = 1 << 48;

/// RACE attention (arXiv 2510.04008): linear-time attention by soft hashing, forward and backward, for prompts, single
/// steps and streams.
///
/// It sees a sequence through sums over S = tables·2^planes buckets, so time grows linearly with the context and the
/// state of a sequence not at all.
///
/// ```
/// use softhash::{DType, Device, Race, RaceConfig, RaceShape, TensorView};
///
/// let shape = RaceShape { num_q_heads: 4, num_kv_heads: 2, head_dim: 16, value_dim: 16, dtype: DType::F32 };
/// let mut race = Race::new(&Device::cpu(), RaceConfig::default(), shape)?;
/// let x: Vec<f32> = (0..10 * 4 * 16).map(|i| (i as f32 * 0.7).sin()).collect();
/// let (q, kv) = (TensorView::f32(&x, [1, 10, 4, 16]), TensorView::f32(&x, [1, 10, 2, 16]));
/// // The prompt.
/// let mut out = race.forward(&q, &kv, &kv, None)?;
/// assert_eq!(out.o.shape(), [1, 10, 4, 16]);
/// // One more token: the state is all there is of the past.
/// let (q, kv) = (TensorView::f32(&x, [1, 1, 4, 16]), TensorView::f32(&x, [1, 1, 2, 16]));
/// let o = race.append(&mut out.state, &q, &kv, &kv)?;
/// assert_eq!(o.read_blocking()?.to_f32().len(), 4 * 16);
/// assert_eq!(out.state.tokens(0), Some(11));
/// # Ok::<(), softhash::Error>(())
/// ```
pub struct Race {
    device: Device,
    config: RaceConfig,
    shape: RaceShape,
    pub(super) executor: Box<dyn RaceExecutor>,
    pub(super) window: Option<Box<dyn WindowExecutor>>,
}

impl std::fmt::Debug for Race {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { device, config, shape, .. } = self;
        f.debug_struct("Race").field("device", device).field("config", config).field("shape", shape).finish()
    }
}

/// Options of [`Race`]'s calls.
#[derive(Clone, Debug, Default)]
pub struct RaceOptions {
    /// Element type of o; that of the inputs by default. F32 keeps what low precision would round away: with a flat
    /// hash the part of o that depends on the query is small.
    pub output: Option<DType>,
    /// Element type of dq, dk and dv, which only [`Race::backward`] reads: F32 by default, or that of the inputs, which
    /// is half the bytes where that is of 16 bits. The CPU gives both, and CUDA in causal passes that its tensor cores
    /// take; neither with an exact window. Elsewhere it is [`Error::Unsupported`], and another type [`Error::DType`].
    pub gradients: Option<DType>,
    /// Tokens of each sequence where they differ; the rows after them are padding, which nobody reads and which is zero
    /// in results.
    pub lengths: Option<Vec<usize>>,
}

/// Result of [`Race::forward`].
#[derive(Debug)]
pub struct RaceOutput {
    /// `[batch, token, num_q_heads, value_dim]`.
    pub o: Tensor,
    /// The state after all tokens.
    pub state: RaceState,
}

/// Result of [`Race::backward`]; dq, dk and dv as [`RaceOptions::gradients`] says, the others f32.
#[derive(Debug)]
pub struct RaceGradients {
    /// `[batch, token, num_q_heads, head_dim]`.
    pub dq: Tensor,
    /// `[batch, token, num_kv_heads, head_dim]`.
    pub dk: Tensor,
    /// `[batch, token, num_kv_heads, value_dim]`.
    pub dv: Tensor,
    /// Of β: `[1]`, or `[num_kv_heads]` where there is one per head.
    pub d_beta: Tensor,
    /// Of the hyperplanes, `[sets, ensembles * tables * planes, head_dim]`; sets is 1, or `num_kv_heads`.
    pub d_planes: Tensor,
    /// Of the gates of an exact window, where there is one: `[1]`, or `[num_q_heads]` where there is one per head.
    pub d_gate: Option<Tensor>,
    /// Of the initial state.
    pub d_initial_state: StateGradient,
}

/// Making, asking, setting.
impl Race {
    /// RACE attention on `device`.
    ///
    /// # Errors
    /// [`Error::Config`] for a field out of range, [`Error::Unsupported`] or [`Error::Limit`] for a shape that the
    /// device cannot take.
    pub fn new(device: &Device, config: RaceConfig, shape: RaceShape) -> Result<Self> {
        config.validate(&shape)?;
        let parameters = Parameters::new(&config, &shape)?;
        let executor = device.race_executor(&config, &shape, &parameters)?;
        let spec = WindowSpec::new(&config, &shape);
        let window = spec.map(|spec| device.window_executor(spec)).transpose()?;
        Ok(Self { device: device.clone(), config, shape, executor, window })
    }

    /// The device it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its configuration.
    pub fn config(&self) -> &RaceConfig {
        &self.config
    }

    /// Its shapes.
    pub fn shape(&self) -> RaceShape {
        self.shape
    }

    /// Sizes of its states.
    pub fn state_shape(&self) -> StateShape {
        StateShape::new(&self.config, &self.shape)
    }

    /// Bytes that a pass over `tokens` tokens of one sequence moves at least, backward with `gradients` of that type, for
    /// benches.
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    #[doc(hidden)]
    pub fn least_bytes(&self, tokens: u64, gradients: Option<DType>) -> u64 {
        Geometry::new(&self.config, &self.shape).least_bytes(tokens, gradients)
    }

    /// Bytes that a step of one token of `batch` sequences moves at least, for benches.
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    #[doc(hidden)]
    pub fn step_bytes(&self, batch: u64) -> u64 {
        Geometry::new(&self.config, &self.shape).step_bytes(batch, self.device().path_name() != "cuda")
    }

    /// The hyperplanes in use, `[sets, ensembles * tables * planes, head_dim]`; sets is 1, or `num_kv_heads` where
    /// they are supplied per kv head.
    ///
    /// # Errors
    /// None in practice: what was accepted when it was set is accepted again.
    pub fn hyperplanes(&self) -> Result<Vec<f32>> {
        Ok(Parameters::new(&self.config, &self.shape)?.planes.rows)
    }

    /// Takes trained hyperplanes (as [`Race::hyperplanes`]) and β; nothing is compiled anew. States made before keep
    /// what they summed under the old ones.
    ///
    /// # Errors
    /// [`Error::Config`] for values that do not fit or are not finite, or for β ≤ 0; [`Error::OutOfMemory`],
    /// [`Error::DeviceLost`]. The old ones stay then.
    pub fn set_parameters(&mut self, hyperplanes: &[f32], beta: Beta) -> Result<()> {
        let hyperplanes = crate::lsh::Hyperplanes::Supplied(hyperplanes.into());
        let config = RaceConfig { hyperplanes, beta, ..self.config.clone() };
        config.validate(&self.shape)?;
        let parameters = Parameters::new(&config, &self.shape)?;
        self.executor.set_parameters(&parameters)?;
        self.config = config;
        Ok(())
    }

    /// Takes trained gates of the exact window; nothing is compiled anew.
    ///
    /// # Errors
    /// [`Error::Config`] for values outside of 0 to 1, or another number of them than heads; [`Error::OutOfMemory`],
    /// [`Error::DeviceLost`]. The old ones stay then.
    pub fn set_gate(&mut self, gate: Gate) -> Result<()> {
        check_gate(&gate, &self.shape)?;
        if let Some(window) = &mut self.window {
            window.set_gate(&gate)?;
        }
        self.config.gate = gate;
        Ok(())
    }

    /// Compiles every kernel that forward calls and steps with results of dtype `output` need, concurrently; a backward
    /// call compiles its own at first use. Nothing to do on the CPU.
    ///
    /// # Errors
    /// [`Error::Gpu`] where a kernel does not compile, [`Error::DeviceLost`].
    pub fn warm_up(&self, output: DType) -> Result<()> {
        self.window.as_ref().map_or(Ok(()), |window| window.warm_up(output).run())?;
        self.race_outputs(output).into_iter().try_for_each(|output| self.executor.warm_up(output).run())
    }

    /// As [`Race::warm_up`], while the thread that polls the future does other work: the kernels compile on the threads
    /// of rayon's pool, in browsers one by one between polls. The future borrows nothing; calls made before it is done
    /// wait for the kernels that they need.
    ///
    /// # Errors
    /// As [`Race::warm_up`].
    pub fn warm_up_async(&self, output: DType) -> impl Future<Output = Result<()>> + Send + use<> {
        let window = self.window.as_ref().map(|window| window.warm_up(output)).unwrap_or_default();
        let race: Vec<_> = self.race_outputs(output).into_iter().map(|output| self.executor.warm_up(output)).collect();
        async move {
            window.run_async().await?;
            for kernels in race {
                kernels.run_async().await?;
            }
            Ok(())
        }
    }

    /// Element types of RACE's part of o: where a window is mixed in, the sum is what is rounded, unless the window
    /// takes prompts otherwise.
    fn race_outputs(&self, output: DType) -> Vec<DType> {
        let Some(window) = &self.window else { return vec![output] };
        let mut outputs = vec![DType::F32, window.prompt_dtype(output)];
        outputs.dedup();
        outputs
    }
}

/// Forward.
impl Race {
    /// Attention of q `[batch, token, num_q_heads, head_dim]` over k `[batch, token, num_kv_heads, head_dim]` and v
    /// (`value_dim` channels), after whatever `initial` has seen, and the state after all tokens.
    ///
    /// A query whose buckets hold no mass at all, which takes a β so large that every product of weights underflows,
    /// reads zero under [`crate::Normalization::Ratio`].
    ///
    /// # Errors
    /// Shape, dtype, bounds, non-finite values in host slices, a state of another configuration or device, limits and
    /// memory, lost device.
    pub fn forward(
        &mut self,
        q: &TensorView<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        initial: Option<&RaceState>,
    ) -> Result<RaceOutput> {
        self.forward_with(q, k, v, initial, &RaceOptions::default())
    }

    /// As [`Race::forward`] with options.
    ///
    /// # Errors
    /// As [`Race::forward`].
    pub fn forward_with(
        &mut self,
        q: &TensorView<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        initial: Option<&RaceState>,
        options: &RaceOptions,
    ) -> Result<RaceOutput> {
        let op = "forward";
        let mut state = self.start(op, q.shape()[0], initial)?;
        let inputs = Inputs { q: Some(*q), k: Some(*k), v: Some(*v), grad_o: None };
        let o = if self.config.causal {
            self.pass(op, Pass::Causal, Recording::Run, &inputs, &mut state, options)?
        } else {
            let inputs = Inputs { q: None, ..inputs };
            self.pass(op, Pass::Absorb, Recording::Run, &inputs, &mut state, options)?;
            let inputs = Inputs { q: Some(*q), ..Inputs::default() };
            self.pass(op, Pass::Read, Recording::Run, &inputs, &mut state, options)?
        };
        Ok(RaceOutput { o: made(op, o)?, state })
    }

    /// Causal attention of any number of further tokens, which `state` takes in: a chunk of a prompt, or one step.
    /// Tensors as in [`Race::forward`].
    ///
    /// # Errors
    /// As [`Race::forward`]; [`Error::Unsupported`] where the configuration is not causal. `state` is unchanged then.
    pub fn append(
        &mut self,
        state: &mut RaceState,
        q: &TensorView<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
    ) -> Result<Tensor> {
        self.append_with(state, q, k, v, &RaceOptions::default())
    }

    /// As [`Race::append`] with options.
    ///
    /// # Errors
    /// As [`Race::append`].
    pub fn append_with(
        &mut self,
        state: &mut RaceState,
        q: &TensorView<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        options: &RaceOptions,
    ) -> Result<Tensor> {
        self.append_recorded(Recording::Run, state, q, k, v, options)
    }

    /// As [`Race::append_with`], leaving the commands in the caller's encoder; buffers are read, and the state moves on,
    /// when the caller submits. On the CPU path the work is done at once.
    ///
    /// # Errors
    /// As [`Race::append`].
    #[cfg(feature = "wgpu")]
    pub fn append_into(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        state: &mut RaceState,
        q: &TensorView<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        options: &RaceOptions,
    ) -> Result<Tensor> {
        [q, k, v].into_iter().for_each(TensorView::lend);
        self.append_recorded(Recording::Into(encoder), state, q, k, v, options)
    }

    fn append_recorded(
        &mut self,
        rec: Recording<'_>,
        state: &mut RaceState,
        q: &TensorView<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        options: &RaceOptions,
    ) -> Result<Tensor> {
        let op = "append";
        if !self.config.causal {
            return Err(Error::Unsupported { op, why: "attention that is not causal needs all tokens at once".into() });
        }
        let inputs = Inputs { q: Some(*q), k: Some(*k), v: Some(*v), grad_o: None };
        let o = self.pass(op, Pass::Causal, rec, &inputs, state, options)?;
        made(op, o)
    }

    /// The state that a call begins with.
    pub(crate) fn start(&self, op: &'static str, batch: usize, initial: Option<&RaceState>) -> Result<RaceState> {
        match initial {
            None => self.new_state(batch),
            Some(state) => {
                self.check_state(op, state, batch)?;
                self.fork(state)
            }
        }
    }

    /// One checked pass over `state`.
    pub(crate) fn pass(
        &mut self,
        op: &'static str,
        pass: Pass,
        rec: Recording<'_>,
        inputs: &Inputs<'_>,
        state: &mut RaceState,
        options: &RaceOptions,
    ) -> Result<Option<Tensor>> {
        let call = self.call(op, pass, inputs, options)?;
        self.check_state(op, state, call.batch())?;
        let mut after = state.tokens.clone();
        if pass.absorbs() {
            for (tokens, &length) in after.iter_mut().zip(&call.lengths) {
                *tokens = tokens.saturating_add(length as u64);
                if *tokens > MAX_TOKENS {
                    return Err(Error::Limit { op, what: "tokens of a sequence", value: *tokens, limit: MAX_TOKENS });
                }
            }
        }
        if call.tokens == 0 || call.batch() == 0 {
            let shape = vec![call.batch(), call.tokens, self.shape.num_q_heads, self.shape.value_dim];
            return Ok(pass.reads().then(|| Tensor::host(call.output, shape, Vec::new())));
        }
        let o = self.forward_pass(&call, rec, inputs, state)?;
        state.tokens = after;
        Ok(o)
    }

    /// Checks the tensors of a pass.
    fn call(&self, op: &'static str, pass: Pass, inputs: &Inputs<'_>, options: &RaceOptions) -> Result<Call> {
        let s = &self.shape;
        let first = inputs.q.or(inputs.k).map(|view| view.shape()).unwrap_or_default();
        let (batch, tokens) = (first[0], first[1]);
        for (name, view, heads, dim) in [
            ("q", &inputs.q, s.num_q_heads, s.head_dim),
            ("k", &inputs.k, s.num_kv_heads, s.head_dim),
            ("v", &inputs.v, s.num_kv_heads, s.value_dim),
            ("grad_o", &inputs.grad_o, s.num_q_heads, s.value_dim),
        ] {
            let Some(view) = view else { continue };
            let wide = name == "grad_o" && view.dtype() == DType::F32;
            if view.dtype() != s.dtype && !wide {
                let expected = format!("{:?}, as configured", s.dtype);
                return Err(Error::DType { op, tensor: name, got: view.dtype(), expected });
            }
            view.check(op, name, [Some(batch), Some(tokens), Some(heads), Some(dim)])?;
        }
        let output = options.output.unwrap_or(s.dtype);
        if !output.is_float() {
            let expected = "F32, F16 or Bf16".into();
            return Err(Error::DType { op, tensor: "o", got: output, expected });
        }
        let gradients = options.gradients.unwrap_or(DType::F32);
        if gradients != DType::F32 && gradients != s.dtype {
            let expected = format!("F32 or {:?}, as the inputs", s.dtype);
            return Err(Error::DType { op, tensor: "gradients", got: gradients, expected });
        }
        let lengths = options.lengths.clone().unwrap_or_else(|| vec![tokens; batch]);
        if lengths.len() != batch || lengths.iter().any(|&n| n > tokens) {
            let expected = format!("{batch} values of at most {tokens}");
            return Err(Error::Shape { op, tensor: "lengths", got: lengths, expected });
        }
        Ok(Call { op, pass, lengths, tokens, output, gradients, into: None })
    }
}

/// Backward.
impl Race {
    /// Gradients of a loss whose gradient with respect to [`Race::forward`]'s o is `grad_o`
    /// (`[batch, token, num_q_heads, value_dim]`, f32 or the inputs' dtype) and with respect to its final state
    /// `grad_final`. What the forward pass computed is computed anew; nothing of it need be kept.
    ///
    /// # Errors
    /// As [`Race::forward`]; [`Error::Unsupported`] where `options.gradients` cannot be had, see there.
    #[allow(clippy::too_many_arguments, reason = "the forward's inputs and the gradients of its two results")]
    pub fn backward(
        &mut self,
        q: &TensorView<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        grad_o: &TensorView<'_>,
        initial: Option<&RaceState>,
        grad_final: Option<&StateGradient>,
        options: &RaceOptions,
    ) -> Result<RaceGradients> {
        let op = "backward";
        let batch = q.shape()[0];
        let mut state = self.start(op, batch, initial)?;
        let mut gradient = self.start_gradient(op, batch, grad_final)?;
        let mut sums = self.executor.new_sums(op)?;
        let all = Inputs { q: Some(*q), k: Some(*k), v: Some(*v), grad_o: Some(*grad_o) };
        let (gradients, d_gate) = if self.config.causal {
            self.pass_backward(op, Pass::Causal, &all, &state, &mut gradient, &mut sums, options)?
        } else {
            let absorbed = Inputs { q: None, grad_o: None, ..all };
            let read = Inputs { k: None, v: None, ..all };
            self.pass(op, Pass::Absorb, Recording::Run, &absorbed, &mut state, options)?;
            let dq = self.pass_backward(op, Pass::Read, &read, &state, &mut gradient, &mut sums, options)?.0.dq;
            let (of_kv, none) =
                self.pass_backward(op, Pass::Absorb, &absorbed, &state, &mut gradient, &mut sums, options)?;
            (InputGradients { dq, ..of_kv }, none)
        };
        let (d_beta, d_planes) = self.executor.finish_sums(op, sums)?;
        let InputGradients { dq, dk, dv } = gradients;
        let (dq, dk, dv) = (made(op, dq)?, made(op, dk)?, made(op, dv)?);
        Ok(RaceGradients { dq, dk, dv, d_beta, d_planes, d_gate, d_initial_state: gradient })
    }

    pub(crate) fn start_gradient(
        &self,
        op: &'static str,
        batch: usize,
        grad_final: Option<&StateGradient>,
    ) -> Result<StateGradient> {
        let storage = match grad_final {
            None => self.executor.new_state(op, batch)?,
            Some(gradient) => {
                self.check_gradient(op, gradient, batch)?;
                self.executor.fork(op, &gradient.storage)?
            }
        };
        let ring = match grad_final.and_then(|gradient| gradient.ring.as_ref()) {
            None => self.window.as_ref().map(|window| window.new_ring(op, batch, true)).transpose()?,
            ring => self.fork_ring(op, ring)?,
        };
        Ok(StateGradient { storage, ring, shape: self.state_shape(), batch })
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn executor(&self) -> &dyn RaceExecutor {
        &*self.executor
    }

    /// One checked backward pass: gradients of the inputs, and of the gates where there is a window.
    #[allow(clippy::too_many_arguments, reason = "one call's inputs, all different")]
    pub(crate) fn pass_backward(
        &mut self,
        op: &'static str,
        pass: Pass,
        inputs: &Inputs<'_>,
        state: &RaceState,
        gradient: &mut StateGradient,
        sums: &mut crate::race::executor::ParameterSums,
        options: &RaceOptions,
    ) -> Result<(InputGradients, Option<Tensor>)> {
        let call = self.call(op, pass, inputs, options)?;
        self.check_state(op, state, call.batch())?;
        self.check_gradient(op, gradient, call.batch())?;
        if call.tokens == 0 || call.batch() == 0 {
            let empty = |view: Option<TensorView<'_>>| {
                view.map(|view| Tensor::host(call.gradients, view.shape().to_vec(), Vec::new()))
            };
            let gates = self.config.gate.values().len();
            let d_gate = self.window.is_some().then(|| Tensor::host_f32(vec![gates], vec![0.0; gates]));
            let none = InputGradients { dq: empty(inputs.q), dk: empty(inputs.k), dv: empty(inputs.v) };
            return Ok((none, d_gate));
        }
        self.backward_pass(&call, inputs, state, gradient, sums)
    }
}

fn made<T>(op: &'static str, result: Option<T>) -> Result<T> {
    result.ok_or_else(|| Error::Unsupported { op, why: "the pass gave no such result".into() })
}
