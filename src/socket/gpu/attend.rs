//! Attention: query hash, score, select, attend, merge; or without the first three; or tiled for a prompt.

use super::blocks::{Block, Blocks, Scratch};
use super::kernels::Kernel;
use super::params::{Entry, Params, Row};
use super::{GpuExecutor, STORAGE};
#[cfg(not(target_arch = "wasm32"))]
use crate::engine::gpu::Timer;
use crate::engine::gpu::{self as engine, Bind, Input, Passes, Ready, Strides, stage};
use crate::error::{Error, Result};
#[cfg(not(target_arch = "wasm32"))]
use crate::socket::executor::StageTime;
use crate::socket::executor::{Attended, Selection};
use crate::socket::pages::{local_of, slab_of};
use crate::socket::plan::{BINS, DENSE_PER_SPARSE, RESCORE_SLICES};
use crate::socket::problem::{AttendProblem, Kind};
use crate::tensor::{DType, Tensor, TensorView};
use std::ops::Range;

/// Page entries of one slab, sorted by sequence.
struct SlabEntries {
    slab: usize,
    buffer: wgpu::Buffer,
    /// First entry of each sequence, and the number of all.
    starts: Vec<u32>,
}

/// Scratch buffers that calls of one cache share, grown as needed.
#[derive(Default)]
pub(super) struct Workspace {
    buffers: [engine::Scratch; 5],
    entries: Option<Vec<SlabEntries>>,
}

impl Workspace {
    /// Entries are made anew at the next call.
    pub fn pages_changed(&mut self) {
        self.entries = None;
    }

    #[cfg(test)]
    pub fn buffers(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        self.buffers.iter().filter_map(engine::Scratch::buffer)
    }

    pub fn bytes(&self) -> u64 {
        self.buffers.iter().map(engine::Scratch::bytes).sum()
    }
}

impl GpuExecutor {
    fn scratch(&mut self, op: &'static str, which: Scratch, bytes: u64) -> Result<wgpu::Buffer> {
        let what = match which {
            Scratch::Tables => "bytes of look-up tables",
            Scratch::Histogram => "bytes of histograms",
            Scratch::Scores => "bytes of scores",
            Scratch::Candidates => "bytes of candidates",
            Scratch::Partials => "bytes of partial results",
        };
        self.workspace.buffers[which as usize].get(&self.ctx, op, what, bytes)
    }

    fn make_entries(&mut self, op: &'static str) -> Result<()> {
        if self.workspace.entries.is_some() {
            return Ok(());
        }
        let mut per_slab = Vec::new();
        for slab in 0..self.pool.slabs.len() {
            let mut entries = Vec::new();
            let mut starts = Vec::with_capacity(self.sequences.len() + 1);
            for (b, sequence) in self.sequences.iter().enumerate() {
                starts.push(entries.len() as u32);
                for (logical, &page) in sequence.pages.iter().enumerate().filter(|(_, p)| slab_of(**p) == slab) {
                    let (sequence, logical) = (b as u32, logical as u32);
                    entries.push(Entry { sequence, logical, page: local_of(page), reserved: 0 });
                }
            }
            starts.push(entries.len() as u32);
            if !entries.is_empty() {
                let buffer = self.ctx.buffer_with(op, "page entries", bytemuck::cast_slice(&entries), STORAGE)?;
                per_slab.push(SlabEntries { slab, buffer, starts });
            }
        }
        self.workspace.entries = Some(per_slab);
        Ok(())
    }

    fn entries(&self) -> &[SlabEntries] {
        self.workspace.entries.as_deref().unwrap_or_default()
    }

    fn output(&self, op: &'static str, dtype: DType, shape: Vec<usize>) -> Result<(Tensor, wgpu::Buffer)> {
        let bytes = (shape.iter().product::<usize>() * dtype.size()) as u64;
        let buffer = self.ctx.buffer(op, "output", bytes.max(4), STORAGE)?;
        Ok((Tensor::gpu(self.ctx.clone(), dtype, shape, buffer.clone()), buffer))
    }

