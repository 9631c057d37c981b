//! The CUDA executor: pages in slabs of device memory, found by a table of addresses, and few launches over them.

mod append;
mod attend;
mod kernels;
pub(crate) mod merge;
mod pages;
mod params;
mod plan;
mod transfer;

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::test_keys;

use crate::engine::cuda::{Bind, Buffer, Context, KernelKey};
use crate::engine::{Recording, WarmUp};
use crate::error::{Error, Result};
use crate::lsh::Planes;
use crate::socket::executor::{Attended, Executor, Memory, SequenceData, StageTime};
use crate::socket::pages::Page;
use crate::socket::plan::Geometry;
use crate::socket::problem::{AppendRow, AttendProblem, CacheSpec, SeqState};
use crate::tensor::{DType, TensorView};
use attend::Workspace;
use kernels::{Kernel, Key};
use pages::{Pool, Table};
use params::{Call, Numbers, Slot};
use plan::Sizes;
use std::sync::Arc;

#[derive(Clone, Debug, Default)]
struct Sequence {
    pages: Vec<Page>,
    /// Its place in the state buffer.
    slot: u32,
}

/// Keys, values and index of a cache on a CUDA device.
pub(crate) struct CudaExecutor {
    ctx: Arc<Context>,
    spec: CacheSpec,
    sizes: Sizes,
    /// Hyperplanes, `[sets, head_dim, bits]`, and as three bf16 parts.
    planes: Buffer,
    plane_parts: Buffer,
    planes_stride: u32,
    /// Per slot: means `[kv head, head_dim]`, largest gains `[kv head]`.
    state: Buffer,
    slots: usize,
    free_slots: Vec<u32>,
    /// Non-finite elements seen.
    non_finite: Buffer,
    pool: Pool,
    table: Table,
    sequences: Vec<Sequence>,
    workspace: Workspace,
    /// Bytes of each scratch buffer at most; what does not fit goes through them block by block.
    scratch_limit: u64,
}

impl CudaExecutor {
    #[allow(clippy::new_ret_no_self, reason = "the device asks for an executor")]
    pub fn new(ctx: Arc<Context>, spec: &CacheSpec) -> Result<Box<dyn Executor>> {
        Ok(Box::new(Self::make(ctx, spec)?))
    }

    fn make(ctx: Arc<Context>, spec: &CacheSpec) -> Result<Self> {
        let op = "new";
        ctx.check_alive(op)?;
        let (g, caps) = (Geometry::new(spec), ctx.caps());
        let sizes = Sizes {
            g,
            shared: caps.shared_memory as usize,
            multiprocessors: caps.multiprocessors.max(1) as usize,
            bulk: caps.bulk_copies(),
        };
        let bits = spec.config.layout().bits();
        let planes = Planes::new(&spec.config.hyperplanes, bits, g.head_dim, g.num_kv_heads)?;
        let one = bits * g.head_dim;
        let mut transposed = vec![0f32; planes.rows.len()];
        for (row, values) in planes.rows.chunks(g.head_dim).enumerate() {
            for (channel, value) in values.iter().enumerate() {
                transposed[row / bits * one + channel * bits + row % bits] = *value;
            }
        }
        let planes_stride = if planes.sets == 1 { 0 } else { one as u32 };
        let slots = 16;
        Ok(Self {
            planes: ctx.buffer_with(op, bytemuck::cast_slice(&transposed))?,
            plane_parts: ctx.buffer_with(op, bytemuck::cast_slice(&plane_parts(&sizes, &planes.rows, bits)))?,
            planes_stride,
            state: ctx.buffer(op, (slots * g.slot_words() * 4) as u64)?,
            slots,
            free_slots: (0..slots as u32).rev().collect(),
            non_finite: ctx.buffer(op, 16)?,
            pool: Pool::default(),
            table: Table::default(),
            sequences: Vec::new(),
            workspace: Workspace::default(),
            scratch_limit: (caps.memory / 16).clamp(1 << 26, 1 << 32),
            spec: spec.clone(),
            sizes,
            ctx,
        })
    }

    fn key(&self, kernel: Kernel) -> Key {
        Key { kernel, sizes: self.sizes }
    }

    fn slot_bytes(&self) -> u64 {
        (self.sizes.g.slot_words() * 4) as u64
    }

    /// A call with what every kernel may read.
    fn call(&self, numbers: Numbers, (pages, pages_stride): (Bind, u32)) -> Call {
        let (sink, window) = (self.spec.config.sink as u32, self.spec.config.window as u32);
        let beta = self.spec.config.temperature.beta(self.sizes.g.head_dim);
        let numbers = Numbers { pages_stride, planes_stride: self.planes_stride, sink, window, beta, ..numbers };
        let mut call = Call::new(numbers);
        call.bind(Slot::Pages, pages);
        call.bind(Slot::Planes, &self.planes);
        call.bind(Slot::PlaneParts, &self.plane_parts);
        call.bind(Slot::State, &self.state);
        call.bind(Slot::NonFinite, &self.non_finite);
        call
    }

    /// A state slot, as zeros or as a copy of another.
    fn take_slot(&mut self, op: &'static str, from: Option<u32>) -> Result<u32> {
        let bytes = self.slot_bytes();
        if self.free_slots.is_empty() {
            let slots = 2 * self.slots;
            let state = self.ctx.buffer(op, bytes * slots as u64)?;
            self.ctx.copy(op, (&self.state, 0), (&state, 0), bytes * self.slots as u64)?;
            self.state = state;
            self.free_slots = (self.slots as u32..slots as u32).rev().collect();
            self.slots = slots;
        }
        let slot = *self.free_slots.last().ok_or(Error::out_of_memory(op, bytes))?;
        let at = u64::from(slot) * bytes;
        match from {
            Some(from) => self.ctx.copy(op, (&self.state, u64::from(from) * bytes), (&self.state, at), bytes)?,
            None => {
                let zeros = self.ctx.buffer(op, bytes)?;
                self.ctx.copy(op, (&zeros, 0), (&self.state, at), bytes)?;
            }
        }
        self.free_slots.pop();
        Ok(slot)
    }
}

