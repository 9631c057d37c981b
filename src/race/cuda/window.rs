//! The exact window on CUDA: its own launches beside RACE's, each over the whole call.
//!
//! The ring of a state is `[sequence, slot, kv head, D + Dv]` in the dtype of k and v, a row padded to an even number of
//! elements; that of a gradient is the same in f32. How many tokens a ring has taken in is counted beside it on the
//! device, where kernels look it up: so a step that was captured goes on from replay to replay.

use super::window_kernels::{Params, Way, WindowKernel, WindowKey};
use crate::engine::cuda::{Bind, Buffer, Context, Grid, Input, KernelKey, Passes, Ready, stage};
use crate::engine::{Recording, WarmUp};
use crate::error::{Error, Result};
use crate::race::config::Gate;
use crate::race::executor::{Call, InputGradients, Inputs, Pass, needed};
use crate::race::window::WindowGeometry;
use crate::race::window::{Halved, Kept, Prepared, Ring, RingData, WindowCall, WindowExecutor, WindowSpec};
use crate::tensor::convert::encode;
use crate::tensor::{DType, HostTensor, Tensor, TensorView};
use std::sync::Arc;

/// Keys and values of the last tokens, or gradients of them, on a device.
#[derive(Debug)]
pub(crate) struct CudaRing {
    buffer: Buffer,
    /// Tokens taken in, `[sequence, kv head]`; zeros for a gradient.
    seen: Buffer,
    dtype: DType,
}

impl CudaRing {
    pub fn bytes(&self) -> u64 {
        self.buffer.size() + self.seen.size()
    }

    fn counts(&self) -> u64 {
        self.seen.size() / 8
    }
}

/// The window on CUDA.
pub(crate) struct CudaWindow {
    ctx: Arc<Context>,
    spec: WindowSpec,
    geometry: WindowGeometry,
    /// One per query head.
    gates: Buffer,
}

/// What all launches of a call have in common.
struct Stand {
    params: Params,
    /// Tokens of each sequence of many, and those that the ring has seen.
    place: [Bind; 2],
}

/// A call's inputs on the device.
struct Seen {
    q: Input,
    k: Input,
    v: Input,
}

impl CudaWindow {
    pub fn new(ctx: Arc<Context>, spec: WindowSpec) -> Result<Self> {
        let op = "new";
        ctx.check_alive(op)?;
        let geometry = WindowGeometry::new(&spec);
        let gates = gates(&ctx, op, &spec)?;
        Ok(Self { ctx, spec, geometry, gates })
    }

    fn key(&self, kernel: WindowKernel) -> WindowKey {
        WindowKey { kernel, geometry: self.geometry }
    }

    /// Bytes of the rings of a batch.
    fn ring_bytes(&self, batch: usize, dtype: DType) -> u64 {
        let g = &self.geometry;
        let one = (self.spec.tokens * g.num_kv_heads) as u64 * (g.ring_row() * dtype.size()) as u64;
        one.saturating_mul(batch as u64)
    }

    /// A ring's count of `tokens`.
    fn count(&self, op: &'static str, tokens: &[u64]) -> Result<Buffer> {
        let heads = self.geometry.num_kv_heads;
        let each: Vec<u64> = tokens.iter().flat_map(|&tokens| std::iter::repeat_n(tokens, heads)).collect();
        self.ctx.buffer_with(op, bytemuck::cast_slice(&each))
    }

    fn own<'a>(&self, op: &'static str, ring: &'a CudaRing) -> Result<&'a CudaRing> {
        if Arc::ptr_eq(&self.ctx, ring.buffer.context()) {
            return Ok(ring);
        }
        Err(Error::WrongDevice { op, tensor: "state", got: "another CUDA device", expected: "this CUDA device" })
    }

    /// What is the same for all launches.
    fn stand(&self, passes: &mut Passes<'_>, at: WindowCall<'_>, ring: &CudaRing) -> Stand {
        let lengths: Vec<u32> = at.call.lengths.iter().map(|&length| length as u32).collect();
        let mut params = Params {
            batch: lengths.len() as u32,
            tokens: at.call.tokens as u32,
            window: self.spec.tokens as u32,
            scale: self.spec.scale,
            ..Params::default()
        };
        let far = match params.near.get_mut(..lengths.len()) {
            Some(near) => {
                near.copy_from_slice(&lengths);
                Bind::null()
            }
            None => passes.part(&lengths),
        };
        Stand { params, place: [far, Bind::from(&ring.seen)] }
    }

