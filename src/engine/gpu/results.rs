//! Buffers of results, used again. Drivers clear and map the memory that they hand out, which takes longer than the
//! kernels that fill a large result: a few of the last ones are kept for results of the same size.

use super::context::Context;
use crate::engine::lock;
use crate::error::Result;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Smaller buffers come out of larger pieces of memory that wgpu holds, and are made quickly.
const LARGE: u64 = if cfg!(test) { 4096 } else { 32 << 20 };
/// Buffers kept at most: those of a forward and a backward pass.
const MOST: usize = 6;
/// Results asked for until a buffer that none of them wanted is given back.
const PATIENCE: u32 = 24;

const USAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

/// A buffer that holds a result. Once nobody holds it any more another result may have its memory, unless the caller
/// has seen the buffer itself: then commands may refer to it that this crate knows nothing of.
#[derive(Debug)]
pub(crate) struct ResultBuffer {
    ctx: Arc<Context>,
    buffer: wgpu::Buffer,
    lent: AtomicBool,
}

impl ResultBuffer {
    /// A buffer of zeros.
    pub fn zeros(ctx: &Arc<Context>, op: &'static str, bytes: u64) -> Result<Arc<Self>> {
        let kept = if bytes >= LARGE { ctx.results().take(bytes) } else { None };
        let buffer = match kept {
            Some(buffer) => {
                let mut encoder = ctx.encoder(op);
                encoder.clear_buffer(&buffer, 0, None);
                ctx.submit(op, encoder)?;
                buffer
            }
            None => ctx.buffer(op, "output", bytes, USAGE)?,
        };
        Ok(Arc::new(Self { ctx: ctx.clone(), buffer, lent: AtomicBool::new(false) }))
    }

    /// A buffer that others know.
    pub fn of_caller(ctx: Arc<Context>, buffer: wgpu::Buffer) -> Arc<Self> {
        Arc::new(Self { ctx, buffer, lent: AtomicBool::new(true) })
    }

    pub fn context(&self) -> &Arc<Context> {
        &self.ctx
    }

    /// For commands that are submitted before the call at hand returns.
    pub fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }

    /// For everything else.
    pub fn lend(&self) -> &wgpu::Buffer {
        self.lent.store(true, Ordering::Relaxed);
        &self.buffer
    }
}

impl Drop for ResultBuffer {
    fn drop(&mut self) {
        if !*self.lent.get_mut() && self.buffer.size() >= LARGE {
            self.ctx.results().keep(self.buffer.clone());
        }
    }
}

/// Buffers that hold no result at present.
#[derive(Debug, Default)]
pub(crate) struct Results(Mutex<Vec<(wgpu::Buffer, u32)>>);

impl Results {
    fn take(&self, bytes: u64) -> Option<wgpu::Buffer> {
        let mut kept = lock(&self.0);
        let found = kept.iter().position(|(buffer, _)| buffer.size() == bytes).map(|i| kept.remove(i).0);
        kept.iter_mut().for_each(|(_, waited)| *waited += 1);
        kept.retain(|(_, waited)| *waited < PATIENCE);
        found
    }

    fn keep(&self, buffer: wgpu::Buffer) {
        let mut kept = lock(&self.0);
        if kept.len() == MOST {
            kept.remove(0);
        }
        kept.push((buffer, 0));
    }

