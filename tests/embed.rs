//! Inside a host application: its device lent, its buffers read in place, its encoder filled, nothing read back.

#![cfg(feature = "wgpu")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common {
    pub mod device;
    pub mod instance;
}

use softhash::{
    Attended, Budget, CacheShape, DType, DecodeOptions, Device, Mode, SocketCache, SocketConfig, TensorView,
    merge_state, wgpu,
};
use wgpu::util::DeviceExt;

const SHAPE: CacheShape =
    CacheShape { num_q_heads: 4, num_kv_heads: 2, head_dim: 64, value_dim: 32, dtype: DType::F32 };

fn numbers(seed: u32, n: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2_654_435_761).max(1);
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as f32 / u32::MAX as f32 - 0.5
    };
    (0..n).map(|_| 4.0 * next()).collect()
}

fn config() -> SocketConfig {
    SocketConfig { budget: Budget::Tokens(16), sink: 4, window: 8, center: Some(32), ..SocketConfig::fast() }
}

/// A host's own device, lent.
fn host() -> (wgpu::Device, wgpu::Queue, Device) {
    let name = std::env::var("SOFTHASH_TEST_DEVICE").unwrap_or_else(|_| "llvmpipe".into());
    let adapters = pollster::block_on(common::instance::instance().enumerate_adapters(wgpu::Backends::all()));
    let adapter = adapters.into_iter().find(|a| a.get_info().name.to_lowercase().contains(&name)).expect("an adapter");
    let wants = Device::requirements(&adapter);
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
        required_features: wants.required_features | wants.optional_features,
        required_limits: wants.required_limits,
        ..Default::default()
    }))
    .unwrap();
    let lent = Device::from_wgpu(&adapter.get_info(), device.clone(), queue.clone()).unwrap();
    (device, queue, lent)
}

fn buffer(device: &wgpu::Device, data: &[f32], offset: usize) -> wgpu::Buffer {
    let mut bytes = vec![0xffu8; offset];
    bytes.extend_from_slice(bytemuck::cast_slice(data));
    let descriptor =
        wgpu::util::BufferInitDescriptor { label: None, contents: &bytes, usage: wgpu::BufferUsages::STORAGE };
    device.create_buffer_init(&descriptor)
}

fn values(attended: &Attended) -> (Vec<f32>, Vec<f32>) {
    (attended.o.read_blocking().unwrap().to_f32(), attended.lse.read_blocking().unwrap().to_f32())
}

fn close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst <= 2e-5 * scale, "{worst} of {scale}");
}

