//! Merging attention results that live on the GPU.

use super::kernels::SNIPPETS;
use super::params::Params;
use crate::engine::gpu::{Assembler, Bind, Context, KernelKey, KernelSource, Passes, Stage, dtype_define, stage};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor, TensorView};
use std::sync::Arc;

/// The pipeline that merges results of these dtypes; the merged o has the first one's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MergeKey {
    pub o1: DType,
    pub o2: DType,
}

impl Stage for MergeKey {
    fn stage(&self) -> &'static str {
        "merge_state"
    }
}

impl KernelKey for MergeKey {
    fn label(&self) -> String {
        format!("merge_state {:?} {:?}", self.o1, self.o2)
    }

    fn source(&self) -> KernelSource {
        let code = |dtype| match dtype {
            DType::F16 => 1,
            DType::Bf16 => 2,
            _ => 0,
        };
        let constants = [("O1", code(self.o1)), ("O2", code(self.o2))];
        let text = include_str!("../../../shaders/attention/merge_state.wgsl");
        let assembled = Assembler::assemble(text, SNIPPETS, &[dtype_define("OUT", self.o1)], &constants);
        KernelSource::new(assembled, size_of::<Params>(), &[false, false, false, false, true, true])
    }
}

/// Merges checked inputs, o `[batch, token, head, channel]` and lse `[batch, token, head, 1]`, all without gaps.
pub(crate) fn merge_state(
    ctx: &Arc<Context>,
    o: [&TensorView<'_>; 2],
    lse: [&TensorView<'_>; 2],
) -> Result<(Tensor, Tensor)> {
    let op = "merge_state";
    ctx.check_alive(op)?;
    if [o[0], o[1], lse[0], lse[1]].iter().any(|view| !view.is_contiguous()) {
        return Err(Error::Unsupported { op, why: "views with gaps on a GPU; copy them together first".into() });
    }
    let [batch, tokens, heads, channels] = o[0].shape();
    let dtype = o[0].dtype();
    let rows = batch * tokens * heads;
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let bytes = (rows * channels * dtype.size()) as u64;
    let o_buffer = ctx.buffer(op, "output", bytes.next_multiple_of(4).max(4), usage)?;
    let lse_buffer = ctx.buffer(op, "output", (rows * 4).max(4) as u64, usage)?;
    let mut inputs = Vec::new();
    for view in [o[0], lse[0], o[1], lse[1]] {
        inputs.push(stage(ctx, op, view, 0..batch, 0..tokens)?);
    }
    let words = bytes.div_ceil(4);
    let params = Params {
        items: words as u32,
        entries: rows as u32,
        width: channels as u32,
        input: inputs[0].strides,
        input2: inputs[2].strides,
        sink: inputs[1].strides.offset,
        window: inputs[3].strides.offset,
        ..Default::default()
    };
    let mut binds: Vec<Bind> = inputs.into_iter().map(|input| input.bind).collect();
    binds.extend([Bind::from(&o_buffer), Bind::from(&lse_buffer)]);
    let mut passes = Passes::new(ctx, op);
    passes.dispatch(MergeKey { o1: dtype, o2: o[1].dtype() }, params, words.div_ceil(256), binds)?;
    let ready = passes.ready()?;
    let mut encoder = ctx.encoder(op);
    ready.record(&mut encoder, None);
    ctx.submit(op, encoder)?;
    let merged = Tensor::gpu(ctx.clone(), dtype, vec![batch, tokens, heads, channels], o_buffer);
    Ok((merged, Tensor::gpu(ctx.clone(), DType::F32, vec![batch, tokens, heads, 1], lse_buffer)))
}