/// Hyperplanes as sums of three bf16 each, `[sets, part, planes, channels]` with zeros around.
fn plane_parts(sizes: &Sizes, rows: &[f32], bits: usize) -> Vec<u16> {
    let dim = sizes.g.head_dim;
    let (padded_planes, padded_channels) = sizes.plane_parts();
    let one = padded_planes * padded_channels;
    let sets = rows.len() / (bits * dim);
    let mut parts = vec![0u16; sets * 3 * one];
    for (row, values) in rows.chunks(dim).enumerate() {
        for (channel, &value) in values.iter().enumerate() {
            let mut rest = value;
            for part in 0..3 {
                let rounded = half::bf16::from_f32(rest);
                let at = (row / bits * 3 + part) * one + row % bits * padded_channels + channel;
                parts[at] = rounded.to_bits();
                rest -= rounded.to_f32();
            }
        }
    }
    parts
}

impl Executor for CudaExecutor {
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        let op = "reserve";
        self.ctx.check_alive(op)?;
        let g = self.sizes.g;
        let pages = tokens.div_ceil(g.page);
        let missing = |s: &Sequence| pages.saturating_sub(s.pages.len());
        let wanted = self.sequences.iter().map(missing).fold(0usize, usize::saturating_add);
        pages::grow(&mut self.pool, &self.ctx, op, &g, wanted)
    }

    fn append(&mut self, rec: Recording<'_>, k: &TensorView<'_>, v: &TensorView<'_>, rows: &[AppendRow]) -> Result<()> {
        self.append_rows(&rec, k, v, rows)
    }

    fn attend(&mut self, rec: Recording<'_>, q: &TensorView<'_>, problem: &AttendProblem) -> Result<Attended> {
        self.ctx.check_alive(problem.op)?;
        rec.only_run(problem.op)?;
        let (ready, attended) = self.prepare(q, problem)?;
        ready.run(&self.ctx, problem.op)?;
        self.table.submitted(&self.ctx);
        Ok(attended)
    }

    fn warm_up(&self, q: DType, output: DType) -> WarmUp {
        let keys = self.kernels(q, output).into_iter();
        let boxed = keys.map(|kernel| Box::new(self.key(kernel)) as Box<dyn KernelKey>).collect();
        WarmUp::cuda(self.ctx.clone(), boxed)
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn profile(&mut self, q: &TensorView<'_>, problem: &AttendProblem) -> Result<Vec<StageTime>> {
        self.profile_attend(q, problem)
    }

    fn truncate(&mut self, seq: usize, state: SeqState) -> Result<()> {
        self.ctx.check_alive("truncate")?;
        let keep = state.len.div_ceil(self.sizes.g.page);
        let pages = &mut self.sequences[seq].pages;
        let dropped = pages.split_off(keep.min(pages.len()));
        dropped.into_iter().for_each(|page| self.pool.release(page));
        self.table.changed();
        Ok(())
    }

    fn fork(&mut self, seq: Option<usize>, _: SeqState) -> Result<()> {
        let op = "fork";
        self.ctx.check_alive(op)?;
        // Means and gains would be copied at launches only, and the others' too where the buffer grows.
        self.ctx.refuse_capture(op, "no sequence can be added")?;
        let source = seq.map(|s| self.sequences[s].clone());
        let slot = self.take_slot(op, source.as_ref().map(|s| s.slot))?;
        let pages = source.map(|s| s.pages).unwrap_or_default();
        pages.iter().for_each(|&page| self.pool.share(page));
        self.sequences.push(Sequence { pages, slot });
        self.table.changed();
        Ok(())
    }

    fn remove(&mut self, seq: usize) -> Result<()> {
        let sequence = self.sequences.remove(seq);
        sequence.pages.into_iter().for_each(|page| self.pool.release(page));
        self.free_slots.push(sequence.slot);
        self.table.changed();
        Ok(())
    }

    fn memory(&self) -> Memory {
        let g = &self.sizes.g;
        let [keys, values, index] = g.page_bytes();
        let pages = self.pool.slabs.iter().map(|slab| slab.size() / pages::page_bytes(g)).sum::<u64>();
        let bits = index / g.index_words() as u64 * g.words as u64;
        let own = [&self.planes, &self.plane_parts, &self.state, &self.non_finite];
        let workspace = self.workspace.bytes() + self.table.bytes() + own.iter().map(|b| b.size()).sum::<u64>();
        Memory {
            keys: pages * keys,
            values: pages * values,
            bits: pages * bits,
            scalars: pages * (index - bits),
            workspace,
        }
    }

    fn non_finite_seen(&mut self) -> Result<u64> {
        let bytes = self.ctx.read_buffer_blocking("non_finite_seen", &self.non_finite, 0, 4)?;
        Ok(bytes.first_chunk().map_or(0, |b| u64::from(u32::from_le_bytes(*b))))
    }

    fn export(&mut self, seq: usize, state: SeqState) -> Result<SequenceData> {
        self.export_sequence(seq, state)
    }

    fn import(&mut self, seq: usize, data: &SequenceData) -> Result<()> {
        self.import_sequence(seq, data)
    }
}
