//! Merging attention results that live on a CUDA device.

use crate::engine::cuda::{Bind, Context, Grid, HEADERS, KernelKey, KernelSource, Passes, Stage, stage};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor, TensorView};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// The kernel that merges results of these dtypes; the merged o has the first one's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MergeKey {
    pub o1: DType,
    pub o2: DType,
}

/// Twin of `Params` in shaders/cuda/attention/merge_state.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    elements: u64,
    width: u32,
    reserved: u32,
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
        let code = |dtype: DType| format!("DTYPE_{}", format!("{dtype:?}").to_uppercase());
        KernelSource {
            file: "attention/merge_state.cu",
            text: include_str!("../../../shaders/cuda/attention/merge_state.cu"),
            headers: HEADERS,
            defines: vec![("O1", code(self.o1)), ("O2", code(self.o2))],
            options: &[],
            entry: "merge_state",
        }
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
    let rows = (batch * tokens * heads) as u64;
    let elements = rows * channels as u64;
    let staged = |tensor, view: &TensorView<'_>| stage(ctx, op, tensor, view, 0..batch, 0..tokens);
    let (o1, lse1) = (staged("o1", o[0])?, staged("lse1", lse[0])?);
    let (o2, lse2) = (staged("o2", o[1])?, staged("lse2", lse[1])?);
    let out = ctx.uninit(op, elements * dtype.size() as u64)?;
    let out_lse = ctx.uninit(op, rows * 4)?;
    let key = MergeKey { o1: dtype, o2: o[1].dtype() };
    let params = Params { elements, width: channels.max(1) as u32, reserved: 0 };
    let mut passes = Passes::new(ctx, op);
    let binds = vec![o1.bind, lse1.bind, o2.bind, lse2.bind, Bind::from(&out), Bind::from(&out_lse)];
    passes.dispatch(key, params, Grid::new(elements.div_ceil(256), 256), binds)?;
    passes.ready()?.run(ctx, op)?;
    Ok((
        Tensor::cuda(dtype, o[0].shape().to_vec(), out),
        Tensor::cuda(DType::F32, vec![batch, tokens, heads, 1], out_lse),
    ))
}
