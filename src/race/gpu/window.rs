//! The exact window on a GPU: its own dispatches beside RACE's, cut into pieces that bound the work of each.
//!
//! The ring of a state is `[sequence, slot, kv head, D + Dv]` in the dtype of k and v, a row padded to an even number of
//! elements; that of a gradient is the same in f32.

use super::window_kernels::{WindowKernel, WindowKey, WindowParams};
use super::{STORAGE, too_large};
use crate::engine::gpu::{Bind, Context, Input, KernelKey, Passes, Ready, stage};
use crate::engine::{Recording, WarmUp};
use crate::error::{Error, Result};
use crate::race::config::Gate;
use crate::race::executor::{InputGradients, Inputs, Pass, needed};
use crate::race::plan::{Piece, WindowBudget, window_pieces};
use crate::race::window::WindowGeometry;
use crate::race::window::{Halved, Kept, Prepared, Ring, RingData, WindowCall, WindowExecutor, WindowSpec};
use crate::tensor::convert::encode;
use crate::tensor::{DType, Tensor, TensorView};
use std::ops::Range;
use std::sync::Arc;

/// Pieces of one submission.
const PIECES: usize = 8;

/// Keys and values of the last tokens, or gradients of them, on a GPU.
#[derive(Debug)]
pub(crate) struct GpuRing {
    ctx: Arc<Context>,
    buffer: wgpu::Buffer,
    batch: usize,
    dtype: DType,
}

impl GpuRing {
    pub fn bytes(&self) -> u64 {
        self.buffer.size()
    }
}

/// The window on a GPU.
pub(crate) struct GpuWindow {
    ctx: Arc<Context>,
    spec: WindowSpec,
    geometry: WindowGeometry,
    pub(super) budget: WindowBudget,
    /// One per query head.
    gates: Vec<f32>,
}

/// A tensor of rows, as a piece sees it.
struct Rows {
    bind: Bind,
    at: u32,
    batch: u32,
}

/// What all dispatches of a piece have in common.
struct Stand {
    info: Bind,
    params: WindowParams,
}

impl GpuWindow {
    pub fn new(ctx: Arc<Context>, spec: WindowSpec) -> Result<Self> {
        let op = "new";
        let geometry = WindowGeometry::new(&spec);
        let gates = spec.gate.of_heads(spec.shape.num_q_heads);
        let budget = WindowBudget::new(ctx.caps().max_storage_binding);
        let window = Self { ctx, spec, geometry, budget, gates };
        // Any call's smallest piece is that of one token; a gradient's ring is the largest.
        window.pieces(op, 1, 1)?;
        let (bytes, limit) = (window.ring_bytes(DType::F32), window.ctx.caps().max_storage_binding);
        if bytes > limit {
            return Err(Error::Limit { op, what: "bytes of the window of one sequence", value: bytes, limit });
        }
        Ok(window)
    }

    fn key(&self, kernel: WindowKernel) -> WindowKey {
        WindowKey { kernel, geometry: self.geometry }
    }

    /// Bytes of one sequence's ring.
    fn ring_bytes(&self, dtype: DType) -> u64 {
        let g = &self.geometry;
        (self.spec.tokens * g.num_kv_heads) as u64 * (g.ring_row() * dtype.size()) as u64
    }

    fn pieces(&self, op: &'static str, batch: usize, tokens: usize) -> Result<Vec<Piece>> {
        let g = &self.geometry;
        let widest = (g.num_q_heads * g.head_dim.max(g.keep_row())).max(g.num_kv_heads * g.head_dim.max(g.value_dim));
        let ring = self.ring_bytes(DType::F32);
        window_pieces(g.num_q_heads, self.spec.tokens, widest, ring, self.budget, batch, tokens)
            .map_err(|value| too_large(op, value, self.budget.binding))
    }

    /// The pieces of a call that have tokens in them.
    fn pieces_of(&self, at: WindowCall<'_>) -> Result<Vec<Piece>> {
        let mut all = self.pieces(at.call.op, at.call.batch(), at.call.tokens)?;
        all.retain(|piece| piece.sequences.clone().any(|b| at.call.lengths[b] > piece.tokens.start));
        Ok(all)
    }

