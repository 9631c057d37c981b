//! One token of each sequence: one launch, which may be captured.

use super::CudaRace;
use super::kernels::Kernel;
use super::params::Step;
use crate::engine::cuda::{Bind, Grid, Passes};
use crate::error::{Error, Result};
use crate::race::cuda::state::CudaState;
use crate::race::executor::{Call, Inputs};
use crate::tensor::Tensor;

impl CudaRace {
    /// Channels of v that a block of a step over `units` (sequence, kv head) pairs takes: few where that many blocks run
    /// at once, so that each has little to do; else all of a unit's, which is hashed once then.
    fn step_channels(&self, units: usize) -> usize {
        let [few, many] = self.geometry.step_channels();
        let blocks = units.saturating_mul(self.geometry.value_dim.div_ceil(few));
        if blocks <= 4 * self.ctx.caps().multiprocessors as usize { few } else { many }
    }

    pub(super) fn step(&self, call: &Call, inputs: &Inputs<'_>, state: &CudaState) -> Result<Tensor> {
        let (op, g, ctx) = (call.op, self.geometry, self.ctx.clone());
        let staged = self.staged(call, inputs, false)?;
        let (Some(q), Some(k), Some(v)) = (&staged.q, &staged.k, &staged.v) else {
            return Err(Error::Unsupported { op, why: "a step takes q, k and v".into() });
        };
        let units = call.batch() * g.num_kv_heads;
        let elements = call.batch() * g.num_q_heads * g.value_dim;
        let o = ctx.uninit(op, (elements * call.output.size()) as u64)?;
        let mut passes = Passes::new(&ctx, op);
        // Where every sequence has a token there is nothing to tell.
        let all = call.lengths.iter().all(|&length| length > 0);
        let lengths = if all { Bind::null() } else { super::walk::lengths(&mut passes, call) };
        let params = Step {
            q_batch: q.strides.batch,
            q_head: q.strides.head,
            k_batch: k.strides.batch,
            k_head: k.strides.head,
            v_batch: v.strides.batch,
            v_head: v.strides.head,
            planes_step: self.planes_stride,
            kv_heads: g.num_kv_heads as u32,
            // Of plain weights, not R times them.
            scale: if g.ratio { 1.0 } else { self.weight * (1 << g.planes) as f32 },
        };
        let mut binds = vec![q.bind.clone(), k.bind.clone(), v.bind.clone()];
        binds.extend([&self.planes, &self.heads].map(Bind::from));
        binds.push(lengths);
        binds.extend([&state.buffer, &state.pending, &o].map(Bind::from));
        let channels = self.step_channels(units);
        let grid = Grid::new((units * g.value_dim.div_ceil(channels)) as u64, 256);
        passes.dispatch(self.key(Kernel::Step { output: call.output, channels }), params, grid, binds)?;
        passes.ready()?.run(&ctx, op)?;
        Ok(Tensor::cuda(call.output, vec![call.batch(), 1, g.num_q_heads, g.value_dim], o))
    }
}
