//! Attention over the stored keys: which rows go which way, and how partial results come together.

use crate::engine::cpu::memory::zeros;
use crate::engine::cpu::simd::{Element, Level};
use crate::engine::cpu::softmax::Partial;
use crate::engine::cpu::{map, product};
use crate::error::Result;
use crate::socket::config::{SelectionScope, SocketConfig};
use crate::socket::cpu::append::Projection;
use crate::socket::cpu::laps::Laps;
use crate::socket::cpu::score::{Score, mean};
use crate::socket::cpu::select::{Scores, select};
use crate::socket::cpu::storage::{Geometry, Sequence};
use crate::socket::cpu::stream::{Rows, Stream};
use crate::socket::cpu::tables;
use crate::socket::cpu::tile::{self, Tile, TileOf};
use crate::socket::problem::{AttendProblem, Kind, QueryRow};
use std::marker::PhantomData;
use std::ops::Range;

/// Keys of one task where all keys are attended, and where keys are chosen.
const DENSE_KEYS: usize = 2048;
const CHOSEN_KEYS: usize = 1024;
/// Scores held at a time, f32: query tokens are taken in groups that fit.
const SCORES: usize = 16 << 20;
/// Query rows of a kv head from which tiles pay.
const TILED_ROWS: usize = 16;

/// Everything one call reads.
pub(crate) struct Call<'a> {
    pub config: &'a SocketConfig,
    pub g: &'a Geometry,
    pub projection: &'a Projection,
    pub seqs: &'a [Sequence],
    pub problem: &'a AttendProblem,
    /// `[batch * tq][kv head][group][dk]`.
    pub q: &'a [f32],
}

/// What a call makes, in f32.
pub(crate) struct Output {
    /// `[batch * tq][query head][value_dim]`.
    pub o: Vec<f32>,
    /// `[batch * tq][query head]`.
    pub lse: Vec<f32>,
    /// `[batch * tq][heads][width]` indices and scores.
    pub selection: Option<(Vec<i32>, Vec<f32>)>,
}

/// Keys chosen for one query row and one selecting head.
struct Chosen {
    keys: Vec<u32>,
    scores: Vec<f32>,
}