    fn take(&self, at: WindowCall<'_>, name: &'static str, view: Option<TensorView<'_>>) -> Result<Input> {
        let view = needed(at.call.op, name, view)?;
        stage(&self.ctx, at.call.op, name, &view, 0..at.call.batch(), 0..at.call.tokens)
    }

    fn seen(&self, at: WindowCall<'_>, inputs: &Inputs<'_>) -> Result<Seen> {
        let q = self.take(at, "q", inputs.q)?;
        Ok(Seen { q, k: self.take(at, "k", inputs.k)?, v: self.take(at, "v", inputs.v)? })
    }

    /// What each launch over a call's tokens begins with: its place, gates, q, k, v, the ring.
    fn begin(&self, passes: &mut Passes<'_>, at: WindowCall<'_>, seen: &Seen, ring: &CudaRing) -> (Params, Vec<Bind>) {
        let Stand { params, place } = self.stand(passes, at, ring);
        let Seen { q, k, v } = seen;
        let params = Params { q: q.strides, k: k.strides, v: v.strides, ..params };
        let inputs = [q, k, v].map(|input| input.bind.clone());
        let mut binds = place.to_vec();
        binds.push(Bind::from(&self.gates));
        binds.extend(inputs);
        binds.push(Bind::from(&ring.buffer));
        (params, binds)
    }

    /// How rows are tiled, those of the gradient of o, if there is one, being of `grad`.
    fn way(&self, at: WindowCall<'_>, inputs: &[&Input], grad: Option<DType>) -> Way {
        let g = &self.geometry;
        let aligned = inputs.iter().all(|input| input.alignment >= 16);
        if !self.has_tiles() || !aligned || grad.is_some_and(|grad| grad != g.dtype) {
            return Way::Any;
        }
        Way::Tiles { terms: self.terms(at.call.output) }
    }

    fn has_tiles(&self) -> bool {
        self.geometry.has_tiles(self.ctx.caps().shared_memory as usize)
    }

    /// As many parts as the result's rounding asks for, as in RACE's own passes.
    fn terms(&self, output: DType) -> usize {
        match (self.geometry.dtype, output) {
            (DType::F16, _) => 2,
            (DType::F32, _) | (_, DType::F32) => 3,
            _ => 1,
        }
    }

    /// Tiles of a sequence's query rows.
    fn query_tiles(&self, at: WindowCall<'_>, way: Way) -> usize {
        (at.call.tokens * self.geometry.group()).div_ceil(way.rows())
    }

    /// Launches a kernel with a block for each (kv head, tile, sequence).
    fn over_tiles(
        &self,
        passes: &mut Passes<'_>,
        at: WindowCall<'_>,
        (kernel, way): (WindowKernel, Way),
        tiles: usize,
        params: Params,
        binds: Vec<Bind>,
    ) -> Result<()> {
        let blocks = at.call.batch() as u64 * tiles as u64 * self.geometry.num_kv_heads as u64;
        let key = self.key(kernel);
        let grid = Grid::new(blocks, way.threads()).shared(key.shared());
        passes.dispatch(key, Params { tiles: tiles as u32, ..params }, grid, binds)
    }

    /// A grid of a thread for each channel of the keys and values of the last tokens.
    fn last_grid(&self, at: WindowCall<'_>) -> Grid {
        let g = &self.geometry;
        let rows = at.call.batch() * at.call.tokens.min(self.spec.tokens) * g.num_kv_heads;
        Grid::new((rows as u64 * g.channels() as u64).div_ceil(256), 256)
    }

    fn result(&self, at: WindowCall<'_>, dtype: DType) -> Result<(Buffer, Tensor)> {
        let g = &self.geometry;
        let shape = vec![at.call.batch(), at.call.tokens, g.num_q_heads, g.value_dim];
        let bytes = shape.iter().product::<usize>() as u64 * dtype.size() as u64;
        let buffer = self.ctx.uninit(at.call.op, bytes)?;
        Ok((buffer.clone(), Tensor::cuda(dtype, shape, buffer)))
    }
}

