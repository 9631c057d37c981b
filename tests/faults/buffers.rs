//! What only a GPU can do wrong: buffers, limits, losses.

use super::*;
use crate::device::gpu;
use crate::instance::instance;
use softhash::wgpu::{self, BufferUsages};

fn buffer(device: &Device, bytes: &[u8], usage: BufferUsages) -> wgpu::Buffer {
    let (device, queue) = device.as_wgpu().unwrap();
    let (size, usage) = (bytes.len() as u64, usage | BufferUsages::COPY_DST);
    let buffer = device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
    queue.write_buffer(&buffer, 0, bytes);
    buffer
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

const Q: [usize; 4] = [2, 1, 4, 16];

#[test]
fn a_gpu_buffer_means_nothing_to_the_cpu() {
    if crate::device::is_cuda() {
        return;
    }
    let on_gpu = buffer(&gpu(), &[0; 512], BufferUsages::STORAGE);
    let q = TensorView::buffer(&on_gpu, 0, DType::F32, Q);
    let mut cache = cache(&Device::cpu());
    for op in ["decode", "prefill"] {
        let words = [op, "q lives on a GPU buffer", "runs on the CPU"];
        let error = refused(&mut cache, &words, |c| if op == "decode" { c.decode(&q) } else { c.prefill(&q) });
        is!(error, WrongDevice);
    }
    let (k, v) = ([2, 1, 2, 16], [2, 1, 2, 8]);
    let (k, v) = (TensorView::buffer(&on_gpu, 0, DType::F32, k), TensorView::buffer(&on_gpu, 0, DType::F32, v));
    let words = ["append", "k lives on a GPU buffer", "runs on the CPU"];
    is!(refused(&mut cache, &words, |c| c.append(&k, &v)), WrongDevice);
    let lse = TensorView::buffer(&on_gpu, 0, DType::F32, [2, 1, 4, 1]);
    let error = merge_state(&Device::cpu(), &q, &lse, &q, &lse).unwrap_err();
    says(&error, &["merge_state", "a GPU buffer", "the CPU"]);
    is!(error, WrongDevice);
}

#[test]
fn buffers_that_do_not_fit() {
    if crate::device::is_cuda() {
        return;
    }
    let device = gpu();
    let mut cache = cache(&device);
    let good = buffer(&device, &bytes(&wave(128)), BufferUsages::STORAGE);
    cache.decode(&TensorView::buffer(&good, 0, DType::F32, Q)).unwrap();

    let small = buffer(&device, &[0; 508], BufferUsages::STORAGE);
    let words = ["decode", "q needs 128 elements", "has 127"];
    let view = TensorView::buffer(&small, 0, DType::F32, Q);
    is!(refused(&mut cache, &words, |c| c.decode(&view)), OutOfBounds);
    for (offset, words) in
        [(4, ["decode", "q needs 128 elements", "has 127"]), (1 << 40, ["decode", "q needs 128 elements", "has 0"])]
    {
        let view = TensorView::buffer(&good, offset, DType::F32, Q);
        is!(refused(&mut cache, &words, |c| c.decode(&view)), OutOfBounds);
    }
    let view = TensorView::buffer(&good, 2, DType::F32, Q);
    is!(refused(&mut cache, &["decode", "multiple of 4", "got 2"], |c| c.decode(&view)), Shape);
    let view = TensorView::buffer(&good, 0, DType::I32, Q);
    is!(refused(&mut cache, &["decode", "q has dtype I32", "F32, F16 or Bf16"], |c| c.decode(&view)), DType);
    let uniform = buffer(&device, &[0; 512], BufferUsages::UNIFORM);
    let view = TensorView::buffer(&uniform, 0, DType::F32, Q);
    is!(refused(&mut cache, &["decode", "STORAGE usage"], |c| c.decode(&view)), Unsupported);
}

#[cfg(target_os = "linux")]
#[test]
fn a_refused_allocation_changes_nothing() {
    if crate::device::is_cuda() {
        return;
    }
    // The memory of a real GPU cannot be limited for a test; CI runs it on a software adapter.
    if !gpu().report().gpu.unwrap().software {
        return println!("left out on a real GPU");
    }
    run_short_of_memory("buffers::short_of_memory_on_the_gpu");
}

#[test]
#[ignore = "run by a_refused_allocation_changes_nothing"]
fn short_of_memory_on_the_gpu() {
    short_of_memory(&gpu());
}

#[test]
fn what_the_gpu_path_cannot_do_it_says() {
    if crate::device::is_cuda() {
        return;
    }
    let device = gpu();
    let odd = CacheShape { value_dim: 7, ..SHAPE };
    let mut cache = SocketCache::new(&device, config(), odd, 2).unwrap();
    let q = wave(128);
    let q = TensorView::f32(&q, Q);
    cache.decode(&q).unwrap();
    let options = DecodeOptions { output: Some(DType::F16), ..Default::default() };
    let words = ["decode", "16-bit outputs of an odd value_dim = 7", "F32 output"];
    says(&cache.decode_with(&q, &options).unwrap_err(), &words);
    is!(cache.decode_with(&q, &options).unwrap_err(), Unsupported);

    let mut cache = super::cache(&device);
    let uneven = buffer(&device, &[0; 508], BufferUsages::STORAGE);
    let gaps = TensorView::buffer(&uneven, 0, DType::F32, [1, 1, 4, 8]).with_strides([64, 64, 16, 1]);
    let lse = TensorView::buffer(&uneven, 0, DType::F32, [1, 1, 4, 1]);
    let error = merge_state(&device, &gaps, &lse, &gaps, &lse).unwrap_err();
    says(&error, &["merge_state", "gaps"]);
    is!(error, Unsupported);
    let (raw, _) = device.as_wgpu().unwrap();
    let ragged = raw.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 254,
        usage: BufferUsages::STORAGE,
        mapped_at_creation: false,
    });
    let q = TensorView::buffer(&ragged, 0, DType::Bf16, [2, 1, 4, 16]).with_strides([63, 63, 16, 1]);
    let error = refused(&mut cache, &["decode", "multiple of 4"], |c| c.decode(&q));
    is!(error, Unsupported);

    let plain = lent(&adapter()).1;
    let mut cache = super::cache(&plain);
    let q = wave(128);
    let q = TensorView::f32(&q, Q);
    let words = ["profile", "timestamp"];
    let error = refused(&mut cache, &words, |c| c.profile_with(&q, &DecodeOptions::default()));
    is!(error, Unsupported);
    let attended = cache.decode(&q).unwrap();
    let indices = TensorView::buffer(attended.o.as_buffer().unwrap(), 0, DType::I32, [2, 1, 4, 8]);
    let lse = attended.lse.view().unwrap();
    let error = merge_state(&plain, &indices, &lse, &indices, &lse).unwrap_err();
    says(&error, &["merge_state", "o1 has dtype I32"]);
    is!(error, DType);
}

