//! Attention: query hash, score, select, attend with its merge; or the last alone; or tiled for a prompt.

use super::CudaExecutor;
use super::kernels::Kernel;
use super::params::{Call, NEAR, Numbers, Row, Slot};
use super::plan::{BINS, CANDIDATES, MOST_ROWS};
use crate::engine::cuda::{Bind, Buffer, CudaTimer, Grid, Passes, Ready, Scratch, bytes_of, stage};
use crate::error::{Error, Result};
use crate::socket::executor::{Attended, Selection, StageTime};
use crate::socket::plan::score_stride;
use crate::socket::problem::{AttendProblem, Kind};
use crate::tensor::{DType, Tensor, TensorView};
use std::ops::Range;

/// Memory that calls of one cache share, grown as needed.
#[derive(Default)]
pub(super) struct Workspace {
    tables: Scratch,
    scores: Scratch,
    pub(super) histogram: Scratch,
    candidates: Scratch,
    cuts: Scratch,
    partials: Scratch,
    /// Zero between kernels.
    arrivals: Option<Buffer>,
}

impl Workspace {
    pub fn bytes(&self) -> u64 {
        let all = [&self.tables, &self.scores, &self.histogram, &self.candidates, &self.cuts, &self.partials];
        all.iter().map(|s| s.bytes()).sum::<u64>() + self.arrivals.as_ref().map_or(0, Buffer::size)
    }
}

/// What some rows need of the workspace.
#[derive(Clone, Copy, Debug, Default)]
struct Load {
    rows: u64,
    /// In units of 64.
    scores: u64,
    parts: u64,
}

impl Load {
    fn plus(self, other: Self) -> Self {
        Self { rows: self.rows + other.rows, scores: self.scores + other.scores, parts: self.parts + other.parts }
    }
}

/// Rows that go through the workspace together.
struct Block {
    rows: Range<usize>,
    load: Load,
    /// Keys of the longest row.
    visible: usize,
}

/// Tokens per block of each kernel.
#[derive(Clone, Copy)]
struct Spans {
    score: usize,
    select: usize,
    attend: usize,
}

impl CudaExecutor {
    /// Every kernel that calls with these dtypes may launch.
    pub(super) fn kernels(&self, q: DType, output: DType) -> Vec<Kernel> {
        let s = &self.sizes;
        let mut kernels = vec![Kernel::StoreKv, Kernel::HashStep, Kernel::HashQuery { q }, Kernel::Select];
        kernels.push(Kernel::Score { runs: false });
        if s.score_stages().is_some() {
            kernels.push(Kernel::Score { runs: true });
        }
        kernels.push(if s.hash_tiles_shared().is_some() { Kernel::HashTiles } else { Kernel::HashKeys });
        kernels.push(Kernel::Collect);
        kernels.extend([true, false].map(|sparse| self.attend_kernel(q, output, sparse)));
        if s.prefill_on_matrix_unit(q, output) {
            kernels.push(Kernel::Prefill { q, output });
        }
        if s.g.center {
            kernels.push(Kernel::MeanKeys);
        }
        kernels
    }

    fn attend_kernel(&self, q: DType, output: DType, sparse: bool) -> Kernel {
        if !sparse && self.sizes.bulk_fits(q) {
            Kernel::AttendBulk { q, output }
        } else if self.sizes.on_matrix_unit(q) {
            Kernel::Attend { q, output, sparse }
        } else {
            Kernel::AttendAny { q, output, sparse }
        }
    }

    fn output(&self, op: &'static str, dtype: DType, shape: Vec<usize>) -> Result<(Tensor, Buffer)> {
        let bytes = bytes_of(&shape).saturating_mul(dtype.size() as u64);
        let buffer = self.ctx.uninit(op, bytes)?;
        Ok((Tensor::cuda(dtype, shape, buffer.clone()), buffer))
    }

