//! Parameters of dispatches, in slots that are written once.

use super::caps::Caps;
use super::context::Context;
use crate::engine::lock;
use crate::error::Result;
use std::sync::Mutex;

/// Bytes of one buffer of slots.
const CAPACITY: u64 = 256 << 10;

/// Hands out slots of never-rewritten memory. All writes of a queue happen before the commands of its next
/// submission, so a slot written twice would show its last content to every dispatch; and a host may submit late.
/// A full buffer is replaced by a fresh one and lives on for as long as bind groups or slots refer to it.
#[derive(Debug)]
pub(crate) struct Arena {
    align: u64,
    current: Mutex<Current>,
}

#[derive(Debug, Default)]
struct Current {
    buffer: Option<wgpu::Buffer>,
    used: u64,
}

/// A piece of an arena's buffer.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub buffer: wgpu::Buffer,
    /// Bytes from the buffer's start; fits dynamic offsets of uniform and storage bindings.
    pub offset: u32,
    /// Bytes of the content, rounded up to a multiple of four.
    pub size: u64,
}

impl Arena {
    pub(super) fn new(caps: &Caps) -> Self {
        let align = u64::from(caps.uniform_align.max(caps.storage_align).max(4));
        Self { align, current: Mutex::default() }
    }

    /// Writes one slot for each of `parts`, all in one buffer and with one transfer.
    pub fn write_all(&self, ctx: &Context, op: &'static str, parts: &[&[u8]]) -> Result<Vec<Slot>> {
        let mut image = Vec::new();
        let mut places = Vec::with_capacity(parts.len());
        for part in parts {
            let start = (image.len() as u64).next_multiple_of(self.align);
            image.resize(start as usize, 0);
            image.extend_from_slice(part);
            let size = (part.len() as u64).next_multiple_of(4).max(4);
            image.resize((start + size) as usize, 0);
            places.push((start, size));
        }
        if image.is_empty() {
            return Ok(Vec::new());
        }
        let bytes = image.len() as u64;
        let mut current = lock(&self.current);
        let start = current.used.next_multiple_of(self.align);
        let fitting = current.buffer.clone().filter(|buffer| start + bytes <= buffer.size());
        let (buffer, start) = match fitting {
            Some(buffer) => (buffer, start),
            None => {
                let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
                let buffer = ctx.buffer(op, "parameters", bytes.max(CAPACITY), usage)?;
                current.buffer = Some(buffer.clone());
                current.used = 0;
                (buffer, 0)
            }
        };
        // Taken even where the write fails, so that no later write can meet it.
        current.used = start + bytes;
        drop(current);
        ctx.write(op, &buffer, start, &image)?;
        let slot = |(place, size): (u64, u64)| Slot {
            buffer: buffer.clone(),
            // A buffer of slots passes 4 GiB only if one call brings that much, which the largest buffer forbids.
            offset: (start + place) as u32,
            size,
        };
        Ok(places.into_iter().map(slot).collect())
    }
}