    /// Makes a call's dispatches ready.
    pub(super) fn prepare(&mut self, q: &TensorView<'_>, problem: &AttendProblem) -> Result<(Ready, Attended)> {
        let op = problem.op;
        let g = self.geometry;
        if problem.output != DType::F32 && !g.value_dim.is_multiple_of(2) {
            let why = format!("16-bit outputs of an odd value_dim = {} on a GPU; ask for F32 output", g.value_dim);
            return Err(Error::Unsupported { op, why });
        }
        self.make_entries(op)?;
        let shape = vec![problem.batch(), problem.tq, g.num_q_heads];
        let (lse, lse_buffer) = self.output(op, DType::F32, shape.clone())?;
        let (o, o_buffer) = self.output(op, problem.output, [shape, vec![g.value_dim]].concat())?;
        let sparse =
            problem.kind == Kind::Sparse && (problem.want_selection || problem.rows.iter().any(|r| !r.is_dense()));
        if problem.rows.is_empty() {
            let selection = if problem.want_selection { Some(self.selection_buffers(problem)?.0) } else { None };
            return Ok((Passes::new(&self.ctx, op).ready()?, Attended { o, lse, selection }));
        }
        let (ready, selection) = if problem.kind == Kind::Prefill {
            (self.prefill(q, problem, &o_buffer, &lse_buffer)?, None)
        } else {
            self.decode(q, problem, sparse, &o_buffer, &lse_buffer)?
        };
        Ok((ready, Attended { o, lse, selection }))
    }

    fn selection_buffers(&self, problem: &AttendProblem) -> Result<(Selection, wgpu::Buffer, wgpu::Buffer)> {
        let heads = self.geometry.num_kv_heads * self.geometry.score_rows();
        let shape = vec![problem.batch(), problem.tq, heads, problem.selection_width(&self.spec.config)];
        let (indices, indices_buffer) = self.output(problem.op, DType::I32, shape.clone())?;
        let (scores, scores_buffer) = self.output(problem.op, DType::F32, shape)?;
        Ok((Selection { indices, scores }, indices_buffer, scores_buffer))
    }

    fn decode(
        &mut self,
        q: &TensorView<'_>,
        problem: &AttendProblem,
        sparse: bool,
        o: &wgpu::Buffer,
        lse: &wgpu::Buffer,
    ) -> Result<(Ready, Option<Selection>)> {
        let op = problem.op;
        let g = self.geometry;
        let (batch, tq) = (problem.batch(), problem.tq);
        let q_dtype = q.dtype();
        let q = stage(&self.ctx, op, q, 0..batch, 0..tq)?;
        let limit = self.scratch_limit;
        let Blocks { rows, blocks, chunk } = Blocks::new(&g, problem, sparse, limit, |b| self.sequences[b].slot);
        let span = if g.attend_rows(chunk, sparse).is_some() {
            let times = if sparse { 1 } else { DENSE_PER_SPARSE };
            let busy = self.attend_groups.saturating_mul(times);
            g.attend_span(chunk, problem.tokens(), tq, self.ctx.caps().max_storage_binding, busy)
        } else {
            1
        };
        let mut bytes = [0u64; 5];
        for block in &blocks {
            let needed = block.load.bytes(&g, sparse);
            bytes.iter_mut().zip(needed).for_each(|(most, needed)| *most = needed.max(*most));
        }
        let mut scratch = |which: Scratch| self.scratch(op, which, bytes[which as usize]);
        let partials = scratch(Scratch::Partials)?;
        let selecting = if sparse {
            Some(Selecting {
                tables: scratch(Scratch::Tables)?,
                histogram: scratch(Scratch::Histogram)?,
                scores: scratch(Scratch::Scores)?,
                candidates: scratch(Scratch::Candidates)?,
            })
        } else {
            None
        };
        let collected = if problem.want_selection && sparse { Some(self.selection_buffers(problem)?) } else { None };
        let params = Params {
            batch: batch as u32,
            tq: tq as u32,
            scale: problem.scale,
            beta: self.spec.config.temperature.beta(g.head_dim),
            planes_stride: self.planes_stride,
            input: q.strides,
            sink: self.spec.config.sink as u32,
            window: self.spec.config.window as u32,
            width: problem.selection_width(&self.spec.config) as u32,
            ..Default::default()
        };

        let mut passes = Passes::new(&self.ctx, op);
        let rows_part = passes.part(&rows);
        for block in &blocks {
            let first_row = (block.sequences.start * tq + block.tokens.start) as u32;
            let params = Params {
                first_row,
                header: block.load.header(&g) as u32,
                tokens: block.tokens.len() as u32,
                first_token: block.tokens.start as u32,
                ..params
            };
            if let Some(s) = &selecting {
                let binds = vec![
                    q.bind.clone(),
                    Bind::from(&self.planes),
                    Bind::from(&self.state),
                    rows_part.clone(),
                    Bind::from(&s.tables),
                    Bind::from(&s.histogram),
                ];
                let groups = block.load.rows * g.tables_per_row();
                passes.dispatch(self.key(Kernel::HashQuery { q: q_dtype }), params, groups, binds)?;
                let coarse = g.coarse() && collected.is_none();
                self.select(&mut passes, s, params, block, chunk, &rows_part, coarse)?;
            }
            self.attend_block(
                &mut passes,
                params,
                block,
                chunk,
                span,
                q_dtype,
                &q,
                &rows_part,
                &partials,
                selecting.as_ref(),
            )?;
            let binds = vec![rows_part.clone(), Bind::from(&partials), Bind::from(o), Bind::from(lse)];
            let kernel = Kernel::MergePartials { output: problem.output, split: g.merge_split() };
            let groups = block.load.rows * (g.num_q_heads * g.merge_split()) as u64;
            passes.dispatch(self.key(kernel), params, groups, binds)?;
            if let (Some(s), Some((_, indices, values))) = (&selecting, &collected) {
                let binds = vec![rows_part.clone(), Bind::from(&s.scores), Bind::from(indices), Bind::from(values)];
                passes.dispatch(self.key(Kernel::Collect), params, block.load.rows * g.scores_per_row(), binds)?;
            }
        }
        Ok((passes.ready()?, collected.map(|(selection, ..)| selection)))
    }