    /// Makes a call's launches ready.
    pub(super) fn prepare(&mut self, q: &TensorView<'_>, problem: &AttendProblem) -> Result<(Ready, Attended)> {
        let op = problem.op;
        let g = self.sizes.g;
        let ctx = self.ctx.clone();
        let shape = vec![problem.batch(), problem.tq, g.num_q_heads];
        let (lse, lse_buffer) = self.output(op, DType::F32, shape.clone())?;
        let (o, o_buffer) = self.output(op, problem.output, [shape, vec![g.value_dim]].concat())?;
        let selection = if problem.want_selection { Some(self.selection_buffers(problem)?) } else { None };
        let sparse =
            problem.kind == Kind::Sparse && (problem.want_selection || problem.rows.iter().any(|r| !r.is_dense()));
        let mut passes = Passes::new(&ctx, op);
        if !problem.rows.is_empty() {
            let input = stage(&ctx, op, "q", q, 0..problem.batch(), 0..problem.tq)?;
            ctx.pin_all(&self.pool.slabs);
            let lists: Vec<_> = self.sequences.iter().map(|s| s.pages.as_slice()).collect();
            let table = self.table.update(&mut passes, &ctx, &self.pool, &g, lists.into_iter())?;
            let numbers = Numbers {
                q: input.strides,
                tq: problem.tq as u32,
                scale: problem.scale,
                width: problem.selection_width(&self.spec.config) as u32,
                ..Default::default()
            };
            let mut call = self.call(numbers, table);
            call.bind(Slot::Q, input.bind);
            call.bind(Slot::O, &o_buffer);
            call.bind(Slot::Lse, &lse_buffer);
            if let Some((_, indices, values)) = &selection {
                call.bind(Slot::Indices, indices);
                call.bind(Slot::Values, values);
            }
            if problem.kind == Kind::Prefill && self.sizes.prefill_on_matrix_unit(q.dtype(), problem.output) {
                self.prefill(&mut passes, q.dtype(), problem, call)?;
            } else {
                self.decode(&mut passes, q.dtype(), problem, sparse, call)?;
            }
        }
        let selection = selection.map(|(selection, ..)| selection);
        Ok((passes.ready()?, Attended { o, lse, selection }))
    }

    fn selection_buffers(&self, problem: &AttendProblem) -> Result<(Selection, Buffer, Buffer)> {
        let heads = self.sizes.g.num_kv_heads * self.sizes.g.score_rows();
        let shape = vec![problem.batch(), problem.tq, heads, problem.selection_width(&self.spec.config)];
        let (indices, indices_buffer) = self.output(problem.op, DType::I32, shape.clone())?;
        let (scores, scores_buffer) = self.output(problem.op, DType::F32, shape)?;
        Ok((Selection { indices, scores }, indices_buffer, scores_buffer))
    }

    /// Bytes of the workspace that a load needs: tables, scores, histogram, candidates, cuts, partials.
    fn bytes(&self, load: Load, sparse: bool) -> [u64; 6] {
        let g = &self.sizes.g;
        let partials = load.parts * g.part_stride() as u64 * 4;
        if !sparse {
            return [0, 0, 0, 0, 0, partials];
        }
        let score_rows = load.rows * g.scores_per_row();
        [
            load.rows * g.tables_per_row() * self.sizes.table_row() as u64 * 4,
            load.scores * 128,
            score_rows * (BINS as u64 + 1) * 4,
            score_rows * CANDIDATES as u64 * 8,
            score_rows * 4,
            partials,
        ]
    }

