//! Merging attention over disjoint key sets (spec §3).

use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::{Tensor, TensorView};

/// Merges (o₁, lse₁) and (o₂, lse₂) of disjoint key sets into the attention over their union.
///
/// o: `[batch, query token, heads, value_dim]`; lse: `[batch, query token, heads, 1]`, f32, natural log. The result
/// has o₁'s dtype. An empty key set is o = 0, lse = −∞.
///
/// # Errors
/// Shape and dtype mismatch; [`Error::WrongDevice`] where inputs live elsewhere than `device`.
pub fn merge_state(
    _device: &Device,
    _o1: &TensorView<'_>,
    _lse1: &TensorView<'_>,
    _o2: &TensorView<'_>,
    _lse2: &TensorView<'_>,
) -> Result<(Tensor, Tensor)> {
    Err(Error::Unsupported { op: "merge_state", why: "being written".into() })
}
