//! Sequences to and from their saved form: pages are gathered on the host.

use super::GpuExecutor;
use super::pages::{local_of, slab_of};
use crate::error::Result;
use crate::socket::executor::SequenceData;
use crate::socket::problem::SeqState;

impl GpuExecutor {
    /// Rows of `row_bytes` out of `padded` bytes each, `[kv head, token]` in a page, `[token, kv head]` saved.
    fn rows(&self, page_rows: &mut [u8], saved: &mut [u8], padded: usize, row_bytes: usize, into_page: bool) {
        let (heads, page) = (self.geometry.num_kv_heads, self.geometry.page);
        for (i, row) in saved.chunks_exact_mut(row_bytes).enumerate() {
            let (token, head) = (i / heads, i % heads);
            let at = (head * page + token) * padded;
            let stored = &mut page_rows[at..at + row_bytes];
            if into_page {
                stored.copy_from_slice(row);
            } else {
                row.copy_from_slice(stored);
            }
        }
    }

    #[cfg(target_arch = "wasm32")]
    pub(super) fn export_sequence(&mut self, _: usize, _: SeqState) -> Result<SequenceData> {
        Err(crate::Error::Unsupported { op: "save", why: "browsers cannot wait for the GPU".into() })
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn export_sequence(&mut self, seq: usize, state: SeqState) -> Result<SequenceData> {
        let op = "save";
        let g = self.geometry;
        let size = g.dtype.size();
        let (k_row, v_row) = (g.head_dim * size, g.value_dim * size);
        let heads = g.num_kv_heads;
        let mut data = SequenceData { state, ..Default::default() };
        data.k.resize(state.len * heads * k_row, 0);
        data.v.resize(state.len * heads * v_row, 0);
        data.bits.resize(state.indexed * heads * g.words, 0);
        data.gain.resize(if g.gain { state.indexed * heads } else { 0 }, 0.0);
        data.bias.resize(if g.bias { state.indexed * heads } else { 0 }, 0.0);
        for (logical, &page) in self.sequences[seq].pages.iter().enumerate() {
            let first = logical * g.page;
            let tokens = first..state.len.min(first + g.page);
            let slab = &self.pool.slabs[slab_of(page)];
            let mut parts = Vec::new();
            for (buffer, bytes) in slab.parts(&g) {
                let at = u64::from(local_of(page)) * bytes;
                parts.push(self.ctx.read_buffer_blocking(op, buffer, at, bytes)?);
            }
            let range = |row: usize| tokens.start * heads * row..tokens.end * heads * row;
            self.rows(&mut parts[0], &mut data.k[range(k_row)], g.k_pieces() * 16, k_row, false);
            self.rows(&mut parts[1], &mut data.v[range(v_row)], g.v_pieces() * 16, v_row, false);
            let index: Vec<u32> =
                parts[2].chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            for token in tokens.start..tokens.end.min(state.indexed).max(tokens.start) {
                for head in 0..heads {
                    let word = |w: usize| index[(head * g.index_words() + w) * g.page + token - first];
                    let at = token * heads + head;
                    for w in 0..g.words {
                        data.bits[at * g.words + w] = word(w);
                    }
                    if g.gain {
                        data.gain[at] = f32::from_bits(word(g.words));
                    }
                    if g.bias {
                        data.bias[at] = f32::from_bits(word(g.words + 1));
                    }
                }
            }
        }
        if g.center && state.indexed > 0 {
            let at = u64::from(self.sequences[seq].slot) * self.slot_bytes();
            let bytes = self.ctx.read_buffer_blocking(op, &self.state, at, (heads * g.head_dim * 4) as u64)?;
            data.mean = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        }
        Ok(data)
    }

    pub(super) fn import_sequence(&mut self, seq: usize, data: &SequenceData) -> Result<()> {
        let op = "load";
        self.ctx.check_alive(op)?;
        let g = self.geometry;
        let size = g.dtype.size();
        let (k_row, v_row) = (g.head_dim * size, g.value_dim * size);
        let heads = g.num_kv_heads;
        let SeqState { len, indexed } = data.state;
        let needed = len.div_ceil(g.page);
        self.pool.grow(&self.ctx, op, &g, needed)?;
        let mut pages = Vec::with_capacity(needed);
        for _ in 0..needed {
            pages.push(self.pool.take(op)?);
        }
        let mut k = data.k.clone();
        let mut v = data.v.clone();
        for (logical, &page) in pages.iter().enumerate() {
            let first = logical * g.page;
            let tokens = first..len.min(first + g.page);
            let slab = &self.pool.slabs[slab_of(page)];
            let parts = slab.parts(&g);
            let mut images = parts.map(|(_, bytes)| vec![0u8; bytes as usize]);
            let range = |row: usize| tokens.start * heads * row..tokens.end * heads * row;
            self.rows(&mut images[0], &mut k[range(k_row)], g.k_pieces() * 16, k_row, true);
            self.rows(&mut images[1], &mut v[range(v_row)], g.v_pieces() * 16, v_row, true);
            for token in tokens.start..tokens.end.min(indexed).max(tokens.start) {
                for head in 0..heads {
                    let mut put = |w: usize, value: u32| {
                        let at = ((head * g.index_words() + w) * g.page + token - first) * 4;
                        images[2][at..at + 4].copy_from_slice(&value.to_le_bytes());
                    };
                    let at = token * heads + head;
                    for w in 0..g.words {
                        put(w, data.bits[at * g.words + w]);
                    }
                    if g.gain {
                        put(g.words, data.gain[at].to_bits());
                    }
                    if g.bias {
                        put(g.words + 1, data.bias[at].to_bits());
                    }
                }
            }
            for ((buffer, bytes), image) in parts.into_iter().zip(&images) {
                self.ctx.write(op, buffer, u64::from(local_of(page)) * bytes, image)?;
            }
        }
        let mut state = vec![0u32; g.slot_words()];
        for (word, mean) in state.iter_mut().zip(&data.mean) {
            *word = mean.to_bits();
        }
        for head in 0..heads {
            let gains = data.gain.iter().skip(head).step_by(heads);
            state[heads * g.head_dim + head] = gains.fold(0f32, |a, &b| a.max(b)).to_bits();
        }
        let at = u64::from(self.sequences[seq].slot) * self.slot_bytes();
        self.ctx.write(op, &self.state, at, bytemuck::cast_slice(&state))?;
        self.sequences[seq].pages = pages;
        self.workspace.pages_changed();
        Ok(())
    }
}