    /// The rows of a call with their places in the workspace, and the blocks that they go through it in.
    fn blocks(&self, problem: &AttendProblem, sparse: bool, span: usize) -> (Vec<Row>, Vec<Block>) {
        let g = &self.sizes.g;
        let most_rows = (MOST_ROWS as u64 / g.scores_per_row()).clamp(1, MOST_ROWS as u64);
        let fits = |load: Load| {
            load.rows <= most_rows && self.bytes(load, sparse).iter().all(|&bytes| bytes <= self.scratch_limit)
        };
        let mut rows = Vec::with_capacity(problem.rows.len());
        let mut blocks: Vec<Block> = Vec::new();
        for (i, row) in problem.rows.iter().enumerate() {
            let sequence = i / problem.tq;
            let state = problem.seqs[sequence];
            let parts = row.visible.div_ceil(span);
            let own = Load {
                rows: 1,
                scores: if sparse { (score_stride(row.visible) / 64) as u64 * g.scores_per_row() } else { 0 },
                parts: (parts * g.num_q_heads) as u64,
            };
            if !blocks.last().is_some_and(|block| fits(block.load.plus(own))) {
                blocks.push(Block { rows: i..i, load: Load::default(), visible: 0 });
            }
            let Some(block) = blocks.last_mut() else { continue };
            rows.push(Row {
                visible: row.visible as u32,
                heavy: row.heavy.min(u32::MAX as usize) as u32,
                slot: self.sequences[sequence].slot,
                unindexed: u32::from(state.indexed < state.len),
                score_base: block.load.scores as u32,
                part_base: block.load.parts as u32,
                part_count: parts as u32,
                sequence: sequence as u32,
            });
            block.rows.end = i + 1;
            block.load = block.load.plus(own);
            block.visible = block.visible.max(row.visible);
        }
        (rows, blocks)
    }

    fn arrivals(&mut self, op: &'static str, count: u64) -> Result<Buffer> {
        match &self.workspace.arrivals {
            Some(buffer) if buffer.size() >= count * 4 => Ok(buffer.clone()),
            _ => {
                let buffer = self.ctx.buffer(op, (count * 4).next_power_of_two())?;
                self.workspace.arrivals = Some(buffer.clone());
                Ok(buffer)
            }
        }
    }

    fn decode(
        &mut self,
        passes: &mut Passes<'_>,
        q: DType,
        problem: &AttendProblem,
        sparse: bool,
        mut call: Call,
    ) -> Result<()> {
        let op = problem.op;
        let s = self.sizes;
        let g = s.g;
        let tokens: usize = problem.rows.iter().map(|r| r.visible).sum();
        let lens = problem.rows.iter().map(|r| r.visible);
        let kernel = self.attend_kernel(q, problem.output, sparse);
        let (together, stages) = s.bulk_blocks(q, tokens);
        let attend = match kernel {
            _ if sparse => s.sparse_span(lens),
            Kernel::AttendBulk { .. } => s.dense_span(lens, 64, together),
            _ => s.dense_span(lens, 16, 2),
        };
        let spans = Spans { score: s.score_span(tokens), select: s.select_span(tokens), attend };
        let (rows, blocks) = self.blocks(problem, sparse, spans.attend);
        let mut most = [0u64; 6];
        let mut most_rows = 0;
        for block in &blocks {
            let needed = self.bytes(block.load, sparse);
            most.iter_mut().zip(needed).for_each(|(most, needed)| *most = needed.max(*most));
            most_rows = most_rows.max(block.load.rows);
        }
        let ctx = self.ctx.clone();
        let w = &mut self.workspace;
        let scratch = [
            (Slot::Tables, &mut w.tables),
            (Slot::Scores, &mut w.scores),
            (Slot::Histogram, &mut w.histogram),
            (Slot::Candidates, &mut w.candidates),
            (Slot::Cuts, &mut w.cuts),
            (Slot::Partials, &mut w.partials),
        ];
        for ((slot, scratch), bytes) in scratch.into_iter().zip(most) {
            if bytes > 0 {
                call.bind(slot, &scratch.get(&ctx, op, bytes)?);
            }
        }
        let arrivals = self.arrivals(op, most_rows * g.scores_per_row().max(g.num_q_heads as u64))?;
        call.bind(Slot::Arrivals, &arrivals);
        if rows.len() <= NEAR {
            call.params.rows[..rows.len()].copy_from_slice(&rows);
        } else {
            let part = passes.part(&rows);
            call.bind(Slot::Rows, part);
        }
        let (heads, tiles) = s.head_tiles();
        debug_assert!(heads * tiles >= g.group, "every head has a tile");
        let mut first = true;
        for block in &blocks {
            call.params.numbers.first_row = block.rows.start as u32;
            let (rows, kv_heads) = (block.load.rows, g.num_kv_heads as u64);
            let score_rows = rows * g.scores_per_row();
            let over = |span: usize| block.visible.div_ceil(span).max(1) as u64;
            let mut launch = |kernel: Kernel, span: usize, blocks: [u64; 3], shared: usize| {
                call.params.numbers.span = span as u32;
                let grid = Grid::xyz(blocks, self.key(kernel).threads()).shared(shared as u32);
                // The first of the call waits for all before it.
                let grid = if std::mem::take(&mut first) { grid } else { grid.overlap() };
                passes.dispatch(self.key(kernel), call.params, grid, call.binds())
            };
            if sparse {
                launch(Kernel::HashQuery { q }, 0, [s.query_blocks() as u64, kv_heads, rows], 0)?;
                let runs = s.score_in_runs(spans.score);
                let copied = s.score_stages().filter(|_| runs).map_or(0, |(_, bytes)| bytes);
                let blocks = [over(spans.score), kv_heads, rows];
                launch(Kernel::Score { runs }, spans.score, blocks, s.score_shared() + copied)?;
                launch(Kernel::Select, spans.select, [over(spans.select), score_rows, 1], 0)?;
            }
            let span = spans.attend;
            let (blocks, shared) = match kernel {
                Kernel::Attend { .. } => (kv_heads * tiles as u64, s.attend_shared(sparse, span)),
                Kernel::AttendBulk { .. } => (kv_heads * tiles as u64, s.bulk_shared(stages)),
                _ => (g.num_q_heads as u64, 0),
            };
            launch(kernel, span, [over(span), blocks, rows], shared)?;
            if problem.want_selection && sparse {
                launch(Kernel::Collect, 0, [score_rows, 1, 1], 0)?;
            }
        }
        Ok(())
    }