/// Many steps left in one encoder, submitted late: every step sees its own lengths, pages and queries.
#[test]
fn steps_wait_in_the_hosts_encoder() {
    if common::device::is_cuda() {
        return;
    }
    let (device, queue, lent) = host();
    let mut gpu = SocketCache::with_page_tokens(&lent, config(), SHAPE, 2, 64).unwrap();
    let mut cpu = SocketCache::with_page_tokens(&Device::cpu(), config(), SHAPE, 2, 64).unwrap();
    pollster::block_on(gpu.warm_up_async(DType::F32, DType::F32)).unwrap();
    let compiled = lent.report().kernels.len();
    assert!(compiled > 8, "{compiled} kernels");
    gpu.warm_up(DType::F32, DType::F32).unwrap();
    assert_eq!(lent.report().kernels.len(), compiled, "the twins compile the same");
    pollster::block_on(cpu.warm_up_async(DType::F32, DType::F32)).unwrap();
    let (k, v) = (numbers(1, 2 * 120 * 2 * 64), numbers(2, 2 * 120 * 2 * 32));
    let (ks, vs) = ([2, 120, 2, 64], [2, 120, 2, 32]);
    for cache in [&mut gpu, &mut cpu] {
        cache.append_ragged(&TensorView::f32(&k, ks), &TensorView::f32(&v, vs), &[120, 61]).unwrap();
    }
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let mut pending = Vec::new();
    for step in 0..12 {
        let (k, v) = (numbers(10 + step, 2 * 2 * 64), numbers(30 + step, 2 * 2 * 32));
        let q = numbers(50 + step, 2 * 4 * 64);
        let offset = 4 * (step as usize % 3);
        let [kb, vb, qb] = [&k, &v, &q].map(|data| buffer(&device, data, offset));
        let of = |buffer, heads, dim| TensorView::buffer(buffer, offset as u64, DType::F32, [2, 1, heads, dim]);
        gpu.append_into(&mut encoder, &of(&kb, 2, 64), &of(&vb, 2, 32), &[1, 1]).unwrap();
        let mode = if step % 4 == 3 { Mode::Dense } else { Mode::Sparse };
        let options = DecodeOptions { mode, ..DecodeOptions::default() };
        let found = gpu.decode_into(&mut encoder, &of(&qb, 4, 64), &options).unwrap();
        assert!(found.o.as_buffer().is_some(), "results stay on the device");
        cpu.append(&TensorView::f32(&k, [2, 1, 2, 64]), &TensorView::f32(&v, [2, 1, 2, 32])).unwrap();
        let expected = cpu.decode_with(&TensorView::f32(&q, [2, 1, 4, 64]), &options).unwrap();
        assert!(expected.o.as_buffer().is_none());
        pending.push((found, expected));
    }
    assert_eq!(lent.report().kernels.len(), compiled, "everything was compiled by the warm-up");
    queue.submit([encoder.finish()]);
    for (found, expected) in &pending {
        let ((o, lse), (o_expected, lse_expected)) = (values(found), values(expected));
        close(&o, &o_expected);
        close(&lse, &lse_expected);
    }
    assert_eq!(gpu.non_finite_seen().unwrap(), 0);
}

