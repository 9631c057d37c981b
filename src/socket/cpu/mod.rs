//! The CPU executor: pages of host memory, SIMD kernels, work shared over sequence, head and range of keys.

mod append;
mod attend;
mod laps;
mod score;
mod select;
mod storage;
mod stream;
mod tables;
mod tile;

use crate::engine::Recording;
use crate::engine::cpu::simd::Element;
use crate::error::{Error, Result};
use crate::lsh::Planes;
#[cfg(not(target_arch = "wasm32"))]
use crate::socket::executor::StageTime;
use crate::socket::executor::{Attended, Executor, Memory, Selection, SequenceData};
use crate::socket::problem::{AppendRow, AttendProblem, CacheSpec, SeqState};
use crate::tensor::convert::{encode, on_gpu, padded_rows};
use crate::tensor::{DType, Storage, Tensor, TensorView};
use append::{Projection, Source};
use attend::Call;
use half::{bf16, f16};
use laps::Laps;
use std::sync::Arc;
use storage::{Geometry, Sequence};

/// The CPU executor, for whichever element type the cache keeps.
pub(crate) struct CpuExecutor(Box<dyn Executor>);

impl CpuExecutor {
    pub fn new(spec: &CacheSpec) -> Result<Self> {
        Ok(Self(match spec.shape.dtype {
            DType::F32 => Box::new(Cpu::<f32>::new(spec)?),
            DType::F16 => Box::new(Cpu::<f16>::new(spec)?),
            DType::Bf16 => Box::new(Cpu::<bf16>::new(spec)?),
            DType::I32 => return Err(Error::config("dtype", "I32", "must be F32, F16 or Bf16")),
        }))
    }
}

impl Executor for CpuExecutor {
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.0.reserve(tokens)
    }
    fn append(&mut self, rec: Recording<'_>, k: &TensorView<'_>, v: &TensorView<'_>, rows: &[AppendRow]) -> Result<()> {
        self.0.append(rec, k, v, rows)
    }
    fn attend(&mut self, rec: Recording<'_>, q: &TensorView<'_>, problem: &AttendProblem) -> Result<Attended> {
        self.0.attend(rec, q, problem)
    }
    #[cfg(not(target_arch = "wasm32"))]
    fn profile(&mut self, q: &TensorView<'_>, problem: &AttendProblem) -> Result<Vec<StageTime>> {
        self.0.profile(q, problem)
    }
    fn truncate(&mut self, seq: usize, state: SeqState) -> Result<()> {
        self.0.truncate(seq, state)
    }
    fn fork(&mut self, seq: Option<usize>, state: SeqState) -> Result<()> {
        self.0.fork(seq, state)
    }
    fn remove(&mut self, seq: usize) -> Result<()> {
        self.0.remove(seq)
    }
    fn memory(&self) -> Memory {
        self.0.memory()
    }
    fn non_finite_seen(&mut self) -> Result<u64> {
        self.0.non_finite_seen()
    }
    fn export(&mut self, seq: usize, state: SeqState) -> Result<SequenceData> {
        self.0.export(seq, state)
    }
    fn import(&mut self, seq: usize, data: &SequenceData) -> Result<()> {
        self.0.import(seq, data)
    }
}

/// Element types of a cache, and how a view of them is read.
trait Stored: Element {
    fn slice<'a>(view: &TensorView<'a>) -> Option<&'a [Self]>;
}

macro_rules! stored {
    ($type: ty, $variant: ident) => {
        impl Stored for $type {
            fn slice<'a>(view: &TensorView<'a>) -> Option<&'a [Self]> {
                match view.storage() {
                    Storage::$variant(data) => Some(data),
                    _ => None,
                }
            }
        }
    };
}

stored!(f32, F32);
stored!(f16, F16);
stored!(bf16, Bf16);

fn source<'a, E: Stored>(op: &'static str, tensor: &'static str, view: &TensorView<'a>) -> Result<Source<'a, E>> {
    let data = E::slice(view).ok_or_else(|| on_gpu(op, tensor))?;
    Ok(Source { data, strides: view.strides(), dim: view.shape()[3] })
}

struct Cpu<E> {
    spec: CacheSpec,
    g: Geometry,
    projection: Projection,
    seqs: Vec<Sequence>,
    /// Tokens that each sequence has been promised room for.
    reserved: usize,
    /// Scores of the last call, whose room the next one takes.
    scratch: Vec<f32>,
    laps: Laps,
    element: std::marker::PhantomData<E>,
}

impl<E: Stored> Cpu<E> {
    fn new(spec: &CacheSpec) -> Result<Self> {
        let shape = spec.shape;
        let layout = spec.config.layout();
        let planes = Planes::new(&spec.config.hyperplanes, layout.bits(), shape.head_dim, shape.num_kv_heads)?;
        Ok(Self {
            spec: spec.clone(),
            g: Geometry::new(spec),
            projection: Projection::new(&planes, layout),
            seqs: Vec::new(),
            reserved: 0,
            scratch: Vec::new(),
            laps: Laps::default(),
            element: std::marker::PhantomData,
        })
    }