/// A device that has no more than WebGPU promises: bindings of 128 MiB.
#[test]
fn capacity_beyond_the_devices_limits() {
    if crate::device::is_cuda() {
        return;
    }
    let adapter = adapter();
    let (gpu, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default())).unwrap();
    let device = Device::from_wgpu(&adapter.get_info(), gpu, queue).unwrap();
    let shape = CacheShape { num_q_heads: 1024, num_kv_heads: 1024, head_dim: 512, value_dim: 8, dtype: DType::F32 };
    let error = SocketCache::with_page_tokens(&device, config(), shape, 1, 128).unwrap_err();
    says(&error, &["new", "bytes of one page = 268435456", "limit of 134217728"]);
    is!(error, Limit);
    // One page fills a binding, and there can be 4096 of them.
    let mut cache = SocketCache::with_page_tokens(&device, config(), shape, 32, 64).unwrap();
    let error = cache.reserve(9600).unwrap_err();
    says(&error, &["reserve", "tokens to hold = 307200", "limit of 262144"]);
    is!(error, Limit);
    let zeros = buffer(&device, &[0; 1 << 21], BufferUsages::STORAGE);
    let of = |dim, strides| TensorView::buffer(&zeros, 0, DType::F32, [32, 9600, 1024, dim]).with_strides(strides);
    let (k, v) = (of(512, [0, 0, 512, 1]), of(8, [0, 0, 8, 1]));
    let error = cache.append(&k, &v).unwrap_err();
    says(&error, &["append", "tokens to hold = 307200", "limit of 262144"]);
    is!(error, Limit);
    assert!(cache.is_empty());
    assert_eq!(cache.memory().keys, 0);
    // One query token's look-up tables of all heads pass one binding.
    let wide = SocketConfig { tables: 1024, planes: 8, ..config() };
    let mut cache = SocketCache::with_page_tokens(&device, wide, CacheShape { head_dim: 8, ..shape }, 1, 64).unwrap();
    let (k, v) = (vec![1.0; 20 * 1024 * 8], vec![1.0; 1024 * 8]);
    let kv = TensorView::f32(&k, [1, 20, 1024, 8]);
    cache.append(&kv, &kv).unwrap();
    let error = cache.decode(&TensorView::f32(&v, [1, 1, 1024, 8])).unwrap_err();
    says(&error, &["decode", "bytes of look-up tables", "limit of 134217728"]);
    is!(error, Limit);
    assert_eq!(cache.len(0), Some(20));
}