/// Two halves of the keys in two caches merge to the attention over all of them, on the device and on the host.
#[test]
fn halves_merge_where_they_live() {
    let lent = common::device::gpu();
    for device in [lent, Device::cpu()] {
        let (k, v, q) = (numbers(3, 90 * 2 * 64), numbers(4, 90 * 2 * 32), numbers(5, 4 * 64));
        let query = TensorView::f32(&q, [1, 1, 4, 64]);
        let attend = |tokens: std::ops::Range<usize>| {
            let mut cache = SocketCache::new(&device, config(), SHAPE, 1).unwrap();
            let n = tokens.len();
            let (k, v) = (&k[tokens.start * 128..tokens.end * 128], &v[tokens.start * 64..tokens.end * 64]);
            cache.append(&TensorView::f32(k, [1, n, 2, 64]), &TensorView::f32(v, [1, n, 2, 32])).unwrap();
            cache.dense_decode(&query).unwrap()
        };
        let (a, b, whole, none) = (attend(0..37), attend(37..90), attend(0..90), attend(0..0));
        for (first, second, expected) in [(&a, &b, &whole), (&a, &none, &a), (&none, &none, &none)] {
            let views = [&first.o, &first.lse, &second.o, &second.lse].map(|t| t.view().unwrap());
            let (o, lse) = merge_state(&device, &views[0], &views[1], &views[2], &views[3]).unwrap();
            let (o_expected, lse_expected) = values(expected);
            close(&o.read_blocking().unwrap().to_f32(), &o_expected);
            let lse = lse.read_blocking().unwrap().to_f32();
            for (a, b) in lse.iter().zip(&lse_expected) {
                assert!(a == b || (a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }
}

/// A step's attention is seven dispatches, and three more for each slab that the keys' memory has grown by: slabs double, so
/// they stay few, and `reserve` makes one of them.
#[test]
fn a_step_takes_seven_dispatches() {
    if common::device::is_cuda() {
        return;
    }
    let device = common::device::gpu();
    let q = numbers(9, 4 * 64);
    let q = TensorView::f32(&q, [1, 1, 4, 64]);
    for (reserved, slabs) in [(256, 1), (0, 3)] {
        let mut cache = SocketCache::with_page_tokens(&device, config(), SHAPE, 1, 64).unwrap();
        cache.reserve(reserved).unwrap();
        for page in 0..4 {
            let (k, v) = (numbers(page, 64 * 2 * 64), numbers(page, 64 * 2 * 32));
            cache.append(&TensorView::f32(&k, [1, 64, 2, 64]), &TensorView::f32(&v, [1, 64, 2, 32])).unwrap();
        }
        let sparse = cache.profile_with(&q, &DecodeOptions::default()).unwrap();
        assert_eq!(sparse.len(), 4 + 3 * slabs, "{sparse:?}");
        let dense = DecodeOptions { mode: Mode::Dense, ..DecodeOptions::default() };
        assert_eq!(cache.profile_with(&q, &dense).unwrap().len(), 1 + slabs);
    }
}

/// 16-bit results merge on the device as on the host, o₁'s type deciding; and a read can be awaited.
#[test]
fn results_of_any_type_merge_on_the_device() {
    let gpu = common::device::gpu();
    let (k, v, q) = (numbers(11, 90 * 2 * 64), numbers(12, 90 * 2 * 32), numbers(13, 4 * 64));
    let attend = |device: &Device, tokens: std::ops::Range<usize>, output: DType| {
        let mut cache = SocketCache::new(device, config(), SHAPE, 1).unwrap();
        let n = tokens.len();
        let (k, v) = (&k[tokens.start * 128..tokens.end * 128], &v[tokens.start * 64..tokens.end * 64]);
        cache.append(&TensorView::f32(k, [1, n, 2, 64]), &TensorView::f32(v, [1, n, 2, 32])).unwrap();
        let options = DecodeOptions { mode: Mode::Dense, output: Some(output), ..DecodeOptions::default() };
        cache.decode_with(&TensorView::f32(&q, [1, 1, 4, 64]), &options).unwrap()
    };
    for (first, second) in [(DType::F16, DType::Bf16), (DType::Bf16, DType::F32), (DType::F32, DType::F16)] {
        let merged = [&gpu, &Device::cpu()].map(|device| {
            let (a, b) = (attend(device, 0..37, first), attend(device, 37..90, second));
            let views = [&a.o, &a.lse, &b.o, &b.lse].map(|t| t.view().unwrap());
            let (o, lse) = merge_state(device, &views[0], &views[1], &views[2], &views[3]).unwrap();
            assert_eq!((o.dtype(), lse.dtype()), (first, DType::F32));
            let read = pollster::block_on(o.read()).unwrap();
            assert_eq!((read.dtype(), read.shape(), read.bytes().len()), (first, o.shape(), 4 * 32 * first.size()));
            (read.to_f32(), pollster::block_on(lse.read()).unwrap().to_f32())
        });
        let unit = match first {
            DType::F16 => 1e-3,
            DType::Bf16 => 8e-3,
            _ => 2e-5,
        };
        let scale = merged[1].0.iter().fold(0f32, |m, x| m.max(x.abs()));
        // Halves are rounded, attended, merged and rounded again: two units of the last place on each path.
        for (a, b) in merged[0].0.iter().zip(&merged[1].0) {
            assert!((a - b).abs() <= 2.0 * unit * scale, "{first:?} {second:?}: {a} {b}");
        }
        close(&merged[0].1, &merged[1].1);
    }
}

/// The stages of a step are named, and timed where the device has a clock.
#[test]
fn a_profile_names_the_stages_of_a_step() {
    if common::device::is_cuda() {
        return;
    }
    let mut cache = SocketCache::new(&common::device::gpu(), config(), SHAPE, 1).unwrap();
    let (k, v, q) = (numbers(6, 200 * 2 * 64), numbers(7, 200 * 2 * 32), numbers(8, 4 * 64));
    cache.append(&TensorView::f32(&k, [1, 200, 2, 64]), &TensorView::f32(&v, [1, 200, 2, 32])).unwrap();
    let stages = cache.profile_with(&TensorView::f32(&q, [1, 1, 4, 64]), &DecodeOptions::default()).unwrap();
    let names: Vec<_> = stages.iter().map(|s| s.stage).collect();
    assert_eq!(names, ["hash query", "score", "bounds", "candidates", "threshold", "attend", "merge"]);
    assert!(stages.iter().all(|s| s.nanoseconds.is_nan() || s.nanoseconds >= 0.0));
}
