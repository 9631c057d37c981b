//! The exact window on the CPU: blocks of queries against blocks of keys as matrix products, softmax online.
//!
//! A task of a forward pass is a block of queries of one kv head, one of a backward pass a span of tokens; a span's
//! gradients of the keys before it are added when it is done, in order, so results do not depend on who was first.

use super::tile::{Room, Source};
use super::window_blocks::{Call, Dims, KEYS, SPAN, Share};
use super::window_ring::CpuRing;
use crate::engine::Recording;
use crate::engine::cpu::map;
use crate::engine::cpu::memory::zeros;
use crate::engine::cpu::simd::{Level, ROW, padded};
use crate::error::{Error, Result};
use crate::race::config::{Gate, RaceShape};
use crate::race::executor::{InputGradients, Inputs, Pass, needed};
use crate::race::window::{Halved, Kept, Prepared, Ring, RingData, WindowCall, WindowExecutor, WindowSpec};
use crate::tensor::{DType, Tensor};

/// The window on the CPU.
pub(crate) struct CpuWindow {
    level: Level,
    spec: WindowSpec,
    /// One per query head.
    gates: Vec<f32>,
}

impl CpuWindow {
    pub fn new(spec: WindowSpec) -> Self {
        Self::with_level(Level::best(), spec)
    }

    fn with_level(level: Level, spec: WindowSpec) -> Self {
        let gates = spec.gate.of_heads(spec.shape.num_q_heads);
        Self { level, spec, gates }
    }

    fn dims(&self) -> Dims {
        let RaceShape { head_dim, value_dim, .. } = self.spec.shape;
        let group = self.spec.shape.group();
        Dims {
            group,
            dim: head_dim,
            dim_row: padded(head_dim),
            value_dim,
            value_row: padded(value_dim),
            queries: (384 / group).clamp(ROW, KEYS) / ROW * ROW,
        }
    }

    fn call<'a>(&self, at: WindowCall<'a>, inputs: &Inputs<'a>, ring: &'a CpuRing) -> Result<Call<'a>> {
        let op = at.call.op;
        let source = |name, view| -> Result<Source<'a>> { Source::new(op, name, needed(op, name, view)?) };
        let [k, v] = ring.views();
        Ok(Call {
            level: self.level,
            window: self.spec.tokens,
            scale: self.spec.scale,
            at,
            q: source("q", inputs.q)?,
            k: source("k", inputs.k)?,
            v: source("v", inputs.v)?,
            ring: [Source::new(op, "state", k)?, Source::new(op, "state", v)?],
            dims: self.dims(),
        })
    }

    fn gates_of(&self, kv_head: usize) -> &[f32] {
        let group = self.spec.shape.group();
        &self.gates[kv_head * group..(kv_head + 1) * group]
    }
}

struct CpuPrepared<'a> {
    window: &'a CpuWindow,
    at: WindowCall<'a>,
    inputs: Inputs<'a>,
    room: Option<Room>,
}

impl Prepared for CpuPrepared<'_> {
    fn run(self: Box<Self>, _: Recording<'_>, ring: &mut Ring, race: Option<Tensor>) -> Result<Option<Tensor>> {
        let Self { window, at, inputs, mut room } = *self;
        let op = at.call.op;
        let ring = ring.cpu_mut(op)?;
        if let (Some(room), Some(race)) = (&mut room, race.as_ref().and_then(Tensor::view)) {
            let (call, race, out) = (window.call(at, &inputs, ring)?, Source::new(op, "o", race)?, room.rows());
            let d = call.dims;
            let tasks = call.tasks(window.spec.shape.num_kv_heads, d.queries);
            let work = call.work(&tasks);
            map(tasks, work, |task| {
                let (mut o, _) = call.attend(&task);
                let mut of_race = vec![0.0; o.len()];
                call.of_queries(&race, &task, &mut of_race, d.value_row);
                let heads =
                    o.chunks_exact_mut(d.queries * d.value_row).zip(of_race.chunks_exact(d.queries * d.value_row));
                for (g, ((o, race), gate)) in heads.zip(window.gates_of(task.kv_head)).enumerate() {
                    o.iter_mut().zip(race).for_each(|(o, race)| *o = gate * *o + (1.0 - gate) * race);
                    let place = [task.b, task.tokens.start, task.kv_head * d.group + g];
                    // SAFETY: tasks share no tokens of a sequence and head.
                    unsafe { out.write(call.level, place, task.tokens.len(), o, d.value_row) };
                }
            });
        }
        let (k, v) = (needed(op, "k", inputs.k)?, needed(op, "v", inputs.v)?);
        ring.take_in(at, &k, &v);
        Ok(room.map(Room::finish))
    }
}