    fn own<'a>(&self, op: &'static str, ring: &'a GpuRing) -> Result<&'a GpuRing> {
        if Arc::ptr_eq(&self.ctx, &ring.ctx) {
            return Ok(ring);
        }
        Err(Error::WrongDevice { op, tensor: "state", got: "another GPU device", expected: "this GPU device" })
    }

    fn ring(&self, op: &'static str, batch: usize, dtype: DType) -> Result<GpuRing> {
        let bytes = (batch as u64).saturating_mul(self.ring_bytes(dtype));
        let buffer = self.ctx.buffer(op, "window of a RACE state", bytes, STORAGE)?;
        Ok(GpuRing { ctx: self.ctx.clone(), buffer, batch, dtype })
    }

    /// The rings of some sequences as a binding, and the element of it that they begin at.
    fn bind_ring(&self, ring: &GpuRing, sequences: &Range<usize>) -> (Bind, u32) {
        let one = self.ring_bytes(ring.dtype);
        Bind::range(
            &self.ctx,
            &ring.buffer,
            sequences.start as u64 * one..sequences.end as u64 * one,
            ring.dtype.size(),
        )
    }

    /// Tokens `tokens` of a piece's sequences in a tensor of `row` elements a token.
    fn bind_rows(
        &self,
        buffer: &wgpu::Buffer,
        dtype: DType,
        at: WindowCall<'_>,
        sequences: &Range<usize>,
        tokens: &Range<usize>,
        row: usize,
    ) -> Rows {
        let size = dtype.size();
        let place = |b: usize, token: usize| (b * at.call.tokens + token) as u64 * (row * size) as u64;
        let bytes = place(sequences.start, tokens.start)..place(sequences.end - 1, tokens.end);
        let (bind, first) = Bind::range(&self.ctx, buffer, bytes, size);
        Rows { bind, at: first, batch: (at.call.tokens * row) as u32 }
    }

    /// Where a piece stands, or the part `tokens` of it.
    fn stand(
        &self,
        passes: &mut Passes<'_>,
        at: WindowCall<'_>,
        sequences: &Range<usize>,
        tokens: &Range<usize>,
    ) -> Stand {
        let window = self.spec.tokens;
        let each = || sequences.clone();
        let mut words: Vec<u32> = each().map(|b| at.call.lengths[b] as u32).collect();
        words.extend(each().map(|b| at.past(b, window) as u32));
        words.extend(each().map(|b| at.slot(b, window) as u32));
        words.extend(self.gates.iter().map(|gate| gate.to_bits()));
        let params = WindowParams {
            batch: sequences.len() as u32,
            tokens: tokens.len() as u32,
            first: tokens.start as u32,
            in_first: tokens.start as u32,
            in2_first: tokens.start as u32,
            scale: self.spec.scale,
            window: window as u32,
            ..WindowParams::default()
        };
        Stand { info: passes.part(&words), params }
    }

    /// Workgroups of the kernels that tile query rows.
    fn query_groups(&self, piece: &Piece) -> u64 {
        let g = &self.geometry;
        (piece.sequences.len() * (piece.tokens.len() * g.group()).div_ceil(32) * g.num_kv_heads) as u64
    }

    /// Workgroups of the kernels that move the ring's elements, `row` of a token and kv head.
    fn ring_groups(&self, piece: &Piece, row: usize) -> u64 {
        let g = &self.geometry;
        let rows = piece.sequences.len() * piece.tokens.len().min(self.spec.tokens) * g.num_kv_heads;
        (rows as u64 * row as u64).div_ceil(256)
    }

    /// Tokens whose keys the queries of a piece see.
    fn key_tokens(&self, piece: &Piece) -> Range<usize> {
        piece.tokens.start.saturating_sub(self.spec.tokens - 1)..piece.tokens.end
    }

    fn stage(
        &self,
        op: &'static str,
        name: &'static str,
        view: Option<TensorView<'_>>,
        sequences: &Range<usize>,
        tokens: &Range<usize>,
    ) -> Result<Input> {
        stage(&self.ctx, op, &needed(op, name, view)?, sequences.clone(), tokens.clone())
    }

