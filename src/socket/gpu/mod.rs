//! The wgpu executor: pages in slabs, and lists of dispatches over them.

mod append;
mod attend;
mod blocks;
mod kernels;
pub(crate) mod merge;
mod pages;
mod params;
mod transfer;

#[cfg(test)]
mod tests;

use crate::engine::gpu::{Context, KernelKey};
use crate::engine::{Recording, WarmUp};
use crate::error::Result;
use crate::lsh::Planes;
#[cfg(not(target_arch = "wasm32"))]
use crate::socket::executor::StageTime;
use crate::socket::executor::{Attended, Executor, Memory, SequenceData};
use crate::socket::gpu::kernels::{Kernel, Key};
use crate::socket::gpu::pages::{Pool, Slab};
use crate::socket::pages::Page;
use crate::socket::plan::{
    ATTEND_GROUPS, Geometry, MOST_WORKGROUP_MEMORY, RESCORE_FUSED_KEYS, RESCORE_SLICES, SCORE_GROUPS, WORKGROUP_MEMORY,
};
use crate::socket::problem::{AppendRow, AttendProblem, CacheSpec, SeqState};
use crate::tensor::{DType, TensorView};
use attend::Workspace;
use std::sync::Arc;

#[derive(Clone, Debug, Default)]
struct Sequence {
    pages: Vec<Page>,
    /// Its place in the state buffer.
    slot: u32,
}

/// Keys, values and index of a cache on a GPU.
pub(crate) struct GpuExecutor {
    ctx: Arc<Context>,
    spec: CacheSpec,
    geometry: Geometry,
    /// Hyperplanes, `[sets, head_dim, bits]`: neighbouring invocations read neighbouring planes.
    planes: wgpu::Buffer,
    planes_stride: u32,
    /// Per slot: means `[kv head, head_dim]`, largest gains `[kv head]`.
    state: wgpu::Buffer,
    slots: usize,
    free_slots: Vec<u32>,
    /// Non-finite elements seen.
    counters: wgpu::Buffer,
    pool: Pool,
    sequences: Vec<Sequence>,
    workspace: Workspace,
    /// Bytes of each scratch buffer at most; what does not fit goes through them block by block.
    scratch_limit: u64,
    /// Rows of at most so many keys get exact scores of their candidates by the workgroup that searches them.
    fused_keys: u64,
    /// Workgroups of scoring that are enough, and of attention.
    score_groups: u64,
    attend_groups: u64,
}

const STORAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

impl GpuExecutor {
    pub fn new(ctx: Arc<Context>, spec: &CacheSpec) -> Result<Self> {
        let op = "new";
        ctx.check_alive(op)?;
        let caps = ctx.caps();
        // The checked twin is also the one that needs no feature and no more than WebGPU promises, so that both are
        // tested wherever more is offered.
        let geometry = if caps.unchecked {
            let offered = caps.subgroups && caps.subgroup_min >= 4 && caps.subgroup_min <= 64;
            let subgroup = if offered { caps.subgroup_min as usize } else { 0 };
            let workgroup_memory = (caps.workgroup_memory as usize).clamp(WORKGROUP_MEMORY, MOST_WORKGROUP_MEMORY);
            Geometry { subgroup, workgroup_memory, allow_coarse: true, ..Geometry::new(spec) }
        } else {
            Geometry::new(spec)
        };
        Slab::check(&ctx, &geometry)?;
        let bits = spec.config.layout().bits();
        let planes = Planes::new(&spec.config.hyperplanes, bits, geometry.head_dim, geometry.num_kv_heads)?;
        let mut transposed = vec![0f32; planes.rows.len()];
        let one = bits * geometry.head_dim;
        for (row, values) in planes.rows.chunks(geometry.head_dim).enumerate() {
            for (channel, value) in values.iter().enumerate() {
                transposed[row / bits * one + channel * bits + row % bits] = *value;
            }
        }
        let planes_stride = if planes.sets == 1 { 0 } else { one as u32 };
        let planes = ctx.buffer_with(op, "hyperplanes", bytemuck::cast_slice(&transposed), STORAGE)?;
        let slots = geometry.max_sequences(caps.max_storage_binding).clamp(1, 16);
        let state = ctx.buffer(op, "sequence state", (slots * geometry.slot_words() * 4) as u64, STORAGE)?;
        let counters = ctx.buffer(op, "counters", 16, STORAGE)?;
        Ok(Self {
            spec: spec.clone(),
            planes,
            planes_stride,
            state,
            slots,
            free_slots: (0..slots as u32).rev().collect(),
            counters,
            pool: Pool::default(),
            sequences: Vec::new(),
            workspace: Workspace::default(),
            scratch_limit: ctx.caps().max_storage_binding,
            fused_keys: RESCORE_FUSED_KEYS,
            score_groups: SCORE_GROUPS,
            attend_groups: ATTEND_GROUPS,
            geometry,
            ctx,
        })
    }