    #[allow(clippy::too_many_arguments, reason = "one call's inputs, all different")]
    fn select(
        &self,
        passes: &mut Passes<'_>,
        s: &Selecting,
        params: Params,
        block: &Block,
        chunk: usize,
        rows: &Bind,
        coarse: bool,
    ) -> Result<()> {
        let g = &self.geometry;
        let chunk = g.score_chunk(chunk);
        let of_slab = |slab: &SlabEntries| {
            let entries = slab.starts[block.sequences.start]..slab.starts[block.sequences.end];
            let groups = entries.len() as u64 * (g.page / chunk * g.num_kv_heads) as u64 * u64::from(params.tokens);
            let binds = vec![
                Bind::from(&self.pool.slabs[slab.slab].index),
                Bind::from(&slab.buffer),
                rows.clone(),
                Bind::from(&s.tables),
                Bind::from(&s.scores),
                Bind::from(&s.histogram),
            ];
            (Params { first_entry: entries.start, entries: entries.len() as u32, ..params }, groups, binds)
        };
        // Chunks of all heads and tokens, of which a workgroup takes `span` of one head and token.
        let per_place = (g.num_kv_heads as u64 * u64::from(params.tokens)).max(1);
        let spread = |params: Params, chunks: u64, span: u64| {
            let groups = (chunks / per_place).div_ceil(span) * per_place;
            (Params { max_count: span as u32, ..params }, groups)
        };
        for slab in self.entries() {
            let (params, chunks, binds) = of_slab(slab);
            let (params, groups) = spread(params, chunks, g.score_span(chunks, self.score_groups));
            passes.dispatch(self.key(Kernel::Score { chunk, coarse }), params, groups, binds)?;
        }
        let score_rows = block.load.rows * g.scores_per_row();
        // Short lists of one slab are scored again by the workgroup that searches them: a dispatch less.
        let fused = self.entries().len() == 1 && block.load.mean_keys(g) <= self.fused_keys;
        let binds = vec![rows.clone(), Bind::from(&s.tables), Bind::from(&s.scores), Bind::from(&s.histogram)];
        passes.dispatch(self.key(Kernel::Bounds { coarse }), params, score_rows, binds)?;
        for slab in self.entries() {
            let (params, chunks, mut binds) = of_slab(slab);
            binds.push(Bind::from(&s.candidates));
            let (params, groups) = spread(params, chunks, g.candidates_span(chunks, self.score_groups));
            passes.dispatch(self.key(Kernel::Candidates { chunk, coarse }), params, groups, binds)?;
            // Lists hold places in this slab's index, which only now are bound with it.
            if coarse && !fused {
                let binds = vec![
                    Bind::from(&self.pool.slabs[slab.slab].index),
                    rows.clone(),
                    Bind::from(&s.tables),
                    Bind::from(&s.scores),
                    Bind::from(&s.histogram),
                    Bind::from(&s.candidates),
                ];
                let groups = score_rows * RESCORE_SLICES as u64;
                passes.dispatch(self.key(Kernel::Rescore { slices: RESCORE_SLICES }), params, groups, binds)?;
            }
        }
        let mut binds = vec![rows.clone(), Bind::from(&s.scores), Bind::from(&s.histogram), Bind::from(&s.candidates)];
        if coarse && fused {
            binds.extend(self.entries().iter().map(|slab| Bind::from(&self.pool.slabs[slab.slab].index)));
            binds.push(Bind::from(&s.tables));
        }
        passes.dispatch(self.key(Kernel::Threshold { rescore: coarse && fused }), params, score_rows, binds)
    }