    /// q, k and v of a piece's queries, and where they stand.
    fn seen(
        &self,
        passes: &mut Passes<'_>,
        at: WindowCall<'_>,
        inputs: &Inputs<'_>,
        piece: &Piece,
        ring: &GpuRing,
    ) -> Result<(Stand, Vec<Bind>)> {
        let (op, keys) = (at.call.op, self.key_tokens(piece));
        let Piece { sequences, tokens, .. } = piece;
        let q = self.stage(op, "q", inputs.q, sequences, tokens)?;
        let k = self.stage(op, "k", inputs.k, sequences, &keys)?;
        let v = self.stage(op, "v", inputs.v, sequences, &keys)?;
        let (ring, ring_at) = self.bind_ring(ring, sequences);
        let Stand { info, params } = self.stand(passes, at, sequences, tokens);
        let params = WindowParams {
            in2_first: keys.start as u32,
            input: q.strides,
            input2: k.strides,
            input3: v.strides,
            ring_at,
            ..params
        };
        Ok((Stand { info: info.clone(), params }, vec![info, q.bind, k.bind, v.bind, ring]))
    }

    fn buffer_of<'a>(&self, op: &'static str, tensor: Option<&'a Tensor>) -> Result<&'a wgpu::Buffer> {
        let why = || Error::Unsupported { op, why: "the pass gave no such result".into() };
        tensor.and_then(Tensor::as_buffer).ok_or_else(why)
    }
}

/// A forward pass, its dispatches ready.
struct GpuPrepared {
    ctx: Arc<Context>,
    op: &'static str,
    lists: Vec<Ready>,
    race: Option<Tensor>,
    o: Option<Tensor>,
}

impl Prepared for GpuPrepared {
    fn race_o(&self) -> Option<Tensor> {
        self.race.clone()
    }

    fn run(self: Box<Self>, mut rec: Recording<'_>, _: &mut Ring, _: Option<Tensor>) -> Result<Option<Tensor>> {
        for list in &self.lists {
            list.run(&self.ctx, self.op, rec.part())?;
        }
        Ok(self.o)
    }
}

impl WindowExecutor for GpuWindow {
    fn set_gate(&mut self, gate: &Gate) -> Result<()> {
        self.gates = gate.of_heads(self.spec.shape.num_q_heads);
        self.spec.gate = gate.clone();
        Ok(())
    }

    fn new_ring(&self, op: &'static str, batch: usize, gradient: bool) -> Result<Ring> {
        let dtype = if gradient { DType::F32 } else { self.geometry.dtype };
        Ok(Ring::Gpu(self.ring(op, batch, dtype)?))
    }

    fn fork(&self, op: &'static str, ring: &Ring) -> Result<Ring> {
        let from = self.own(op, ring.gpu(op)?)?;
        let to = self.ring(op, from.batch, from.dtype)?;
        self.ctx.copy_whole(op, &from.buffer, &to.buffer)?;
        Ok(Ring::Gpu(to))
    }