impl Call<'_> {
    /// `scratch` keeps its room from call to call.
    pub fn run<E: Element>(&self, scratch: &mut Vec<f32>, laps: &mut Laps) -> Result<Output> {
        let (g, problem) = (self.g, self.problem);
        let heads = g.kv_heads * g.group;
        let rows = problem.rows.len();
        let mut out = Output {
            o: zeros(problem.op, rows * heads * g.value_dim)?,
            lse: zeros(problem.op, rows * heads)?,
            selection: self.empty_selection()?,
        };
        let all_dense = problem.rows.iter().all(|r| r.is_dense());
        let tiled = problem.tq > 1 && problem.tq * g.group >= TILED_ROWS;
        if all_dense && (problem.kind == Kind::Prefill || tiled) && problem.tq > 1 {
            self.tiles::<E>(&mut out);
        } else {
            let dense: Vec<usize> = (0..rows).filter(|&r| problem.rows[r].is_dense()).collect();
            self.dense::<E>(&dense, &mut out);
        }
        if problem.rows.iter().any(|r| r.is_dense()) {
            laps.lap("attend");
        }
        let mut row = 0;
        while row < rows {
            let block = self.block(row);
            self.sparse::<E>(block.clone(), scratch, &mut out, laps)?;
            row = block.end;
        }
        Ok(out)
    }

    fn selecting_heads(&self) -> usize {
        match self.config.scope {
            SelectionScope::PerHead => self.g.kv_heads * self.g.group,
            SelectionScope::PerGroup => self.g.kv_heads,
        }
    }

    fn empty_selection(&self) -> Result<Option<(Vec<i32>, Vec<f32>)>> {
        let problem = self.problem;
        if !problem.want_selection {
            return Ok(None);
        }
        let len = problem.rows.len() * self.selecting_heads() * problem.selection_width(self.config);
        let mut indices = zeros(problem.op, len)?;
        indices.fill(-1);
        Ok(Some((indices, zeros(problem.op, len)?)))
    }

    fn sequence(&self, row: usize) -> &Sequence {
        &self.seqs[row / self.problem.tq]
    }

    /// Query rows of a kv head `[group][dk]`.
    fn q(&self, row: usize, kv_head: usize) -> &[f32] {
        let one = self.g.group * self.g.dk;
        &self.q[(row * self.g.kv_heads + kv_head) * one..][..one]
    }

    /// Writes the result of query heads from `first` on of a row.
    fn finish(&self, out: &mut Output, row: usize, first: usize, partial: &Partial) {
        let at = row * self.g.kv_heads * self.g.group + first;
        let dim = self.g.value_dim;
        partial.finish(dim, &mut out.o[at * dim..], &mut out.lse[at..]);
    }

    /// Runs the kernel for a few query heads `[head][dk]` over `count` keys.
    fn stream<'b, E: Element>(
        &self,
        q: &'b [f32],
        count: usize,
        rows: &'b dyn Fn(usize, usize, &mut Rows<'b, E>),
    ) -> Partial {
        let (dk, dv) = (self.g.dk, self.g.dv);
        let scale = self.problem.scale;
        Level::best().run(Stream { q, heads: q.len() / dk, dk, dv, scale, count, rows })
    }

    /// Rows that attend to all their keys, the keys split into ranges.
    fn dense<E: Element>(&self, rows: &[usize], out: &mut Output) {
        let g = self.g;
        let mut tasks = Vec::new();
        let mut work = 0;
        for &row in rows {
            let visible = self.problem.rows[row].visible;
            work += product([visible, g.kv_heads, g.group, g.dk + g.dv]);
            for kv_head in 0..g.kv_heads {
                for first in (0..visible).step_by(DENSE_KEYS) {
                    tasks.push((row, kv_head, first..(first + DENSE_KEYS).min(visible)));
                }
            }
        }
        let parts = map(tasks, work, |(row, kv_head, keys): (usize, usize, Range<usize>)| {
            let seq = self.sequence(row);
            let start = keys.start;
            // Ranges start at multiples of a block, and so do pages: a block never leaves its page.
            let part = self.stream::<E>(self.q(row, kv_head), keys.len(), &|first, n, rows| {
                let (page, at) = (&seq.pages[(start + first) / g.page_tokens], (start + first) % g.page_tokens);
                let (k, v) = (page.k::<E>(g, kv_head), page.v::<E>(g, kv_head));
                for i in 0..n {
                    rows.k[i] = &k[(at + i) * g.dk..][..g.dk];
                    rows.v[i] = &v[(at + i) * g.dv..][..g.dv];
                }
            });
            (row, kv_head, part)
        });
        // Rows that see no key have no task, and still get their −∞.
        for &row in rows.iter().filter(|&&r| self.problem.rows[r].visible == 0) {
            self.finish(out, row, 0, &Partial::empty(g.kv_heads * g.group, g.dv));
        }
        let first_head = |kv_head| kv_head * g.group;
        self.gather(out, parts.into_iter().map(|(row, kv_head, part)| ((row, first_head(kv_head)), part)));
    }

    /// Merges neighbouring parts of the same (row, first head), in order.
    fn gather(&self, out: &mut Output, parts: impl Iterator<Item = ((usize, usize), Partial)>) {
        let mut current: Option<((usize, usize), Partial)> = None;
        for (place, part) in parts {
            match &mut current {
                Some((p, whole)) if *p == place => whole.merge(&part),
                _ => {
                    if let Some(((row, head), whole)) = current.replace((place, part)) {
                        self.finish(out, row, head, &whole);
                    }
                }
            }
        }
        if let Some(((row, head), whole)) = current {
            self.finish(out, row, head, &whole);
        }
    }

    /// All rows attend to all their keys, and there are many.
    fn tiles<E: Element>(&self, out: &mut Output) {
        let (g, problem) = (self.g, self.problem);
        let tokens = (tile::ROWS / g.group).max(1);
        let mut tasks = Vec::new();
        for b in 0..problem.batch() {
            for kv_head in 0..g.kv_heads {
                for first in (0..problem.tq).step_by(tokens) {
                    tasks.push((b, kv_head, first..(first + tokens).min(problem.tq)));
                }
            }
        }
        let done = map(tasks, u64::MAX, |(b, kv_head, tokens): (usize, usize, Range<usize>)| {
            let (mut q, mut visible) = (Vec::new(), Vec::new());
            for row in tokens.start + b * problem.tq..tokens.end + b * problem.tq {
                q.extend_from_slice(self.q(row, kv_head));
                visible.extend(std::iter::repeat_n(problem.rows[row].visible, g.group));
            }
            let tile = Tile { g, seq: &self.seqs[b], kv_head, q: &q, visible: &visible, scale: problem.scale };
            let state = Level::best().run(TileOf::<E>(tile, PhantomData));
            let mut o = vec![0.0; visible.len() * g.value_dim];
            let mut lse = vec![0.0; visible.len()];
            state.finish(g.value_dim, &mut o, &mut lse);
            (b * problem.tq + tokens.start, kv_head, o, lse)
        });
        for (first, kv_head, o, lse) in done {
            let width = g.group * g.value_dim;
            for (t, (o, lse)) in o.chunks_exact(width).zip(lse.chunks_exact(g.group)).enumerate() {
                let at = ((first + t) * g.kv_heads + kv_head) * g.group;
                out.o[at * g.value_dim..][..width].copy_from_slice(o);
                out.lse[at..][..g.group].copy_from_slice(lse);
            }
        }
    }

    /// Rows from `first` on whose scores fit, at least one.
    fn block(&self, first: usize) -> Range<usize> {
        let mut held = 0;
        let mut end = first;
        while end < self.problem.rows.len() {
            held += self.score_len(end);
            if end > first && held > SCORES {
                break;
            }
            end += 1;
        }
        first..end
    }

    /// Whether keys are scored for a row: to choose among them, or because the caller asks for the scores.
    fn scored(&self, row: usize) -> bool {
        let QueryRow { visible, .. } = self.problem.rows[row];
        let indexed = self.problem.seqs[row / self.problem.tq].indexed;
        let wanted = !self.problem.rows[row].is_dense() || self.problem.want_selection;
        wanted && visible > 0 && indexed >= visible
    }

    fn score_len(&self, row: usize) -> usize {
        let pages = self.g.pages(self.problem.rows[row].visible);
        if self.scored(row) { pages * self.selecting_heads() * self.g.page_tokens } else { 0 }
    }

    /// Scores, selects and attends a block of rows; dense rows among them only report what they attended.
    fn sparse<E: Element>(
        &self,
        block: Range<usize>,
        scratch: &mut Vec<f32>,
        out: &mut Output,
        laps: &mut Laps,
    ) -> Result<()> {
        let problem = self.problem;
        if !problem.want_selection && block.clone().all(|r| problem.rows[r].is_dense()) {
            return Ok(());
        }
        let scored: Vec<usize> = block.clone().filter(|&r| self.scored(r)).collect();
        let scores = self.score(&scored, scratch, laps)?;
        let heads = self.selecting_heads();
        let mut start = vec![None; block.len()];
        let mut at = 0;
        for &row in &scored {
            start[row - block.start] = Some(at);
            at += self.score_len(row);
        }
        let mut tasks = Vec::new();
        let mut work = 0;
        for row in block.clone().filter(|&r| problem.want_selection || !problem.rows[r].is_dense()) {
            work += product([problem.rows[row].visible, heads]);
            tasks.extend((0..heads).map(|head| (row, head, start[row - block.start].map(|s| &scores[s..]))));
        }
        let chosen = map(tasks, work, |(row, head, scores)| (row, head, self.choose(row, head, scores)));
        laps.lap("select");
        self.attend_chosen::<E>(&chosen, out);
        laps.lap("attend");
        self.report(&chosen, out);
        Ok(())
    }

    /// Scores of the rows, one after the other, `[page][kv head][selecting head of it][page token]`.
    fn score<'b>(&self, rows: &[usize], scratch: &'b mut Vec<f32>, laps: &mut Laps) -> Result<&'b [f32]> {
        let (g, problem) = (self.g, self.problem);
        let layout = self.config.layout();
        let per_head = self.selecting_heads() / g.kv_heads;
        let sign = self.config.scoring == crate::Scoring::SignProjection;
        let queries: Vec<_> = rows.iter().flat_map(|&row| (0..g.kv_heads).map(move |h| (row, h))).collect();
        let work = product([queries.len(), g.group, g.head_dim, self.projection.columns]);
        // Look-up tables and q·μ of each row and kv head.
        let queries = map(queries, work, |(row, kv_head)| {
            let mut q = self.q(row, kv_head).to_vec();
            if self.config.normalize_query {
                q.chunks_exact_mut(g.dk).for_each(tables::normalize);
            }
            let mean = self.sequence(row).mean.as_ref().filter(|_| sign).map(|m| &m[kv_head * g.dk..][..g.dk]);
            let dot = |q: &[f32]| mean.map_or(0.0, |m| q.iter().zip(m).map(|(q, m)| q * m).sum());
            let shifts: Vec<f32> = q.chunks_exact(g.dk).map(dot).collect();
            (tables::build(self.config, self.projection, kv_head, &q), shifts)
        });
        laps.lap("hash query");
        let total = rows.iter().map(|&r| self.score_len(r)).sum();
        if scratch.len() < total {
            *scratch = zeros(problem.op, total)?;
        }
        let mut tasks = Vec::new();
        let mut rest = &mut scratch[..total];
        for (i, &row) in rows.iter().enumerate() {
            let (these, after) = std::mem::take(&mut rest).split_at_mut(self.score_len(row));
            rest = after;
            for (n, out) in these.chunks_exact_mut(per_head * g.page_tokens).enumerate() {
                let (page, kv_head) = (n / g.kv_heads, n % g.kv_heads);
                tasks.push((row, page, kv_head, &queries[i * g.kv_heads + kv_head], out));
            }
        }
        let digits = layout.entries() / crate::lsh::BitLayout::DIGIT;
        let work = product([tasks.len(), g.page_tokens, g.group, digits]);
        map(tasks, work, |(row, page, kv_head, (tables, shifts), out)| {
            let keys = g.within(page, &(0..problem.rows[row].visible)).end;
            let data = &self.sequence(row).pages[page];
            let mut group = if per_head == g.group { Vec::new() } else { vec![0.0; g.group * g.page_tokens] };
            let target: &mut [f32] = if group.is_empty() { &mut *out } else { &mut group };
            Level::best().run(Score {
                layout,
                multiplies: self.config.scoring.multiplies(),
                bits: data.bits(g, kv_head),
                stride: g.page_tokens,
                keys,
                gain: data.gain(g, kv_head),
                bias: data.bias(g, kv_head),
                tables,
                shifts,
                scale: if sign { problem.scale } else { 1.0 },
                out: target,
            });
            if !group.is_empty() {
                mean(&group, g.page_tokens, keys, out);
            }
        });
        laps.lap("score");
        Ok(&scratch[..total])
    }

    fn choose(&self, row: usize, head: usize, scores: Option<&[f32]>) -> Chosen {
        let (g, config) = (self.g, self.config);
        let QueryRow { visible, heavy } = self.problem.rows[row];
        let page_tokens = g.page_tokens;
        let one_page = self.selecting_heads() * page_tokens;
        let pages = |s| -> Vec<&[f32]> {
            let s: &[f32] = s;
            s.chunks_exact(one_page).take(g.pages(visible)).map(|p| &p[head * page_tokens..][..page_tokens]).collect()
        };
        let view = scores.map(|s| Scores { pages: pages(s), page_tokens });
        let keys = match &view {
            Some(view) if !self.problem.rows[row].is_dense() => {
                select(view, config.rule, [config.sink, config.window, heavy], visible)
            }
            _ => (0..visible).map(|i| i as u32).collect(),
        };
        let scores = match &view {
            Some(view) if self.problem.want_selection => keys.iter().map(|&i| view.get(i as usize)).collect(),
            _ => Vec::new(),
        };
        Chosen { keys, scores }
    }

    /// Attention over chosen keys, in parts.
    fn attend_chosen<E: Element>(&self, chosen: &[(usize, usize, Chosen)], out: &mut Output) {
        let g = self.g;
        // Query heads that share a choice.
        let sharing = g.kv_heads * g.group / self.selecting_heads();
        let mut tasks = Vec::new();
        let mut work = 0;
        for (row, head, chosen) in chosen.iter().filter(|(row, ..)| !self.problem.rows[*row].is_dense()) {
            work += product([chosen.keys.len(), sharing, g.dk + g.dv]);
            tasks.extend(chosen.keys.chunks(CHOSEN_KEYS).map(|keys| (*row, head * sharing, keys)));
        }
        let parts = map(tasks, work, |(row, first, keys): (usize, usize, &[u32])| {
            let kv_head = first / g.group;
            let seq = self.sequence(row);
            let pages = seq.pages[..=keys.last().map_or(0, |k| *k as usize) / g.page_tokens].iter();
            let pages: Vec<_> = pages.map(|p| (p.k::<E>(g, kv_head), p.v::<E>(g, kv_head))).collect();
            let q = &self.q(row, kv_head)[first % g.group * g.dk..][..sharing * g.dk];
            let part = self.stream::<E>(q, keys.len(), &|first, n, rows| {
                for (i, key) in keys[first..first + n].iter().enumerate() {
                    let (k, v) = pages[*key as usize / g.page_tokens];
                    let at = *key as usize % g.page_tokens;
                    rows.k[i] = &k[at * g.dk..][..g.dk];
                    rows.v[i] = &v[at * g.dv..][..g.dv];
                }
            });
            ((row, first), part)
        });
        self.gather(out, parts.into_iter());
    }

    fn report(&self, chosen: &[(usize, usize, Chosen)], out: &mut Output) {
        let Some((indices, scores)) = &mut out.selection else { return };
        let width = self.problem.selection_width(self.config);
        for (row, head, chosen) in chosen {
            let at = (row * self.selecting_heads() + head) * width;
            for (slot, key) in indices[at..][..width].iter_mut().zip(&chosen.keys) {
                *slot = *key as i32;
            }
            scores[at..][..chosen.scores.len()].copy_from_slice(&chosen.scores);
        }
    }
}