    #[allow(clippy::too_many_arguments, reason = "one call's inputs, all different")]
    fn attend_block(
        &self,
        passes: &mut Passes<'_>,
        params: Params,
        block: &Block,
        chunk: usize,
        span: u64,
        q_dtype: DType,
        q: &Input,
        rows: &Bind,
        partials: &wgpu::Buffer,
        selecting: Option<&Selecting>,
    ) -> Result<()> {
        let g = &self.geometry;
        let sparse = selecting.is_some();
        let heads = g.attend_heads(chunk, sparse);
        let kernel = Kernel::Attend { q: q_dtype, chunk, sparse };
        for slab in self.entries() {
            let entries = slab.starts[block.sequences.start]..slab.starts[block.sequences.end];
            let per_entry = g.page / chunk * g.num_kv_heads * g.group.div_ceil(heads);
            let groups = entries.len() as u64 * per_entry as u64 * u64::from(params.tokens);
            let units = (entries.len() * (g.page / chunk)) as u64;
            let groups = groups / units.max(1) * units.div_ceil(span);
            let (first_entry, entries) = (entries.start, entries.len() as u32);
            let params = Params { first_entry, entries, max_count: span as u32, ..params };
            let s = &self.pool.slabs[slab.slab];
            let mut binds = vec![
                q.bind.clone(),
                Bind::from(&s.k),
                Bind::from(&s.v),
                Bind::from(&slab.buffer),
                rows.clone(),
                Bind::from(partials),
            ];
            binds.extend(selecting.map(|s| Bind::from(&s.scores)));
            passes.dispatch(self.key(kernel), params, groups, binds)?;
        }
        Ok(())
    }

    fn prefill(
        &mut self,
        q: &TensorView<'_>,
        problem: &AttendProblem,
        o: &wgpu::Buffer,
        lse: &wgpu::Buffer,
    ) -> Result<Ready> {
        let op = problem.op;
        let g = self.geometry;
        let limit = self.ctx.caps().max_storage_binding;
        let part_bytes = (g.num_q_heads * g.part_stride() * 4) as u64;
        // Blocks of query tokens: their states fit the scratch buffer, and outputs start at aligned places.
        let block = ((limit / part_bytes) as usize).min(4096) / 64 * 64;
        if block == 0 {
            let what = "bytes of partial results";
            return Err(Error::Limit { op, what, value: 64 * part_bytes, limit });
        }
        let partials = self.scratch(op, Scratch::Partials, part_bytes * block.min(problem.tq) as u64)?;
        let mut passes = Passes::new(&self.ctx, op);
        for b in 0..problem.batch() {
            for first in (0..problem.tq).step_by(block) {
                let tokens = first..(first + block).min(problem.tq);
                let input = stage(&self.ctx, op, q, b..b + 1, tokens.clone())?;
                self.prefill_block(&mut passes, problem, b, tokens, q.dtype(), &input, &partials, o, lse)?;
            }
        }
        passes.ready()
    }

