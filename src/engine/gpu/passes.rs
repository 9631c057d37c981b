//! A list of dispatches that is made ready as a whole, then recorded: whatever can fail fails before anything is in
//! an encoder.

use super::arena::Slot;
use super::context::Context;
use super::pipeline::{KernelKey, Pipeline};
use super::timing::Timer;
use crate::engine::Recording;
use crate::error::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// A kernel that is timed under a name.
pub(crate) trait Stage: KernelKey {
    fn stage(&self) -> &'static str;
}

/// The uniform of a dispatch, which carries its folded grid.
pub(crate) trait GridParams: bytemuck::NoUninit {
    /// `groups` workgroups have work, in a grid `group_width` wide.
    fn with_grid(self, groups: u32, group_width: u32) -> Self;
}

/// What stands at a storage binding.
#[derive(Clone)]
pub(crate) enum Bind {
    Whole(wgpu::Buffer),
    Range {
        buffer: wgpu::Buffer,
        offset: u64,
        size: u64,
    },
    /// A part given to [`Passes::part`].
    Part(usize),
}

impl From<&wgpu::Buffer> for Bind {
    fn from(buffer: &wgpu::Buffer) -> Self {
        Self::Whole(buffer.clone())
    }
}

impl Bind {
    /// Some bytes of a buffer, which begin at an element of `size` bytes: as a binding, which may begin before them where
    /// the device wants it aligned, and the index of the first element in it.
    pub fn range(ctx: &Context, buffer: &wgpu::Buffer, bytes: Range<u64>, size: usize) -> (Self, u32) {
        let align = u64::from(ctx.caps().storage_align).max(8);
        let offset = bytes.start / align * align;
        let bind = Self::Range { buffer: buffer.clone(), offset, size: (bytes.end - offset).next_multiple_of(4) };
        (bind, ((bytes.start - offset) / size as u64) as u32)
    }
}

struct Dispatch {
    pipeline: Arc<Pipeline>,
    stage: &'static str,
    params: usize,
    params_size: u64,
    binds: Vec<Bind>,
    grid: (u32, u32),
}

struct Copy {
    from: (wgpu::Buffer, u64),
    to: (wgpu::Buffer, u64),
    bytes: u64,
}

/// A copy inside one buffer, which wgpu allows only by way of another.
struct CopyWithin {
    buffer: wgpu::Buffer,
    from: u64,
    to: u64,
    bytes: u64,
}

/// See the module.
pub(crate) struct Passes<'a> {
    ctx: &'a Arc<Context>,
    op: &'static str,
    parts: Vec<Vec<u8>>,
    copies: Vec<Copy>,
    copies_within: Vec<CopyWithin>,
    dispatches: Vec<Dispatch>,
}

/// Dispatches with their bind groups.
pub(crate) struct Ready {
    copies: Vec<Copy>,
    dispatches: Vec<(Dispatch, wgpu::BindGroup, u32)>,
}

impl<'a> Passes<'a> {
    pub fn new(ctx: &'a Arc<Context>, op: &'static str) -> Self {
        Self { ctx, op, parts: Vec::new(), copies: Vec::new(), copies_within: Vec::new(), dispatches: Vec::new() }
    }

    /// Small data that this list's dispatches read.
    pub fn part<T: bytemuck::NoUninit>(&mut self, data: &[T]) -> Bind {
        self.parts.push(bytemuck::cast_slice(data).to_vec());
        Bind::Part(self.parts.len() - 1)
    }

    /// A copy between buffers, before all dispatches.
    pub fn copy(&mut self, from: (&wgpu::Buffer, u64), to: (&wgpu::Buffer, u64), bytes: u64) {
        self.copies.push(Copy { from: (from.0.clone(), from.1), to: (to.0.clone(), to.1), bytes });
    }

    /// As [`Passes::copy`] inside one buffer.
    pub fn copy_within(&mut self, buffer: &wgpu::Buffer, from: u64, to: u64, bytes: u64) {
        self.copies_within.push(CopyWithin { buffer: buffer.clone(), from, to, bytes });
    }