    fn key(&self, kernel: Kernel) -> Key {
        Key { kernel, geometry: self.geometry }
    }

    fn slot_bytes(&self) -> u64 {
        (self.geometry.slot_words() * 4) as u64
    }

    /// A state slot, as zeros or as a copy of another.
    fn take_slot(&mut self, op: &'static str, from: Option<u32>) -> Result<u32> {
        let bytes = self.slot_bytes();
        if self.free_slots.is_empty() {
            let most = self.max_sequences();
            if self.slots >= most {
                let (value, limit) = (self.slots as u64 + 1, most as u64);
                return Err(crate::Error::Limit { op, what: "sequences", value, limit });
            }
            let slots = (2 * self.slots).min(most);
            let state = self.ctx.buffer(op, "sequence state", bytes * slots as u64, STORAGE)?;
            let mut encoder = self.ctx.encoder(op);
            encoder.copy_buffer_to_buffer(&self.state, 0, &state, 0, bytes * self.slots as u64);
            self.ctx.submit(op, encoder)?;
            self.state = state;
            self.free_slots = (self.slots as u32..slots as u32).rev().collect();
            self.slots = slots;
        }
        let slot = *self.free_slots.last().ok_or(crate::Error::out_of_memory(op, bytes))?;
        let mut encoder = self.ctx.encoder(op);
        let to = u64::from(slot) * bytes;
        match from {
            // Copies inside one buffer are not allowed.
            Some(from) => {
                let between = self.ctx.buffer(op, "sequence state copy", bytes, STORAGE)?;
                encoder.copy_buffer_to_buffer(&self.state, u64::from(from) * bytes, &between, 0, bytes);
                encoder.copy_buffer_to_buffer(&between, 0, &self.state, to, bytes);
            }
            None => encoder.clear_buffer(&self.state, to, Some(bytes)),
        }
        self.ctx.submit(op, encoder)?;
        self.free_slots.pop();
        Ok(slot)
    }
}

impl Executor for GpuExecutor {
    fn max_sequences(&self) -> usize {
        self.geometry.max_sequences(self.ctx.caps().max_storage_binding)
    }

    fn reserve(&mut self, tokens: usize) -> Result<()> {
        let op = "reserve";
        self.ctx.check_alive(op)?;
        let pages = tokens.div_ceil(self.geometry.page);
        let missing = |s: &Sequence| pages.saturating_sub(s.pages.len());
        let wanted = self.sequences.iter().map(missing).fold(0usize, usize::saturating_add);
        pages::grow(&mut self.pool, &self.ctx, op, &self.geometry, wanted)
    }

    fn append(&mut self, rec: Recording<'_>, k: &TensorView<'_>, v: &TensorView<'_>, rows: &[AppendRow]) -> Result<()> {
        self.append_rows(rec, k, v, rows)
    }

    fn attend(&mut self, rec: Recording<'_>, q: &TensorView<'_>, problem: &AttendProblem) -> Result<Attended> {
        self.ctx.check_alive(problem.op)?;
        let (ready, attended) = self.prepare(q, problem)?;
        ready.run(&self.ctx, problem.op, rec)?;
        Ok(attended)
    }