    #[allow(clippy::too_many_arguments, reason = "one call's inputs, all different")]
    fn prefill_block(
        &self,
        passes: &mut Passes<'_>,
        problem: &AttendProblem,
        b: usize,
        tokens: Range<usize>,
        q_dtype: DType,
        q: &Input,
        partials: &wgpu::Buffer,
        o: &wgpu::Buffer,
        lse: &wgpu::Buffer,
    ) -> Result<()> {
        let g = &self.geometry;
        let rows: Vec<Row> = (tokens.clone())
            .enumerate()
            .map(|(i, t)| {
                let visible = problem.rows[b * problem.tq + t].visible as u32;
                let part_count = u32::from(visible > 0);
                Row { visible, heavy: visible, part_base: (i * g.num_q_heads) as u32, part_count, ..Default::default() }
            })
            .collect();
        let reach = rows.last().map_or(0, |r| r.visible as usize);
        let rows_part = passes.part(&rows);
        let params = Params {
            batch: 1,
            tq: tokens.len() as u32,
            scale: problem.scale,
            input: Strides { batch: 0, ..q.strides },
            ..Default::default()
        };
        // One dispatch does about this many multiply-adds, well under a second on a slow GPU.
        const WORK: u64 = 1 << 35;
        let tiles = (tokens.len() * g.group).div_ceil(32);
        let per_page = (tokens.len() * g.num_q_heads * g.page * (g.head_dim + g.value_dim)) as u64;
        let pages = (WORK / per_page.max(1)).max(1) as u32;
        let mut resumed = 0;
        for slab in self.entries() {
            let entries = slab.starts[b]..slab.starts[b + 1];
            let s = &self.pool.slabs[slab.slab];
            let in_reach = |entry: u32| {
                // Entries of a sequence ascend, so pages past the last visible key are at the end.
                let mine = self.sequences[b].pages.iter().enumerate().filter(|(_, p)| slab_of(**p) == slab.slab);
                mine.map(|(logical, _)| logical)
                    .nth((entry - entries.start) as usize)
                    .is_some_and(|l| l * g.page < reach)
            };
            let mut first = entries.start;
            while first < entries.end && in_reach(first) {
                let count = pages.min(entries.end - first);
                let params = Params { entries: count, first_entry: first, items: resumed, ..params };
                let binds = vec![
                    q.bind.clone(),
                    Bind::from(&s.k),
                    Bind::from(&s.v),
                    Bind::from(&slab.buffer),
                    rows_part.clone(),
                    Bind::from(partials),
                ];
                let groups = (tiles * g.num_kv_heads) as u64;
                passes.dispatch(self.key(Kernel::Prefill { q: q_dtype }), params, groups, binds)?;
                resumed = 1;
                first += count;
            }
        }
        // Outputs are bound from a row that lies on an aligned place; `first_row` counts from there.
        let start = b * problem.tq + tokens.start;
        let aligned = start / 256 * 256;
        let shift = start - aligned;
        let bind_rows = |buffer: &wgpu::Buffer, bytes_per_row: usize| {
            let offset = (aligned * bytes_per_row) as u64;
            let size = ((shift + tokens.len()) * bytes_per_row) as u64;
            Bind::Range { buffer: buffer.clone(), offset, size: size.next_multiple_of(4).min(buffer.size() - offset) }
        };
        let params = Params { first_row: shift as u32, row_shift: (shift as u32).wrapping_neg(), ..params };
        let binds = vec![
            rows_part,
            Bind::from(partials),
            bind_rows(o, g.num_q_heads * g.value_dim * problem.output.size()),
            bind_rows(lse, g.num_q_heads * 4),
        ];
        let kernel = Kernel::MergePartials { output: problem.output, split: 1 };
        passes.dispatch(self.key(kernel), params, (tokens.len() * g.num_q_heads) as u64, binds)
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn profile_attend(&mut self, q: &TensorView<'_>, problem: &AttendProblem) -> Result<Vec<StageTime>> {
        let op = "profile";
        let (ready, _) = self.prepare(q, problem)?;
        let stages = ready.stages();
        let timer = Timer::new(&self.ctx, stages.len().max(1) as u32)?;
        let timer = timer.ok_or(Error::Unsupported { op, why: "this device has no timestamp queries".into() })?;
        let mut encoder = self.ctx.encoder(op);
        ready.record(&mut encoder, Some(&timer));
        timer.resolve(&mut encoder);
        self.ctx.submit(op, encoder)?;
        let times = timer.read_blocking()?;
        let timed = |(stage, time): (_, Option<f64>)| StageTime { stage, nanoseconds: time.unwrap_or(f64::NAN) };
        Ok(stages.into_iter().zip(times).map(timed).collect())
    }
}

/// Scratch buffers of the selection.
struct Selecting {
    tables: wgpu::Buffer,
    histogram: wgpu::Buffer,
    scores: wgpu::Buffer,
    candidates: wgpu::Buffer,
}

const _: () = assert!(BINS.is_multiple_of(256), "each invocation owns a whole number of bins");
