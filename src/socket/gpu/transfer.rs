//! Sequences to and from their saved form: pages are gathered on the host.

use super::{GpuExecutor, pages};
use crate::error::Result;
use crate::socket::executor::SequenceData;
use crate::socket::image;
use crate::socket::pages::{local_of, slab_of};
use crate::socket::problem::SeqState;

impl GpuExecutor {
    #[cfg(target_arch = "wasm32")]
    pub(super) fn export_sequence(&mut self, _: usize, _: SeqState) -> Result<SequenceData> {
        Err(crate::Error::Unsupported { op: "save", why: "browsers cannot wait for the GPU".into() })
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn export_sequence(&mut self, seq: usize, state: SeqState) -> Result<SequenceData> {
        let op = "save";
        let g = self.geometry;
        let mut data = image::empty(&g, state);
        for (logical, &page) in self.sequences[seq].pages.iter().enumerate() {
            let slab = &self.pool.slabs[slab_of(page)];
            let mut parts = [Vec::new(), Vec::new(), Vec::new()];
            for (part, (buffer, bytes)) in parts.iter_mut().zip(slab.parts(&g)) {
                let at = u64::from(local_of(page)) * bytes;
                *part = self.ctx.read_buffer_blocking(op, buffer, at, bytes)?;
            }
            image::unpack(&g, &parts, logical, &mut data);
        }
        if g.center && state.indexed > 0 {
            let at = u64::from(self.sequences[seq].slot) * self.slot_bytes();
            let bytes = (g.num_kv_heads * g.head_dim * 4) as u64;
            let bytes = self.ctx.read_buffer_blocking(op, &self.state, at, bytes)?;
            data.mean = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        }
        Ok(data)
    }

    pub(super) fn import_sequence(&mut self, seq: usize, data: &SequenceData) -> Result<()> {
        let op = "load";
        self.ctx.check_alive(op)?;
        let g = self.geometry;
        let needed = data.state.len.div_ceil(g.page);
        pages::grow(&mut self.pool, &self.ctx, op, &g, needed)?;
        let mut taken = Vec::with_capacity(needed);
        for _ in 0..needed {
            taken.push(self.pool.take(op)?);
        }
        for (logical, &page) in taken.iter().enumerate() {
            let slab = &self.pool.slabs[slab_of(page)];
            for ((buffer, bytes), image) in slab.parts(&g).into_iter().zip(image::pack(&g, data, logical)) {
                self.ctx.write(op, buffer, u64::from(local_of(page)) * bytes, &image)?;
            }
        }
        let at = u64::from(self.sequences[seq].slot) * self.slot_bytes();
        self.ctx.write(op, &self.state, at, bytemuck::cast_slice(&image::slot(&g, data)))?;
        self.sequences[seq].pages = taken;
        self.workspace.pages_changed();
        Ok(())
    }
}