fn buffer_of<'a>(op: &'static str, tensor: Option<&'a Tensor>) -> Result<&'a Buffer> {
    let why = || Error::Unsupported { op, why: "the pass gave no such result".into() };
    tensor.and_then(Tensor::cuda_buffer).ok_or_else(why)
}

fn gates(ctx: &Arc<Context>, op: &'static str, spec: &WindowSpec) -> Result<Buffer> {
    ctx.buffer_with(op, bytemuck::cast_slice(&spec.gate.of_heads(spec.shape.num_q_heads)))
}

/// A forward pass of which all that can fail has been done: its launches, but for RACE's o, and its own.
struct CudaPrepared<'a> {
    ctx: &'a Arc<Context>,
    op: &'static str,
    launches: Ready,
    o: Option<Tensor>,
}

impl Prepared for CudaPrepared<'_> {
    fn run(mut self: Box<Self>, rec: Recording<'_>, _: &mut Ring, race: Option<Tensor>) -> Result<Option<Tensor>> {
        rec.only_run(self.op)?;
        if self.o.is_some() {
            self.launches.give(self.ctx, buffer_of(self.op, race.as_ref())?);
        }
        self.launches.run(self.ctx, self.op)?;
        Ok(self.o)
    }
}

impl WindowExecutor for CudaWindow {
    fn prompt_dtype(&self, output: DType) -> DType {
        if self.has_tiles() && output == self.geometry.dtype { output } else { DType::F32 }
    }

    /// On the tensor cores RACE's own numbers have the rounding of the result, and its backward takes that dtype.
    fn race_dtype(&self, call: &Call, inputs: &Inputs<'_>) -> DType {
        let narrow = inputs.grad_o.is_none_or(|view| view.dtype() == self.geometry.dtype);
        if narrow && call.tokens > 1 { self.prompt_dtype(call.output) } else { DType::F32 }
    }

    /// Into memory of their own: work submitted before keeps the old ones.
    fn set_gate(&mut self, gate: &Gate) -> Result<()> {
        let spec = WindowSpec { gate: gate.clone(), ..self.spec.clone() };
        self.gates = gates(&self.ctx, "set_gate", &spec)?;
        self.spec = spec;
        Ok(())
    }

    fn new_ring(&self, op: &'static str, batch: usize, gradient: bool) -> Result<Ring> {
        let dtype = if gradient { DType::F32 } else { self.geometry.dtype };
        let buffer = self.ctx.buffer(op, self.ring_bytes(batch, dtype))?;
        let seen = self.count(op, &vec![0; batch])?;
        Ok(Ring::Cuda(CudaRing { buffer, seen, dtype }))
    }

    fn fork(&self, op: &'static str, ring: &Ring) -> Result<Ring> {
        let CudaRing { buffer, seen, dtype } = self.own(op, ring.cuda(op)?)?;
        let copy = |from: &Buffer| -> Result<Buffer> {
            let to = self.ctx.uninit(op, from.size())?;
            self.ctx.copy(op, (from, 0), (&to, 0), from.size())?;
            Ok(to)
        };
        Ok(Ring::Cuda(CudaRing { buffer: copy(buffer)?, seen: copy(seen)?, dtype: *dtype }))
    }