    fn prefill(&self, passes: &mut Passes<'_>, q: DType, problem: &AttendProblem, mut call: Call) -> Result<()> {
        let s = &self.sizes;
        // Here a row is a sequence.
        let row = |(i, seq): (usize, &crate::socket::problem::SeqState)| Row {
            visible: seq.len as u32,
            sequence: i as u32,
            ..Default::default()
        };
        let all: Vec<Row> = problem.seqs.iter().enumerate().map(row).collect();
        if all.len() <= NEAR {
            call.params.rows[..all.len()].copy_from_slice(&all);
        } else {
            let part: Bind = passes.part(&all);
            call.bind(Slot::Rows, part);
        }
        let kernel = Kernel::Prefill { q, output: problem.output };
        for first in (0..all.len()).step_by(MOST_ROWS) {
            call.params.numbers.first_row = first as u32;
            let rows = (all.len() - first).min(MOST_ROWS) as u64;
            let tiles = (problem.tq * s.g.group).div_ceil(64) as u64;
            let grid = Grid::xyz([tiles, s.g.num_kv_heads as u64, rows], self.key(kernel).threads());
            let grid = grid.shared(s.prefill_shared(q, problem.output) as u32);
            passes.dispatch(self.key(kernel), call.params, grid, call.binds())?;
        }
        Ok(())
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn profile_attend(&mut self, q: &TensorView<'_>, problem: &AttendProblem) -> Result<Vec<StageTime>> {
        let op = "profile";
        let (ready, _) = self.prepare(q, problem)?;
        let stages = ready.stages();
        let timer = CudaTimer::new(&self.ctx, stages.len().max(1) as u32)?;
        let timer = timer.ok_or(Error::Unsupported { op, why: "the driver is too old to time with".into() })?;
        ready.submit(&self.ctx, op, Some(&timer))?;
        self.table.submitted(&self.ctx);
        let times = timer.read_blocking()?;
        let timed = |(stage, time): (_, Option<f64>)| StageTime { stage, nanoseconds: time.unwrap_or(f64::NAN) };
        Ok(stages.into_iter().zip(times).map(timed).collect())
    }
}