    fn prepare<'a>(
        &'a mut self,
        at: WindowCall<'a>,
        inputs: &Inputs<'a>,
        ring: &Ring,
    ) -> Result<Box<dyn Prepared + 'a>> {
        let (op, g, ctx) = (at.call.op, self.geometry, self.ctx.clone());
        ctx.check_alive(op)?;
        let ring = self.own(op, ring.gpu(op)?)?;
        let row = g.num_q_heads * g.value_dim;
        let (output, reads) = (at.call.output, at.call.pass != Pass::Absorb);
        if reads && output != DType::F32 && !g.value_dim.is_multiple_of(2) {
            let why = format!("16-bit outputs of an odd value_dim = {} on a GPU; ask for F32 output", g.value_dim);
            return Err(Error::Unsupported { op, why });
        }
        let result = |dtype: DType| -> Result<Tensor> {
            let bytes = (at.call.batch() * at.call.tokens) as u64 * (row * dtype.size()) as u64;
            let shape = vec![at.call.batch(), at.call.tokens, g.num_q_heads, g.value_dim];
            Ok(Tensor::gpu(ctx.clone(), dtype, shape, ctx.buffer(op, "output", bytes, STORAGE)?))
        };
        let (race, o) = if reads { (Some(result(DType::F32)?), Some(result(output)?)) } else { (None, None) };
        let pieces = self.pieces_of(at)?;
        let mut lists = Vec::new();
        if reads {
            let (race, o) = (self.buffer_of(op, race.as_ref())?, self.buffer_of(op, o.as_ref())?);
            for some in pieces.chunks(PIECES) {
                let mut passes = Passes::new(&self.ctx, op);
                for piece in some {
                    let (stand, mut binds) = self.seen(&mut passes, at, inputs, piece, ring)?;
                    let of_race = self.bind_rows(race, DType::F32, at, &piece.sequences, &piece.tokens, row);
                    let out = self.bind_rows(o, output, at, &piece.sequences, &piece.tokens, row);
                    let params = WindowParams {
                        out_at: out.at,
                        out_batch: out.batch,
                        out2_at: of_race.at,
                        out2_batch: of_race.batch,
                        ..stand.params
                    };
                    binds.extend([of_race.bind, out.bind]);
                    let kernel = self.key(WindowKernel::Attend { output });
                    passes.dispatch(kernel, params, self.query_groups(piece), binds)?;
                }
                lists.push(passes.ready()?);
            }
        }
        // The ring moves on when all have read it. In one submission with the last of them where nothing hinders it.
        let mut passes = Passes::new(&self.ctx, op);
        let last = |piece: &Piece| {
            let ends = |b: usize| at.call.lengths[b].saturating_sub(self.spec.tokens)..at.call.lengths[b];
            piece.sequences.clone().any(|b| ends(b).start < piece.tokens.end && piece.tokens.start < ends(b).end)
        };
        for piece in pieces.iter().filter(|piece| last(piece)) {
            let Piece { sequences, tokens, .. } = piece;
            let k = self.stage(op, "k", inputs.k, sequences, tokens)?;
            let v = self.stage(op, "v", inputs.v, sequences, tokens)?;
            let (bind, ring_at) = self.bind_ring(ring, sequences);
            let Stand { info, params } = self.stand(&mut passes, at, sequences, tokens);
            let params = WindowParams { input: k.strides, input3: v.strides, ring_at, ..params };
            let words = g.ring_row() * g.dtype.size() / 4;
            let groups = self.ring_groups(piece, words);
            passes.dispatch(self.key(WindowKernel::Store), params, groups, vec![info, k.bind, v.bind, bind])?;
        }
        lists.push(passes.ready()?);
        Ok(Box::new(GpuPrepared { ctx: self.ctx.clone(), op, lists, race, o }))
    }

    fn halve(&mut self, at: WindowCall<'_>, inputs: &Inputs<'_>, ring: &Ring, race: Tensor) -> Result<Halved> {
        let (op, g) = (at.call.op, self.geometry);
        let ring = self.own(op, ring.gpu(op)?)?;
        let rows = at.call.batch() * at.call.tokens * g.num_q_heads;
        let kept = self.ctx.buffer(op, "what a window's backward keeps", (rows * g.keep_row() * 4) as u64, STORAGE)?;
        let of_race = self.buffer_of(op, Some(&race))?;
        let pieces = self.pieces_of(at)?;
        let blocks = |piece: &Piece| piece.sequences.len() * piece.tokens.len().div_ceil(64);
        let shares: usize = pieces.iter().map(blocks).sum();
        let limit = self.ctx.caps().max_storage_binding;
        let bytes = (shares.max(1) * g.num_q_heads * 4) as u64;
        if bytes > limit {
            return Err(too_large(op, bytes, limit));
        }
        let of_gates = self.ctx.buffer(op, "shares of the gates' gradients", bytes, STORAGE)?;
        let grad = inputs.grad_o.map_or(DType::F32, |view| view.dtype());
        let mut done = 0;
        for piece in &pieces {
            let Piece { sequences, tokens, .. } = piece;
            let mut passes = Passes::new(&self.ctx, op);
            let keep = self.bind_rows(&kept, DType::F32, at, sequences, tokens, g.num_q_heads * g.keep_row());
            let (stand, mut binds) = self.seen(&mut passes, at, inputs, piece, ring)?;
            let params = WindowParams { keep_at: keep.at, keep_batch: keep.batch, ..stand.params };
            binds.push(keep.bind.clone());
            passes.dispatch(self.key(WindowKernel::Keep), params, self.query_groups(piece), binds)?;

            let grad_o = self.stage(op, "grad_o", inputs.grad_o, sequences, tokens)?;
            let race = self.bind_rows(of_race, DType::F32, at, sequences, tokens, g.num_q_heads * g.value_dim);
            let params = WindowParams {
                input: grad_o.strides,
                out_at: done as u32,
                out2_at: race.at,
                out2_batch: race.batch,
                ..params
            };
            let groups = blocks(piece) * g.num_q_heads;
            let binds = vec![stand.info, grad_o.bind, race.bind, keep.bind, Bind::from(&of_gates)];
            passes.dispatch(self.key(WindowKernel::Halve { grad }), params, groups as u64, binds)?;
            done += groups;
            passes.ready()?.run(&self.ctx, op, Recording::Run)?;
        }
        let gates = self.spec.gate.values().len();
        let out = self.ctx.buffer(op, "output", (gates * 4) as u64, STORAGE)?;
        let mut passes = Passes::new(&self.ctx, op);
        // The kernel asks for no sequence.
        let info = passes.part(&[0u32]);
        let params = WindowParams { tokens: shares as u32, flags: gates as u32, ..WindowParams::default() };
        let binds = vec![info, Bind::from(&of_gates), Bind::from(&out)];
        passes.dispatch(self.key(WindowKernel::Gates), params, gates as u64, binds)?;
        passes.ready()?.run(&self.ctx, op, Recording::Run)?;
        let d_gate = Tensor::gpu(self.ctx.clone(), DType::F32, vec![gates], out);
        Ok(Halved { race, kept: Kept::Gpu(kept), d_gate })
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
        let (op, g) = (at.call.op, self.geometry);
        let ring = self.own(op, ring.gpu(op)?)?;
        let gradient = self.own(op, gradient.gpu_mut(op)?)?;
        let kept = kept.gpu(op)?;
        let dq = self.buffer_of(op, gradients.dq.as_ref())?;
        let dk = self.buffer_of(op, gradients.dk.as_ref())?;
        let dv = self.buffer_of(op, gradients.dv.as_ref())?;
        let pieces = self.pieces_of(at)?;
        let of_keys = |piece: &Piece| {
            let Piece { sequences, tokens, .. } = piece;
            let dk = self.bind_rows(dk, DType::F32, at, sequences, tokens, g.num_kv_heads * g.head_dim);
            (dk, self.bind_rows(dv, DType::F32, at, sequences, tokens, g.num_kv_heads * g.value_dim))
        };
        let keep_row = g.num_q_heads * g.keep_row();
        // Before anything is added to slots that tokens of the call have taken over.
        let mut passes = Passes::new(&self.ctx, op);
        for piece in &pieces {
            let (dk, dv) = of_keys(piece);
            let (bind, ring_at) = self.bind_ring(gradient, &piece.sequences);
            let Stand { info, params } = self.stand(&mut passes, at, &piece.sequences, &piece.tokens);
            let params = WindowParams {
                out_at: dk.at,
                out_batch: dk.batch,
                out2_at: dv.at,
                out2_batch: dv.batch,
                ring_at,
                ..params
            };
            let groups = self.ring_groups(piece, g.head_dim + g.value_dim);
            passes.dispatch(self.key(WindowKernel::HandOver), params, groups, vec![info, bind, dk.bind, dv.bind])?;
        }
        passes.ready()?.run(&self.ctx, op, Recording::Run)?;
        for piece in &pieces {
            let Piece { sequences, tokens, .. } = piece;
            let mut passes = Passes::new(&self.ctx, op);
            let keep = self.bind_rows(&kept, DType::F32, at, sequences, tokens, keep_row);
            let dq = self.bind_rows(dq, DType::F32, at, sequences, tokens, g.num_q_heads * g.head_dim);
            let (stand, mut binds) = self.seen(&mut passes, at, inputs, piece, ring)?;
            let params = WindowParams {
                out_at: dq.at,
                out_batch: dq.batch,
                keep_at: keep.at,
                keep_batch: keep.batch,
                ..stand.params
            };
            binds.extend([keep.bind, dq.bind]);
            passes.dispatch(self.key(WindowKernel::Query), params, self.query_groups(piece), binds)?;

            // Queries that see the piece's keys.
            let seen_by = tokens.start..(tokens.end + self.spec.tokens - 1).min(at.call.tokens);
            let q = self.stage(op, "q", inputs.q, sequences, &seen_by)?;
            let k = self.stage(op, "k", inputs.k, sequences, tokens)?;
            let v = self.stage(op, "v", inputs.v, sequences, tokens)?;
            let keep = self.bind_rows(&kept, DType::F32, at, sequences, &seen_by, keep_row);
            let (dk, dv) = of_keys(piece);
            let Stand { info, params } = self.stand(&mut passes, at, sequences, tokens);
            let params = WindowParams {
                input: q.strides,
                input2: k.strides,
                input3: v.strides,
                out_at: dk.at,
                out_batch: dk.batch,
                out2_at: dv.at,
                out2_batch: dv.batch,
                keep_at: keep.at,
                keep_batch: keep.batch,
                ..params
            };
            let groups = sequences.len() * tokens.len().div_ceil(32) * g.num_kv_heads;
            let binds = vec![info, q.bind, k.bind, v.bind, keep.bind, dk.bind, dv.bind];
            passes.dispatch(self.key(WindowKernel::Key { ring: false }), params, groups as u64, binds)?;

            // Those that see keys before the call.
            let past = sequences.clone().map(|b| at.past(b, self.spec.tokens)).max().unwrap_or(0);
            if tokens.start == 0 && past > 0 {
                let seen_by = 0..(self.spec.tokens - 1).min(at.call.tokens);
                let q = self.stage(op, "q", inputs.q, sequences, &seen_by)?;
                let keep = self.bind_rows(&kept, DType::F32, at, sequences, &seen_by, keep_row);
                let (of_ring, ring_at) = self.bind_ring(ring, sequences);
                let (grads, out_at) = self.bind_ring(gradient, sequences);
                let Stand { info, params } = self.stand(&mut passes, at, sequences, &(0..past));
                let params = WindowParams {
                    input: q.strides,
                    ring_at,
                    out_at,
                    keep_at: keep.at,
                    keep_batch: keep.batch,
                    ..params
                };
                let groups = sequences.len() * past.div_ceil(32) * g.num_kv_heads;
                let binds = vec![info, q.bind, of_ring, keep.bind, grads];
                passes.dispatch(self.key(WindowKernel::Key { ring: true }), params, groups as u64, binds)?;
            }
            passes.ready()?.run(&self.ctx, op, Recording::Run)?;
        }
        Ok(gradients)
    }

    #[cfg(target_arch = "wasm32")]
    fn export(&self, op: &'static str, _: &Ring) -> Result<RingData> {
        Err(Error::Unsupported { op, why: "browsers cannot wait for the GPU".into() })
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn export(&self, op: &'static str, ring: &Ring) -> Result<RingData> {
        let (g, ring) = (&self.geometry, self.own(op, ring.gpu(op)?)?);
        let bytes = ring.batch as u64 * self.ring_bytes(ring.dtype);
        let bytes = self.ctx.read_buffer_blocking(op, &ring.buffer, 0, bytes)?;
        let values = crate::tensor::HostTensor::new(ring.dtype, vec![bytes.len() / ring.dtype.size()], bytes).to_f32();
        let mut data = RingData::default();
        for row in values.chunks_exact(g.ring_row()) {
            data.k.extend(&row[..g.head_dim]);
            data.v.extend(&row[g.head_dim..g.head_dim + g.value_dim]);
        }
        Ok(data)
    }

    fn import(&self, op: &'static str, data: &RingData, tokens: &[u64], gradient: bool) -> Result<Ring> {
        let (g, batch) = (&self.geometry, tokens.len());
        let dtype = if gradient { DType::F32 } else { g.dtype };
        let mut values = Vec::with_capacity(batch * self.spec.tokens * g.num_kv_heads * g.ring_row());
        for (k, v) in data.k.chunks_exact(g.head_dim).zip(data.v.chunks_exact(g.value_dim)) {
            values.extend(k.iter().chain(v));
            values.resize(values.len().next_multiple_of(2), 0.0);
        }
        let buffer = self.ctx.buffer_with(op, "window of a RACE state", &encode(dtype, &values), STORAGE)?;
        Ok(Ring::Gpu(GpuRing { ctx: self.ctx.clone(), buffer, batch, dtype }))
    }

    fn warm_up(&self, output: DType) -> WarmUp {
        let boxed = |kernel| Box::new(self.key(kernel)) as Box<dyn KernelKey>;
        let kernels = [WindowKernel::Attend { output }, WindowKernel::Store];
        WarmUp::new(self.ctx.clone(), kernels.into_iter().map(boxed).collect())
    }
}