    fn warm_up(&self, q: DType, output: DType) -> WarmUp {
        let mut kernels = vec![
            Kernel::StoreKv,
            Kernel::HashKeys,
            Kernel::HashStep,
            Kernel::HashQuery { q },
            Kernel::Threshold { rescore: false },
            Kernel::Collect,
            Kernel::MergePartials { output, split: 1 },
            Kernel::MergePartials { output, split: self.geometry.merge_split() },
            Kernel::Prefill { q },
        ];
        if self.geometry.center {
            kernels.push(Kernel::MeanKeys);
        }
        if self.geometry.coarse() {
            kernels.extend([Kernel::Rescore { slices: RESCORE_SLICES }, Kernel::Threshold { rescore: true }]);
        }
        for chunk in self.geometry.chunks() {
            for coarse in [false, self.geometry.coarse()] {
                kernels.push(Kernel::Score { chunk: self.geometry.score_chunk(chunk), coarse });
                kernels.push(Kernel::Bounds { coarse });
                kernels.push(Kernel::Candidates { chunk: self.geometry.score_chunk(chunk), coarse });
            }
            kernels.extend([true, false].map(|sparse| Kernel::Attend { q, chunk, sparse }));
        }
        let boxed = |kernel| Box::new(self.key(kernel)) as Box<dyn KernelKey>;
        WarmUp::new(self.ctx.clone(), kernels.into_iter().map(boxed).collect())
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn profile(&mut self, q: &TensorView<'_>, problem: &AttendProblem) -> Result<Vec<StageTime>> {
        self.profile_attend(q, problem)
    }

    fn truncate(&mut self, seq: usize, state: SeqState) -> Result<()> {
        self.ctx.check_alive("truncate")?;
        let keep = state.len.div_ceil(self.geometry.page);
        let pages = &mut self.sequences[seq].pages;
        let dropped = pages.split_off(keep.min(pages.len()));
        dropped.into_iter().for_each(|page| self.pool.release(page));
        self.workspace.pages_changed();
        Ok(())
    }

    fn fork(&mut self, seq: Option<usize>, _: SeqState) -> Result<()> {
        let op = "fork";
        self.ctx.check_alive(op)?;
        let source = seq.map(|s| self.sequences[s].clone());
        let slot = self.take_slot(op, source.as_ref().map(|s| s.slot))?;
        let pages = source.map(|s| s.pages).unwrap_or_default();
        pages.iter().for_each(|&page| self.pool.share(page));
        self.sequences.push(Sequence { pages, slot });
        self.workspace.pages_changed();
        Ok(())
    }

    fn remove(&mut self, seq: usize) -> Result<()> {
        let sequence = self.sequences.remove(seq);
        sequence.pages.into_iter().for_each(|page| self.pool.release(page));
        self.free_slots.push(sequence.slot);
        self.workspace.pages_changed();
        Ok(())
    }

    fn memory(&self) -> Memory {
        let [keys, values, index] = pages::bytes(&self.pool);
        let g = &self.geometry;
        let bits = index / g.index_words() as u64 * g.words as u64;
        let workspace = self.workspace.bytes() + self.planes.size() + self.state.size() + self.counters.size();
        Memory { keys, values, bits, scalars: index - bits, workspace }
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn non_finite_seen(&mut self) -> Result<u64> {
        let bytes = self.ctx.read_buffer_blocking("non_finite_seen", &self.counters, 0, 4)?;
        Ok(bytes.first_chunk().map_or(0, |b| u64::from(u32::from_le_bytes(*b))))
    }

    #[cfg(target_arch = "wasm32")]
    fn non_finite_seen(&mut self) -> Result<u64> {
        let why = "browsers cannot wait for the GPU".into();
        Err(crate::Error::Unsupported { op: "non_finite_seen", why })
    }

    fn export(&mut self, seq: usize, state: SeqState) -> Result<SequenceData> {
        self.export_sequence(seq, state)
    }

    fn import(&mut self, seq: usize, data: &SequenceData) -> Result<()> {
        self.import_sequence(seq, data)
    }
}