    /// Lets all go; whether there were any.
    pub fn release(&self) -> bool {
        !std::mem::take(&mut *lock(&self.0)).is_empty()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::{
        CacheShape, DType, DecodeOptions, Device, Race, RaceConfig, RaceOptions, RaceShape, SocketCache, SocketConfig,
        Tensor,
    };

    fn device() -> Device {
        let name = std::env::var("SOFTHASH_DEVICE").unwrap_or_else(|_| "llvmpipe".into());
        Device::by_name(&name).unwrap()
    }

    fn ask(device: &Device, bytes: u64) -> Arc<ResultBuffer> {
        ResultBuffer::zeros(device.context().unwrap(), "test", bytes).unwrap()
    }

    #[test]
    fn the_next_result_of_its_size_gets_the_memory_and_sees_zeros() {
        let device = device();
        let first = ask(&device, LARGE);
        let ctx = device.context().unwrap();
        ctx.write("test", first.buffer(), LARGE - 8, &[7; 8]).unwrap();
        let (memory, clone) = (first.buffer().clone(), first.clone());
        drop(first);
        assert_ne!(*ask(&device, LARGE).buffer(), memory, "somebody still holds it");
        device.trim();
        drop(clone);
        assert_ne!(*ask(&device, LARGE + 4).buffer(), memory);
        let again = ask(&device, LARGE);
        assert_eq!(*again.buffer(), memory);
        assert_eq!(ctx.read_buffer_blocking("test", again.buffer(), LARGE - 8, 8).unwrap(), [0; 8]);
    }

    #[test]
    fn what_the_caller_has_seen_or_is_small_is_let_go() {
        let device = device();
        let seen = ask(&device, LARGE);
        let memory = seen.lend().clone();
        drop(seen);
        assert_ne!(*ask(&device, LARGE).buffer(), memory);
        device.trim();
        drop(ask(&device, LARGE - 4));
        assert!(!device.context().unwrap().results().release());
        drop(ask(&device, LARGE));
        device.trim();
        assert!(!device.context().unwrap().results().release());
    }

    #[test]
    fn what_nobody_asks_for_is_given_back() {
        let device = device();
        let results = device.context().unwrap().results();
        drop(ask(&device, LARGE));
        for _ in 0..PATIENCE {
            assert!(results.take(4).is_none());
        }
        assert!(!results.release());
    }

    /// Inputs and results of commands that the caller submits, whenever that is.
    #[test]
    fn what_waits_in_the_callers_encoder_is_never_reused() {
        let device = device();
        let kept = || device.context().unwrap().results().release();
        let tensor =
            |heads: usize| Tensor::result(DType::F32, vec![1, 64, heads, 16], ask(&device, 4096 * heads as u64));
        drop(tensor(1));
        assert!(kept());
        let mut encoder = device.context().unwrap().encoder("test");

        let shape = RaceShape { num_q_heads: 2, num_kv_heads: 1, head_dim: 16, value_dim: 16, dtype: DType::F32 };
        let mut race = Race::new(&device, RaceConfig { tables: 2, planes: 2, ..RaceConfig::default() }, shape).unwrap();
        let mut state = race.new_state(1).unwrap();
        let (q, k, v) = (tensor(2), tensor(1), tensor(1));
        let views = [&q, &k, &v].map(|x| x.view().unwrap());
        let options = RaceOptions::default();
        drop(race.append_into(&mut encoder, &mut state, &views[0], &views[1], &views[2], &options).unwrap());
        drop((q, k, v));
        assert!(!kept());

        let shape = CacheShape { num_q_heads: 2, num_kv_heads: 1, head_dim: 16, value_dim: 16, dtype: DType::F32 };
        let mut cache = SocketCache::new(&device, SocketConfig::paper(), shape, 1).unwrap();
        let (q, k, v) = (tensor(2), tensor(1), tensor(1));
        let views = [&q, &k, &v].map(|x| x.view().unwrap());
        cache.append_into(&mut encoder, &views[1], &views[2], &[64]).unwrap();
        drop(cache.decode_into(&mut encoder, &views[0], &DecodeOptions::default()).unwrap());
        drop((q, k, v));
        assert!(!kept());

        // Once they are submitted by the call itself, memory is free again.
        let (q, k, v) = (tensor(2), tensor(1), tensor(1));
        let views = [&q, &k, &v].map(|x| x.view().unwrap());
        race.append(&mut state, &views[0], &views[1], &views[2]).unwrap();
        drop((q, k, v));
        assert!(kept());
    }
}