impl WindowExecutor for CpuWindow {
    fn set_gate(&mut self, gate: &Gate) -> Result<()> {
        self.gates = gate.of_heads(self.spec.shape.num_q_heads);
        self.spec.gate = gate.clone();
        Ok(())
    }

    fn new_ring(&self, op: &'static str, batch: usize, gradient: bool) -> Result<Ring> {
        Ok(Ring::Cpu(CpuRing::zeros(op, &self.spec, batch, gradient)?))
    }

    fn fork(&self, op: &'static str, ring: &Ring) -> Result<Ring> {
        Ok(Ring::Cpu(ring.cpu(op)?.copy(op)?))
    }

    fn prepare<'a>(
        &'a mut self,
        at: WindowCall<'a>,
        inputs: &Inputs<'a>,
        ring: &Ring,
    ) -> Result<Box<dyn Prepared + 'a>> {
        let op = at.call.op;
        ring.cpu(op)?;
        for (name, view) in [("q", inputs.q), ("k", inputs.k), ("v", inputs.v)] {
            view.map(|view| Source::new(op, name, view)).transpose()?;
        }
        let RaceShape { num_q_heads, value_dim, .. } = self.spec.shape;
        let shape = [at.call.batch(), at.call.tokens, num_q_heads, value_dim];
        let reads = at.call.pass != Pass::Absorb;
        let room = reads.then(|| Room::new(op, at.call.output, shape)).transpose()?;
        Ok(Box::new(CpuPrepared { window: self, at, inputs: *inputs, room }))
    }

    fn halve(&mut self, at: WindowCall<'_>, inputs: &Inputs<'_>, ring: &Ring, race: Tensor) -> Result<Halved> {
        let op = at.call.op;
        let call = self.call(at, inputs, ring.cpu(op)?)?;
        let d = call.dims;
        let RaceShape { num_q_heads, num_kv_heads, value_dim, .. } = self.spec.shape;
        let (batch, tokens) = (at.call.batch(), at.call.tokens);
        let grad_o = Source::new(op, "grad_o", needed(op, "grad_o", inputs.grad_o)?)?;
        let race = Source::new(op, "o", needed(op, "o", race.view())?)?;
        let mut room = Room::new(op, DType::F32, [batch, tokens, num_q_heads, value_dim])?;
        let mut kept = zeros::<[f32; 2]>(op, batch * tokens * num_q_heads)?;
        let out = room.rows();
        let tasks = call.tasks(num_kv_heads, d.queries);
        let work = call.work(&tasks);
        let parts = map(tasks, work, |task| {
            let (o, lse) = call.attend(&task);
            let (mut of_race, mut g) = (vec![0.0; o.len()], vec![0.0; o.len()]);
            call.of_queries(&race, &task, &mut of_race, d.value_row);
            call.of_queries(&grad_o, &task, &mut g, d.value_row);
            let mut means = vec![0.0; lse.len()];
            let mut d_gates = vec![0.0; d.group];
            for (head, gate) in self.gates_of(task.kv_head).iter().enumerate() {
                for row in (head * d.queries..).take(task.tokens.len()) {
                    let at = row * d.value_row..(row + 1) * d.value_row;
                    let dot = |x: &[f32]| -> f64 {
                        g[at.clone()].iter().zip(&x[at.clone()]).map(|(g, x)| f64::from(*g) * f64::from(*x)).sum()
                    };
                    let of_window = dot(&o);
                    d_gates[head] += of_window - dot(&of_race);
                    means[row] = (f64::from(*gate) * of_window) as f32;
                }
                let g = &mut g[head * d.queries * d.value_row..][..d.queries * d.value_row];
                g.iter_mut().for_each(|g| *g *= 1.0 - gate);
                let place = [task.b, task.tokens.start, task.kv_head * d.group + head];
                // SAFETY: tasks share no tokens of a sequence and head.
                unsafe { out.write(call.level, place, task.tokens.len(), g, d.value_row) };
            }
            (task, lse, means, d_gates)
        });
        let mut d_gate = vec![0.0; num_q_heads];
        for (task, lse, means, d_gates) in parts {
            for (head, x) in d_gates.iter().enumerate() {
                d_gate[task.kv_head * d.group + head] += x;
                for (i, token) in task.tokens.clone().enumerate() {
                    let row = head * d.queries + i;
                    kept[call.kept_at(&task, token) + head] = [lse[row], means[row]];
                }
            }
        }
        if matches!(self.spec.gate, Gate::Shared(_)) {
            d_gate = vec![d_gate.iter().sum::<f64>()];
        }
        let narrow: Vec<f32> = d_gate.iter().map(|x| *x as f32).collect();
        let d_gate = Tensor::host_f32(vec![narrow.len()], narrow);
        Ok(Halved { race: room.finish(), kept: Kept::Cpu(kept), d_gate })
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
        let kept = kept.cpu(op)?;
        let gradient = gradient.cpu_mut(op)?;
        let call = self.call(at, inputs, ring.cpu(op)?)?;
        let grad_o = Source::new(op, "grad_o", needed(op, "grad_o", inputs.grad_o)?)?;
        let (d, shape) = (call.dims, self.spec.shape);
        let mut dq = Sums::new(op, gradients.dq)?;
        let mut dk = Sums::new(op, gradients.dk)?;
        let mut dv = Sums::new(op, gradients.dv)?;
        gradient.hand_over(at, |values, b, token, kv_head, row| {
            let to = if values { &mut dv } else { &mut dk };
            to.add([b, token, kv_head], row);
        });
        let span = self.spec.tokens.max(SPAN).next_multiple_of(d.queries);
        let tasks = call.tasks(shape.num_kv_heads, span);
        // A few at a time, so that what is not yet added stays small.
        for tasks in tasks.chunks(4 * rayon::current_num_threads().max(1)) {
            let work = call.work(tasks);
            let shares =
                map(tasks.to_vec(), work, |task| call.span(&task, self.gates_of(task.kv_head), &grad_o, &kept));
            for Share { task, dq: of_queries, first, dk: of_keys, dv: of_values } in shares {
                for (i, row) in of_queries.chunks_exact(d.dim_row).enumerate() {
                    let (head, token) = (i / task.tokens.len(), task.tokens.start + i % task.tokens.len());
                    dq.add([task.b, token, task.kv_head * d.group + head], row);
                }
                let rows = of_keys.chunks_exact(d.dim_row).zip(of_values.chunks_exact(d.value_row));
                for (position, (k, v)) in (first..).zip(rows) {
                    if position >= 0 {
                        let place = [task.b, position as usize, task.kv_head];
                        dk.add(place, k);
                        dv.add(place, v);
                    } else {
                        let slot = call.slot_before(&task, position);
                        gradient.add([task.b, slot, task.kv_head], k, v);
                    }
                }
            }
        }
        Ok(InputGradients { dq: Some(dq.finish()), dk: Some(dk.finish()), dv: Some(dv.finish()) })
    }

    fn export(&self, op: &'static str, ring: &Ring) -> Result<RingData> {
        Ok(ring.cpu(op)?.export())
    }

    fn import(&self, op: &'static str, data: &RingData, tokens: &[u64], gradient: bool) -> Result<Ring> {
        Ok(Ring::Cpu(CpuRing::import(op, &self.spec, data, tokens.len(), gradient)?))
    }
}

/// A gradient of RACE's, f32, that the window's is added to.
struct Sums {
    shape: Vec<usize>,
    data: Vec<f32>,
}

impl Sums {
    fn new(op: &'static str, tensor: Option<Tensor>) -> Result<Self> {
        let why = || Error::Unsupported { op, why: "the pass gave no such gradient".into() };
        let tensor = tensor.ok_or_else(why)?;
        let shape = tensor.shape().to_vec();
        Ok(Self { shape, data: tensor.into_f32().ok_or_else(why)? })
    }

    /// Adds to the row of `[sequence, token, head]`.
    fn add(&mut self, [b, t, h]: [usize; 3], row: &[f32]) {
        let [_, tokens, heads, dim] = self.shape[..] else { return };
        let to = &mut self.data[((b * tokens + t) * heads + h) * dim..][..dim];
        to.iter_mut().zip(row).for_each(|(to, x)| *to += x);
    }

    fn finish(self) -> Tensor {
        Tensor::host_f32(self.shape, self.data)
    }
}
