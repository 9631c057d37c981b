//! Merging attention over disjoint key sets (spec §3).

use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::convert::{encode, host_values};
use crate::tensor::{DType, Tensor, TensorView};

const OP: &str = "merge_state";

/// Merges (o₁, lse₁) and (o₂, lse₂) of disjoint key sets into the attention over their union.
///
/// o: `[batch, query token, heads, value_dim]`; lse: `[batch, query token, heads, 1]`, f32, natural log. The result
/// has o₁'s dtype. An empty key set is o = 0, lse = −∞. Host slices are merged on the CPU, whatever the device; where any
/// input is a device buffer, all are merged there, and must be without gaps.
///
/// # Errors
/// Shape and dtype mismatch; NaN or infinite values in host slices, but for an lse of −∞; [`Error::WrongDevice`]
/// where inputs live elsewhere than `device`.
pub fn merge_state(
    device: &Device,
    o1: &TensorView<'_>,
    lse1: &TensorView<'_>,
    o2: &TensorView<'_>,
    lse2: &TensorView<'_>,
) -> Result<(Tensor, Tensor)> {
    let shape = o1.shape();
    let rows = [shape[0], shape[1], shape[2], 1];
    o1.check(OP, "o1", [None; 4])?;
    o2.check(OP, "o2", shape.map(Some))?;
    for (name, lse) in [("lse1", lse1), ("lse2", lse2)] {
        if lse.dtype() != DType::F32 {
            return Err(Error::DType { op: OP, tensor: name, got: lse.dtype(), expected: "F32".into() });
        }
        lse.check_layout(OP, name, rows.map(Some))?;
    }
    #[cfg(feature = "wgpu")]
    if let Some(context) = device.context()
        && [o1, o2, lse1, lse2].iter().any(|view| view.is_buffer())
    {
        return crate::socket::gpu::merge::merge_state(context, [o1, o2], [lse1, lse2]);
    }
    #[cfg(feature = "cuda")]
    if let Some(context) = device.cuda_context()
        && [o1, o2, lse1, lse2].iter().any(|view| view.is_cuda())
    {
        return crate::socket::cuda::merge::merge_state(context, [o1, o2], [lse1, lse2]);
    }
    let _ = device;
    merge_host(shape, o1.dtype(), [o1, o2], [lse1, lse2])
}

fn merge_host(
    shape: [usize; 4],
    dtype: DType,
    o: [&TensorView<'_>; 2],
    lse: [&TensorView<'_>; 2],
) -> Result<(Tensor, Tensor)> {
    let [mut o1, o2] = [host_values(OP, "o1", o[0])?, host_values(OP, "o2", o[1])?];
    let [mut lse1, lse2] = [host_values(OP, "lse1", lse[0])?, host_values(OP, "lse2", lse[1])?];
    for (name, lse) in [("lse1", &lse1), ("lse2", &lse2)] {
        if let Some(i) = lse.iter().position(|x| x.is_nan() || *x == f32::INFINITY) {
            let index = [i / shape[2] / shape[1], i / shape[2] % shape[1], i % shape[2], 0];
            return Err(Error::NonFinite { op: OP, tensor: name, index });
        }
    }
    let dim = shape[3].max(1);
    for (row, (lse, other)) in lse1.iter_mut().zip(&lse2).enumerate() {
        let max = lse.max(*other);
        if max == f32::NEG_INFINITY {
            continue;
        }
        let (a, b) = ((*lse - max).exp(), (other - max).exp());
        *lse = max + (a + b).ln();
        let (a, b) = (a / (a + b), b / (a + b));
        let at = (row * dim).min(o1.len())..((row + 1) * dim).min(o1.len());
        o1[at.clone()].iter_mut().zip(&o2[at]).for_each(|(x, y)| *x = a * *x + b * y);
    }
    let lse_shape = vec![shape[0], shape[1], shape[2], 1];
    Ok((
        Tensor::host(dtype, shape.to_vec(), encode(dtype, &o1)),
        Tensor::host(DType::F32, lse_shape, encode(DType::F32, &lse1)),
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn merged(o: [&[f32]; 2], lse: [&[f32]; 2]) -> (Vec<f32>, Vec<f32>) {
        let n = lse[0].len();
        let (of, lf) = ([1, 1, n, o[0].len() / n], [1, 1, n, 1]);
        let view = TensorView::f32;
        let (o, lse) =
            merge_state(&Device::cpu(), &view(o[0], of), &view(lse[0], lf), &view(o[1], of), &view(lse[1], lf))
                .unwrap();
        (o.read_blocking().unwrap().to_f32(), lse.read_blocking().unwrap().to_f32())
    }

    #[test]
    fn weighs_by_the_sums_and_respects_empty_sets() {
        let none = f32::NEG_INFINITY;
        let o1 = [1.0, 2.0, 0.0, 0.0, 5.0, 6.0, 0.0, 0.0];
        let o2 = [3.0, 6.0, 7.0, 8.0, 0.0, 0.0, 0.0, 0.0];
        let (o, lse) = merged([&o1, &o2], [&[0.0, none, 100.0, none], &[3f32.ln(), 2.0, none, none]]);
        let expected = [2.5, 5.0, 7.0, 8.0, 5.0, 6.0, 0.0, 0.0];
        assert!(o.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{o:?}");
        assert!((lse[0] - 4f32.ln()).abs() < 1e-6);
        assert_eq!(lse[1..], [2.0, 100.0, none]);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let device = Device::cpu();
        let x = [0.0f32; 8];
        let (o, lse) = (TensorView::f32(&x, [1, 1, 2, 4]), TensorView::f32(&x, [1, 1, 2, 1]));
        let short = TensorView::f32(&x, [1, 1, 2, 3]);
        assert!(matches!(merge_state(&device, &o, &lse, &short, &lse), Err(Error::Shape { tensor: "o2", .. })));
        assert!(matches!(merge_state(&device, &o, &o, &o, &lse), Err(Error::Shape { tensor: "lse1", .. })));
        let nan = [f32::NAN; 2];
        let bad = TensorView::f32(&nan, [1, 1, 2, 1]);
        assert!(matches!(merge_state(&device, &o, &lse, &o, &bad), Err(Error::NonFinite { tensor: "lse2", .. })));
        let half = [half::f16::ZERO; 2];
        let half = TensorView::f16(&half, [1, 1, 2, 1]);
        assert!(matches!(merge_state(&device, &o, &half, &o, &lse), Err(Error::DType { tensor: "lse1", .. })));
    }
}