    pub fn op(&self) -> &'static str {
        self.op
    }

    /// Adds a dispatch of `groups` workgroups; none where there is nothing to do.
    pub fn dispatch(&mut self, key: impl Stage, params: impl GridParams, groups: u64, binds: Vec<Bind>) -> Result<()> {
        if groups == 0 {
            return Ok(());
        }
        let what = "workgroups of one dispatch";
        let grid = fold(groups).filter(|_| groups <= u64::from(u32::MAX));
        let grid = grid.ok_or(Error::Limit { op: self.op, what, value: groups, limit: 32768 * 65535 })?;
        let params = params.with_grid(groups as u32, grid.0);
        let pipeline = self.ctx.pipeline(self.op, &key)?;
        self.parts.push(bytemuck::bytes_of(&params).to_vec());
        let (params, params_size) = (self.parts.len() - 1, size_of_val(&params) as u64);
        self.dispatches.push(Dispatch { pipeline, stage: key.stage(), params, params_size, binds, grid });
        Ok(())
    }

    /// Uploads the parts and makes the bind groups.
    pub fn ready(self) -> Result<Ready> {
        let parts: Vec<&[u8]> = self.parts.iter().map(Vec::as_slice).collect();
        let slots = self.ctx.arena().write_all(self.ctx, self.op, &parts)?;
        let mut dispatches = Vec::with_capacity(self.dispatches.len());
        for dispatch in self.dispatches {
            let params = &slots[dispatch.params];
            let uniform = range(&params.buffer, 0, dispatch.params_size);
            let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: uniform }];
            for (binding, bind) in (1..).zip(&dispatch.binds) {
                entries.push(wgpu::BindGroupEntry { binding, resource: resource(bind, &slots) });
            }
            let layout = &dispatch.pipeline.layout;
            let group = self.ctx.bind_group(self.op, dispatch.stage, layout, &entries)?;
            let offset = params.offset;
            dispatches.push((dispatch, group, offset));
        }
        let mut copies = self.copies;
        for copy in self.copies_within {
            let usage = wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
            let between = self.ctx.buffer(self.op, "page copy", copy.bytes, usage)?;
            let from = (copy.buffer.clone(), copy.from);
            copies.push(Copy { from, to: (between.clone(), 0), bytes: copy.bytes });
            copies.push(Copy { from: (between, 0), to: (copy.buffer, copy.to), bytes: copy.bytes });
        }
        Ok(Ready { copies, dispatches })
    }
}

fn range(buffer: &wgpu::Buffer, offset: u64, size: u64) -> wgpu::BindingResource<'_> {
    wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size: std::num::NonZeroU64::new(size) })
}

fn resource<'a>(bind: &'a Bind, slots: &'a [Slot]) -> wgpu::BindingResource<'a> {
    match bind {
        Bind::Whole(buffer) => buffer.as_entire_binding(),
        Bind::Range { buffer, offset, size } => range(buffer, *offset, *size),
        Bind::Part(i) => range(&slots[*i].buffer, u64::from(slots[*i].offset), slots[*i].size),
    }
}

impl Ready {
    /// Submits everything at once, or leaves it in the caller's encoder.
    pub fn run(&self, ctx: &Arc<Context>, op: &'static str, rec: Recording<'_>) -> Result<()> {
        match rec {
            Recording::Run if ctx.trace().run(ctx, op, self)? => Ok(()),
            Recording::Run => {
                let mut encoder = ctx.encoder(op);
                self.record(&mut encoder, None);
                ctx.submit(op, encoder)
            }
            Recording::Into(encoder) => {
                self.record(encoder, None);
                Ok(())
            }
        }
    }

    /// Stage names, one per dispatch.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn stages(&self) -> Vec<&'static str> {
        self.dispatches.iter().map(|(dispatch, ..)| dispatch.stage).collect()
    }

    /// Writes everything into `encoder`: one compute pass, or with a timer one per dispatch.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder, timer: Option<&Timer>) {
        for copy in &self.copies {
            encoder.copy_buffer_to_buffer(&copy.from.0, copy.from.1, &copy.to.0, copy.to.1, copy.bytes);
        }
        if self.dispatches.is_empty() {
            return;
        }
        let per_pass = if timer.is_some() { 1 } else { self.dispatches.len() };
        for (span, chunk) in self.dispatches.chunks(per_pass).enumerate() {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: Some("softhash"),
                timestamp_writes: timer.map(|t| t.pass(span as u32)),
            });
            for (dispatch, group, offset) in chunk {
                pass.set_pipeline(&dispatch.pipeline.pipeline);
                pass.set_bind_group(0, group, &[*offset]);
                pass.dispatch_workgroups(dispatch.grid.0, dispatch.grid.1, 1);
            }
        }
    }
}

/// A grid of at most 65,535 workgroups a side that holds `groups`.
pub(crate) fn fold(groups: u64) -> Option<(u32, u32)> {
    const SIDE: u64 = 32768;
    let x = groups.clamp(1, SIDE);
    let y = groups.div_ceil(SIDE).max(1);
    (y <= 65535).then_some((x as u32, y as u32))
}
