//! Sequences to and from their saved form: pages are gathered on the host.

use super::{CudaExecutor, pages};
use crate::error::Result;
use crate::socket::executor::SequenceData;
use crate::socket::image;
use crate::socket::problem::SeqState;

impl CudaExecutor {
    pub(super) fn export_sequence(&mut self, seq: usize, state: SeqState) -> Result<SequenceData> {
        let op = "save";
        let g = self.sizes.g;
        let [keys, values, _] = g.page_bytes().map(|bytes| bytes as usize);
        let mut data = image::empty(&g, state);
        for (logical, &page) in self.sequences[seq].pages.iter().enumerate() {
            let (slab, at) = pages::place(&self.pool, &g, page);
            let mut k = self.ctx.read_buffer_blocking(op, slab, at, pages::page_bytes(&g))?;
            let mut v = k.split_off(keys);
            let index = v.split_off(values);
            image::unpack(&g, &[k, v, index], logical, &mut data);
        }
        if g.center && state.indexed > 0 {
            let at = u64::from(self.sequences[seq].slot) * self.slot_bytes();
            let bytes = self.ctx.read_buffer_blocking(op, &self.state, at, (g.num_kv_heads * g.head_dim * 4) as u64)?;
            data.mean = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        }
        Ok(data)
    }

    pub(super) fn import_sequence(&mut self, seq: usize, data: &SequenceData) -> Result<()> {
        let op = "load";
        self.ctx.check_alive(op)?;
        let g = self.sizes.g;
        let needed = data.state.len.div_ceil(g.page);
        pages::grow(&mut self.pool, &self.ctx, op, &g, needed)?;
        let mut taken = Vec::with_capacity(needed);
        for _ in 0..needed {
            taken.push(self.pool.take(op)?);
        }
        let written = self.write_sequence(op, seq, data, &taken);
        if let Err(error) = written {
            taken.into_iter().for_each(|page| self.pool.release(page));
            return Err(error);
        }
        self.sequences[seq].pages = taken;
        self.table.changed();
        Ok(())
    }

    fn write_sequence(&self, op: &'static str, seq: usize, data: &SequenceData, taken: &[u32]) -> Result<()> {
        let g = self.sizes.g;
        for (logical, &page) in taken.iter().enumerate() {
            let (slab, at) = pages::place(&self.pool, &g, page);
            self.ctx.write(op, slab, at, &image::pack(&g, data, logical).concat())?;
        }
        let at = u64::from(self.sequences[seq].slot) * self.slot_bytes();
        self.ctx.write(op, &self.state, at, bytemuck::cast_slice(&image::slot(&g, data)))
    }
}