#[test]
fn a_buffer_of_another_device_is_refused() {
    if crate::device::is_cuda() {
        return;
    }
    // Of the same instance: wgpu itself cannot tell apart what belongs to different instances.
    let adapter = adapter();
    let mut cache = cache(&lent(&adapter).1);
    let foreign = buffer(&lent(&adapter).1, &[0; 512], BufferUsages::STORAGE);
    let view = TensorView::buffer(&foreign, 0, DType::F32, Q);
    is!(refused(&mut cache, &["decode"], |c| c.decode(&view)), Gpu);
}

#[test]
fn nan_in_buffers_is_stored_as_zero_and_counted() {
    if crate::device::is_cuda() {
        return;
    }
    let device = gpu();
    let (mut k, mut v) = (wave(2 * 90 * 2 * 16), wave(2 * 90 * 2 * 8));
    let bad = [(3, f32::NAN), (700, f32::INFINITY), (1500, f32::NEG_INFINITY)];
    for (i, x) in bad {
        (k[i], v[i]) = (x, x);
    }
    let (ks, vs) = ([2, 90, 2, 16], [2, 90, 2, 8]);
    let fresh = || SocketCache::with_page_tokens(&device, config(), SHAPE, 2, 64).unwrap();
    let mut poisoned = fresh();
    let (kb, vb) =
        (buffer(&device, &bytes(&k), BufferUsages::STORAGE), buffer(&device, &bytes(&v), BufferUsages::STORAGE));
    poisoned.append(&TensorView::buffer(&kb, 0, DType::F32, ks), &TensorView::buffer(&vb, 0, DType::F32, vs)).unwrap();
    assert_eq!(poisoned.non_finite_seen().unwrap(), 6);

    for (i, _) in bad {
        (k[i], v[i]) = (0.0, 0.0);
    }
    let mut clean = fresh();
    clean.append(&TensorView::f32(&k, ks), &TensorView::f32(&v, vs)).unwrap();
    assert_eq!(clean.non_finite_seen().unwrap(), 0);
    assert!(seen(&mut poisoned) == seen(&mut clean));
}

/// That of [`gpu`].
fn adapter() -> wgpu::Adapter {
    let name = gpu().report().gpu.unwrap().adapter;
    let adapters = pollster::block_on(instance().enumerate_adapters(wgpu::Backends::VULKAN));
    adapters.into_iter().find(|a| a.get_info().name == name).unwrap()
}

/// A device of the host's own, lent.
fn lent(adapter: &wgpu::Adapter) -> (wgpu::Device, Device) {
    let wants = Device::requirements(adapter);
    let descriptor = wgpu::DeviceDescriptor { required_limits: wants.required_limits, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
    (device.clone(), Device::from_wgpu(&adapter.get_info(), device, queue).unwrap())
}

#[test]
fn a_lost_device_is_said_to_be_lost() {
    if crate::device::is_cuda() {
        return;
    }
    let adapter = adapter();
    let (host, device) = lent(&adapter);
    let mut lost = cache(&device);
    let q = wave(128);
    let q = TensorView::f32(&q, Q);
    let computed = lost.decode(&q).unwrap();
    host.destroy();

    let (k, v) = (wave(64), wave(32));
    let (k, v) = (TensorView::f32(&k, [2, 1, 2, 16]), TensorView::f32(&v, [2, 1, 2, 8]));
    let path = std::env::temp_dir().join(format!("softhash-lost-{}", std::process::id()));
    let errors = [
        ("append", lost.append(&k, &v).unwrap_err()),
        ("decode", lost.decode(&q).unwrap_err()),
        ("decode", lost.dense_decode(&q).unwrap_err()),
        ("prefill", lost.prefill(&q).unwrap_err()),
        ("reserve", lost.reserve(10_000).unwrap_err()),
        ("read", computed.o.read_blocking().unwrap_err()),
        ("", lost.to_bytes().unwrap_err()),
        ("", lost.save_to(&path).unwrap_err()),
        ("", lost.non_finite_seen().unwrap_err()),
    ];
    for (op, error) in errors {
        says(&error, &[op, "device is lost"]);
        is!(error, DeviceLost);
    }
    assert!(!path.exists(), "nothing is written of a lost cache");
    assert_eq!((lost.len(0), lost.len(1)), (Some(90), Some(40)));
    // A new device takes over.
    cache(&lent(&adapter).1).decode(&q).unwrap();
}