    fn prepare<'a>(
        &'a mut self,
        at: WindowCall<'a>,
        inputs: &Inputs<'a>,
        ring: &Ring,
    ) -> Result<Box<dyn Prepared + 'a>> {
        let op = at.call.op;
        self.ctx.check_alive(op)?;
        let ring = self.own(op, ring.cuda(op)?)?;
        let (k, v) = (self.take(at, "k", inputs.k)?, self.take(at, "v", inputs.v)?);
        let mut passes = Passes::new(&self.ctx, op);
        let Stand { params, place } = self.stand(&mut passes, at, ring);
        let params = Params { k: k.strides, v: v.strides, ..params };
        let of_ring = Bind::from(&ring.buffer);
        let (reads, is_step) = (at.call.pass != Pass::Absorb, at.call.tokens == 1);
        let mut o = None;
        if reads {
            let q = self.take(at, "q", inputs.q)?;
            let (out, tensor) = self.result(at, at.call.output)?;
            o = Some(tensor);
            let mut binds = place.to_vec();
            binds.extend([Bind::from(&self.gates), q.bind.clone(), k.bind.clone(), v.bind.clone()]);
            binds.extend([of_ring.clone(), Bind::open(), Bind::from(&out)]);
            let params = Params { q: q.strides, ..params };
            let (output, race) = (at.call.output, self.race_dtype(at.call, inputs));
            let way = self.way(at, &[&q, &k, &v], None);
            let (kernel, way, tiles) = match is_step {
                true => (WindowKernel::Step { output }, Way::Any, 1),
                false => (WindowKernel::Attend { way, output, race }, way, self.query_tiles(at, way)),
            };
            self.over_tiles(&mut passes, at, (kernel, way), tiles, params, binds)?;
        }
        // The ring moves on when all have read it; a step moves it itself.
        if !(reads && is_step) {
            let mut binds = place.to_vec();
            binds.extend([k.bind, v.bind, of_ring]);
            passes.dispatch(self.key(WindowKernel::Store), params, self.last_grid(at), binds)?;
            let grid = Grid::new(ring.counts().div_ceil(256), 256);
            passes.dispatch(self.key(WindowKernel::Count), params, grid, place.to_vec())?;
        }
        Ok(Box::new(CudaPrepared { ctx: &self.ctx, op, launches: passes.ready()?, o }))
    }

    fn halve(&mut self, at: WindowCall<'_>, inputs: &Inputs<'_>, ring: &Ring, race: Tensor) -> Result<Halved> {
        let (op, g) = (at.call.op, self.geometry);
        let ring = self.own(op, ring.cuda(op)?)?;
        let rows = at.call.batch() * at.call.tokens * g.num_q_heads;
        let kept = self.ctx.uninit(op, rows as u64 * 8)?;
        let of_race = buffer_of(op, Some(&race))?;
        let grad_o = self.take(at, "grad_o", inputs.grad_o)?;
        let grad = needed(op, "grad_o", inputs.grad_o)?.dtype();
        let seen = self.seen(at, inputs)?;
        let way = self.way(at, &[&seen.q, &seen.k, &seen.v, &grad_o], Some(grad));
        let tiles = self.query_tiles(at, way);
        let shares = at.call.batch() * tiles;
        let of_gates = self.ctx.uninit(op, (shares * g.num_q_heads * 4) as u64)?;
        let gates = self.spec.gate.values().len();
        let out = self.ctx.uninit(op, (gates * 4) as u64)?;
        let mut passes = Passes::new(&self.ctx, op);
        let (params, mut binds) = self.begin(&mut passes, at, &seen, ring);
        let params = Params { grad_o: grad_o.strides, ..params };
        binds.extend([Bind::from(of_race), grad_o.bind, Bind::from(of_race), Bind::from(&kept), Bind::from(&of_gates)]);
        self.over_tiles(
            &mut passes,
            at,
            (WindowKernel::Halve { way, grad, race: race.dtype() }, way),
            tiles,
            params,
            binds,
        )?;
        let params = Params { tiles: shares as u32, gates: gates as u32, ..Params::default() };
        let binds = vec![Bind::from(&of_gates), Bind::from(&out)];
        passes.dispatch(self.key(WindowKernel::Gates), params, Grid::new(gates as u64, 256), binds)?;
        passes.ready()?.run(&self.ctx, op)?;
        Ok(Halved { race, kept: Kept::Cuda(kept), d_gate: Tensor::cuda(DType::F32, vec![gates], out) })
    }

    fn backward(
        &mut self,
        at: WindowCall<'_>,
        inputs: &Inputs<'_>,
        ring: &Ring,
        kept: Kept,
        gradient: &mut Ring,
        gradients: InputGradients,
    ) -> Result<InputGradients> {
        let op = at.call.op;
        let ring = self.own(op, ring.cuda(op)?)?;
        let gradient = self.own(op, gradient.cuda_mut(op)?)?;
        let kept = kept.cuda(op)?;
        let [dq, dk, dv] = [&gradients.dq, &gradients.dk, &gradients.dv].map(|x| buffer_of(op, x.as_ref()));
        let (dq, dk, dv) = (Bind::from(dq?), Bind::from(dk?), Bind::from(dv?));
        let of_ring = Bind::from(&gradient.buffer);
        let grad_o = self.take(at, "grad_o", inputs.grad_o)?;
        let grad = needed(op, "grad_o", inputs.grad_o)?.dtype();
        let seen = self.seen(at, inputs)?;
        let way = self.way(at, &[&seen.q, &seen.k, &seen.v, &grad_o], Some(grad));
        let mut passes = Passes::new(&self.ctx, op);
        let (params, mut binds) = self.begin(&mut passes, at, &seen, ring);
        let params = Params { grad_o: grad_o.strides, ..params };
        binds.extend([grad_o.bind, Bind::from(&kept)]);
        // Before anything is added to slots that tokens of the call have taken over.
        let of_last = [&binds[..2], &[of_ring.clone(), dk.clone(), dv.clone()]].concat();
        passes.dispatch(self.key(WindowKernel::HandOver), params, self.last_grid(at), of_last)?;

        let tiles = self.query_tiles(at, way);
        let of_queries = [binds.as_slice(), &[dq]].concat();
        self.over_tiles(&mut passes, at, (WindowKernel::Query { way, grad }, way), tiles, params, of_queries)?;

        // The host need not know how many there are.
        let ring_tiles = (self.spec.tokens - 1).div_ceil(way.rows());
        let tiles = ring_tiles + at.call.tokens.div_ceil(way.rows());
        binds.extend([dk, dv, of_ring]);
        let params = Params { ring_tiles: ring_tiles as u32, ..params };
        self.over_tiles(&mut passes, at, (WindowKernel::Key { way, grad }, way), tiles, params, binds)?;
        passes.ready()?.run(&self.ctx, op)?;
        Ok(gradients)
    }

    fn check_count(&self, op: &'static str, ring: &Ring, tokens: &[u64]) -> Result<()> {
        let ring = self.own(op, ring.cuda(op)?)?;
        let bytes = self.ctx.read_buffer_blocking(op, &ring.seen, 0, ring.seen.size())?;
        let seen = bytes.chunks_exact(8).map(bytemuck::pod_read_unaligned::<u64>);
        if seen.step_by(self.geometry.num_kv_heads).eq(tokens.iter().copied()) {
            return Ok(());
        }
        let why = "a CUDA graph was captured or replayed with this state, whose tokens are no longer those counted, so \
                   that nobody could tell where the window's keys stand";
        Err(Error::Unsupported { op, why: why.into() })
    }

    fn export(&self, op: &'static str, ring: &Ring) -> Result<RingData> {
        let (g, ring) = (&self.geometry, self.own(op, ring.cuda(op)?)?);
        let bytes = self.ctx.read_buffer_blocking(op, &ring.buffer, 0, ring.buffer.size())?;
        let values = HostTensor::new(ring.dtype, vec![bytes.len() / ring.dtype.size()], bytes).to_f32();
        let mut data = RingData::default();
        for row in values.chunks_exact(g.ring_row()) {
            data.k.extend(&row[..g.head_dim]);
            data.v.extend(&row[g.head_dim..g.channels()]);
        }
        Ok(data)
    }

    fn import(&self, op: &'static str, data: &RingData, tokens: &[u64], gradient: bool) -> Result<Ring> {
        let g = &self.geometry;
        let dtype = if gradient { DType::F32 } else { g.dtype };
        let mut values = Vec::with_capacity(tokens.len() * self.spec.tokens * g.num_kv_heads * g.ring_row());
        for (k, v) in data.k.chunks_exact(g.head_dim).zip(data.v.chunks_exact(g.value_dim)) {
            values.extend(k.iter().chain(v));
            values.resize(values.len().next_multiple_of(2), 0.0);
        }
        let buffer = self.ctx.buffer_with(op, &encode(dtype, &values))?;
        Ok(Ring::Cuda(CudaRing { buffer, seen: self.count(op, tokens)?, dtype }))
    }

    fn warm_up(&self, output: DType) -> WarmUp {
        let g = &self.geometry;
        let way = if self.has_tiles() { Way::Tiles { terms: self.terms(output) } } else { Way::Any };
        let race = if self.has_tiles() && output == g.dtype { output } else { DType::F32 };
        let kernels = [WindowKernel::Attend { way, output, race }, WindowKernel::Step { output }];
        let kernels = kernels.into_iter().chain([WindowKernel::Store, WindowKernel::Count]);
        let boxed = |kernel| Box::new(self.key(kernel)) as Box<dyn KernelKey>;
        WarmUp::cuda(self.ctx.clone(), kernels.map(boxed).collect())
    }
}