    fn sequence(&mut self, op: &'static str, index: usize) -> Result<&mut Sequence> {
        let count = self.seqs.len();
        self.seqs.get_mut(index).ok_or(Error::NoSuchSequence { op, index, count })
    }
}

impl<E: Stored> Executor for Cpu<E> {
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        let held = |seq: &Sequence| seq.pages.len() * self.g.page_tokens;
        let growths: Vec<_> = self
            .seqs
            .iter()
            .map(|seq| seq.grow::<E>("reserve", &self.g, held(seq), held(seq)..tokens))
            .collect::<Result<_>>()?;
        self.seqs.iter_mut().zip(growths).for_each(|(seq, growth)| seq.apply(growth));
        self.reserved = self.reserved.max(tokens);
        Ok(())
    }

    fn append(&mut self, _: Recording<'_>, k: &TensorView<'_>, v: &TensorView<'_>, rows: &[AppendRow]) -> Result<()> {
        let op = "append";
        let (k, v) = (source::<E>(op, "k", k)?, source::<E>(op, "v", v)?);
        let mut growths = Vec::with_capacity(rows.len());
        for row in rows {
            // Hashing may reach back to tokens whose mean was awaited.
            let first = if row.hash.is_empty() { row.start } else { row.start.min(row.hash.start) };
            let range = first..row.start + row.count;
            let g = self.g;
            growths.push((row.seq, self.sequence(op, row.seq)?.grow::<E>(op, &g, row.start, range)?));
        }
        for (seq, growth) in growths {
            self.seqs[seq].apply(growth);
        }
        append::store(&self.g, &mut self.seqs, rows, k, v);
        for row in rows {
            if let Some(count) = row.freeze_mean {
                self.seqs[row.seq].mean = Some(append::mean::<E>(&self.g, &self.seqs[row.seq], count));
            }
        }
        append::hash::<E>(&self.spec.config, &self.g, &self.projection, &mut self.seqs, rows);
        Ok(())
    }

    fn attend(&mut self, _: Recording<'_>, q: &TensorView<'_>, problem: &AttendProblem) -> Result<Attended> {
        let q = padded_rows(problem.op, "q", q, self.g.dk)?;
        let call = Call {
            config: &self.spec.config,
            g: &self.g,
            projection: &self.projection,
            seqs: &self.seqs,
            problem,
            q: &q,
        };
        let out = call.run::<E>(&mut self.scratch, &mut self.laps)?;
        let (batch, tq, heads) = (problem.batch(), problem.tq, self.spec.shape.num_q_heads);
        let shape = vec![batch, tq, heads];
        let selection = out.selection.map(|(indices, scores)| {
            let width = problem.selection_width(&self.spec.config);
            let heads = indices.len().checked_div(batch * tq * width).unwrap_or(heads);
            let shape = vec![batch, tq, heads, width];
            let bytes = indices.iter().flat_map(|x| x.to_le_bytes()).collect();
            Selection {
                indices: Tensor::host(DType::I32, shape.clone(), bytes),
                scores: Tensor::host(DType::F32, shape, encode(DType::F32, &scores)),
            }
        });
        let o_shape = vec![batch, tq, heads, self.spec.shape.value_dim];
        Ok(Attended {
            o: Tensor::host(problem.output, o_shape, encode(problem.output, &out.o)),
            lse: Tensor::host(DType::F32, shape, encode(DType::F32, &out.lse)),
            selection,
        })
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn profile(&mut self, q: &TensorView<'_>, problem: &AttendProblem) -> Result<Vec<StageTime>> {
        self.laps.start();
        let attended = self.attend(Recording::Run, q, problem);
        let stages = self.laps.stop();
        attended.map(|_| stages)
    }

    fn truncate(&mut self, seq: usize, state: SeqState) -> Result<()> {
        let keep = self.g.pages(state.len.max(self.reserved));
        let sequence = self.sequence("truncate", seq)?;
        sequence.pages.truncate(keep);
        if state.indexed == 0 {
            sequence.mean = None;
        }
        Ok(())
    }

    fn fork(&mut self, seq: Option<usize>, state: SeqState) -> Result<()> {
        let pages = self.g.pages(state.len);
        let forked = match seq {
            Some(seq) => {
                let from = self.sequence("fork", seq)?;
                Sequence { pages: from.pages[..pages.min(from.pages.len())].to_vec(), mean: from.mean.clone() }
            }
            None => Sequence::default(),
        };
        self.seqs.push(forked);
        Ok(())
    }

    fn remove(&mut self, seq: usize) -> Result<()> {
        self.sequence("remove", seq)?;
        self.seqs.remove(seq);
        Ok(())
    }

    fn memory(&self) -> Memory {
        let mut seen = std::collections::HashSet::new();
        let mut memory =
            Memory { workspace: self.projection.bytes() + self.scratch.len() as u64 * 4, ..Memory::default() };
        for seq in &self.seqs {
            memory.workspace += seq.mean.as_ref().map_or(0, |m| m.len() as u64 * 4);
            for page in seq.pages.iter().filter(|p| seen.insert(Arc::as_ptr(p))) {
                memory.keys += page.k.len() as u64;
                memory.values += page.v.len() as u64;
                memory.bits += page.bits.len() as u64;
                memory.scalars += (page.gain.len() + page.bias.len()) as u64;
            }
        }
        memory
    }

    fn non_finite_seen(&mut self) -> Result<u64> {
        // Device buffers, whose elements nobody has checked, never get here.
        Ok(0)
    }

    fn export(&mut self, seq: usize, state: SeqState) -> Result<SequenceData> {
        let g = self.g;
        let sequence = self.sequence("save", seq)?;
        let mut data = SequenceData { state, ..SequenceData::default() };
        for token in 0..state.len {
            let page = &sequence.pages[token / g.page_tokens];
            let t = token % g.page_tokens;
            for head in 0..g.kv_heads {
                let k = &page.k::<E>(&g, head)[t * g.dk..][..g.head_dim];
                let v = &page.v::<E>(&g, head)[t * g.dv..][..g.value_dim];
                data.k.extend_from_slice(bytemuck::cast_slice(k));
                data.v.extend_from_slice(bytemuck::cast_slice(v));
                if token < state.indexed {
                    data.bits.extend(page.bits(&g, head).iter().skip(t).step_by(g.page_tokens));
                    data.gain.extend(page.gain(&g, head).map(|x| x[t]));
                    data.bias.extend(page.bias(&g, head).map(|x| x[t]));
                }
            }
        }
        if let Some(mean) = &sequence.mean {
            data.mean = mean.chunks(g.dk).flat_map(|m| &m[..g.head_dim]).copied().collect();
        }
        Ok(data)
    }

    fn import(&mut self, seq: usize, data: &SequenceData) -> Result<()> {
        let g = self.g;
        let op = "load";
        let SeqState { len, indexed } = data.state;
        let wrong =
            |what: &str| Error::File { op, reason: format!("{what} do not fit {len} tokens, {indexed} hashed") };
        let fits = |what: &str, got: usize, expected: usize| if got == expected { Ok(()) } else { Err(wrong(what)) };
        let rows = indexed * g.kv_heads;
        fits("keys", data.k.len(), len * g.kv_heads * g.head_dim * size_of::<E>())?;
        fits("values", data.v.len(), len * g.kv_heads * g.value_dim * size_of::<E>())?;
        fits("hashed tokens", indexed.min(len), indexed)?;
        fits("bits", data.bits.len(), rows * g.words)?;
        fits("gains", data.gain.len(), if g.gain { rows } else { 0 })?;
        fits("biases", data.bias.len(), if g.bias { rows } else { 0 })?;
        let centred = self.spec.config.center.is_some() && indexed > 0;
        fits("means", data.mean.len(), if centred { g.kv_heads * g.head_dim } else { 0 })?;
        let sequence = self.sequence(op, seq)?;
        let growth = sequence.grow::<E>(op, &g, 0, 0..len)?;
        sequence.apply(growth);
        let size = size_of::<E>();
        for token in 0..len {
            let page = Arc::make_mut(&mut sequence.pages[token / g.page_tokens]);
            let t = token % g.page_tokens;
            for head in 0..g.kv_heads {
                let (row, slot) = (token * g.kv_heads + head, head * g.page_tokens + t);
                let bytes = g.head_dim * size;
                page.k.slice_mut::<u8>()[slot * g.dk * size..][..bytes]
                    .copy_from_slice(&data.k[row * bytes..][..bytes]);
                let bytes = g.value_dim * size;
                page.v.slice_mut::<u8>()[slot * g.dv * size..][..bytes]
                    .copy_from_slice(&data.v[row * bytes..][..bytes]);
                if token < indexed {
                    for (word, x) in data.bits[row * g.words..][..g.words].iter().enumerate() {
                        page.bits.slice_mut()[(head * g.words + word) * g.page_tokens + t] = *x;
                    }
                    if g.gain {
                        page.gain.slice_mut()[slot] = data.gain[row];
                    }
                    if g.bias {
                        page.bias.slice_mut()[slot] = data.bias[row];
                    }
                }
            }
        }
        if centred {
            let pad =
                |m: &[f32]| m.iter().copied().chain(std::iter::repeat_n(0.0, g.dk - g.head_dim)).collect::<Vec<_>>();
            sequence.mean = Some(data.mean.chunks(g.head_dim).flat_map(pad).collect());
        }
        Ok(())
    }
}
