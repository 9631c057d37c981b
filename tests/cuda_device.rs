//! CUDA devices as a user sees them. Without a driver they say so; with SOFTHASH_TEST_DEVICE=cuda they are put to work.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use half::{bf16, f16};
use softhash::cudarc::driver::{CudaContext, DevicePtr};
use softhash::{
    CacheShape, DType, Device, DeviceOptions, Error, SocketCache, SocketConfig, Tensor, TensorView, merge_state,
};

fn device() -> Option<Device> {
    match std::env::var("SOFTHASH_TEST_DEVICE") {
        Ok(name) if name.starts_with("cuda") => Some(Device::by_name(&name).expect("SOFTHASH_TEST_DEVICE")),
        _ => {
            println!("left out: SOFTHASH_TEST_DEVICE names no CUDA device");
            None
        }
    }
}

fn has_cuda() -> bool {
    Device::enumerate().iter().any(|adapter| adapter.backend == "Cuda")
}

#[test]
fn a_machine_without_a_driver_says_so_in_one_line() {
    let outcomes = || {
        let by_name = ["cuda", "CUDA", "cuda:0", "cuda:7", "cuda:x"].map(Device::by_name);
        by_name.into_iter().chain([Device::cuda(0), Device::cuda(7)])
    };
    if has_cuda() {
        for error in outcomes().filter_map(Result::err) {
            assert!(!error.to_string().contains('\n'), "{error}");
        }
        let error = Device::by_name("cuda:77").unwrap_err().to_string();
        assert!(error.contains("cuda:77") && error.contains("cuda:0 "), "{error}");
        return;
    }
    for outcome in outcomes() {
        let error = outcome.unwrap_err();
        assert!(matches!(error, Error::NoAdapter { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("NVIDIA driver") && !text.contains('\n'), "{text}");
    }
    let error = Device::by_name("cuda").unwrap_err().to_string();
    println!("{error}");
    let auto = Device::auto().unwrap();
    assert_ne!(auto.path_name(), "cuda");
}

#[test]
fn other_devices_have_no_cuda() {
    let device = Device::cpu();
    assert!(device.as_cuda().is_none() && device.cuda_timer(1).unwrap().is_none());
    let error = device.capture(|| Ok(())).unwrap_err();
    assert!(matches!(error, Error::WrongDevice { .. }), "{error}");
    let tensor = Tensor::from_f32(vec![1.0], [1; 4]).unwrap();
    assert_eq!(tensor.as_cuda(), None);
    assert!(matches!(tensor.into_cuda_slice::<f32>(), Err(Error::WrongDevice { .. })));
    // SAFETY: never read, as the CPU refuses it.
    let view = unsafe { TensorView::cuda_pointer(&device, 256, 4, DType::F32, [1; 4]) };
    let host = TensorView::f32(&[0.0], [1; 4]);
    let error = merge_state(&device, &view, &host, &view, &host).unwrap_err();
    assert!(matches!(error, Error::WrongDevice { .. }), "{error}");
    let shape = CacheShape { num_q_heads: 1, num_kv_heads: 1, head_dim: 8, value_dim: 8, dtype: DType::F32 };
    let mut cache = SocketCache::new(&device, SocketConfig::fast(), shape, 1).unwrap();
    // SAFETY: as above.
    let view = unsafe { TensorView::cuda_pointer(&device, 256, 32, DType::F32, [1, 1, 1, 8]) };
    assert!(matches!(cache.append(&view, &view), Err(Error::WrongDevice { .. })));
    assert_eq!(cache.len(0).unwrap_or(0), 0);
}

#[test]
fn the_device_reports_itself() {
    let Some(device) = device() else { return };
    assert_eq!((device.path_name(), device.is_cpu()), ("cuda", false));
    let report = device.report();
    let cuda = report.cuda.as_ref().unwrap();
    let listed = Device::enumerate();
    let summary = listed.iter().find(|adapter| adapter.name == cuda.adapter).unwrap();
    assert_eq!((summary.backend.as_str(), summary.software), ("Cuda", false));
    assert!(Device::by_name(&cuda.adapter).is_ok());
    let text = report.to_string();
    println!("{text}");
    for part in ["path: cuda (asked for by name)", "driver: CUDA ", "NVRTC ", "sm_", "kernels: none compiled yet"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let folder = tempfile::tempdir().unwrap();
    let kept = |folder: Option<&std::path::Path>| {
        let options = DeviceOptions::new().name("cuda").kernel_cache(folder.map(Into::into));
        let device = Device::open(options).unwrap();
        merged(&device, 3, DType::F32, DType::F32);
        device.report()
    };
    let off = kept(None);
    assert!(off.to_string().contains("kernel cache: off"));
    assert!(!off.kernels[0].resources.as_ref().unwrap().from_disk);
    assert!(!kept(Some(folder.path())).kernels[0].resources.as_ref().unwrap().from_disk);
    let again = kept(Some(folder.path()));
    assert!(again.kernels[0].resources.as_ref().unwrap().from_disk);
    println!("{again}");
    assert!(again.to_string().contains("merge_state F32 F32 [") && again.to_string().contains(", cached]"));
}

/// Numbers without a pattern, the same every time.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let hash = |i: u32| (i ^ seed).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(2_246_822_519);
    (0..count as u32).map(|i| hash(i) as f32 / u32::MAX as f32 * 4.0 - 2.0).collect()
}

fn tensor(values: &[f32], dtype: DType, shape: [usize; 4]) -> Tensor {
    let halves = || values.iter().map(|x| f16::from_f32(*x)).collect();
    let brains = || values.iter().map(|x| bf16::from_f32(*x)).collect();
    match dtype {
        DType::F16 => Tensor::from_f16(halves(), shape),
        DType::Bf16 => Tensor::from_bf16(brains(), shape),
        _ => Tensor::from_f32(values.to_vec(), shape),
    }
    .unwrap()
}

/// Moves a host tensor to the device.
fn moved(device: &Device, tensor: &Tensor) -> Tensor {
    let (_, stream) = device.as_cuda().unwrap();
    let host = tensor.read_blocking().unwrap();
    let slice = stream.clone_htod(host.bytes()).unwrap();
    Tensor::from_cuda_slice(device, slice, tensor.dtype(), tensor.shape().try_into().unwrap()).unwrap()
}

/// Merges `rows` rows on the device and on the CPU, and compares.
fn merged(device: &Device, rows: usize, first: DType, second: DType) {
    let (shape, lse_shape) = ([1, rows, 2, 24], [1, rows, 2, 1]);
    let mut lse = [numbers(rows * 2, 3), numbers(rows * 2, 4)];
    (lse[0][0], lse[1][0], lse[0][1], lse[1][2]) =
        (f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY);
    let inputs = [
        tensor(&numbers(rows * 48, 1), first, shape),
        tensor(&lse[0], DType::F32, lse_shape),
        tensor(&numbers(rows * 48, 2), second, shape),
        tensor(&lse[1], DType::F32, lse_shape),
    ];
    let run = |device: &Device, inputs: &[Tensor]| {
        let views: Vec<_> = inputs.iter().map(|t| t.view().unwrap()).collect();
        let (o, lse) = merge_state(device, &views[0], &views[1], &views[2], &views[3]).unwrap();
        assert_eq!((o.dtype(), o.shape(), lse.shape()), (first, &shape[..], &lse_shape[..]));
        (o.read_blocking().unwrap().to_f32(), lse.read_blocking().unwrap().to_f32())
    };
    let (mut o, lse) = run(&Device::cpu(), &inputs);
    // What an empty set's o holds comes through on the CPU and not here.
    assert_eq!(lse[0], f32::NEG_INFINITY);
    o[..24].fill(0.0);
    let on_device: Vec<_> = inputs.iter().map(|t| moved(device, t)).collect();
    let (got_o, got_lse) = run(device, &on_device);
    let step = match first {
        DType::F16 => 1e-3,
        DType::Bf16 => 8e-3,
        _ => 2e-6,
    };
    for (a, b) in got_o.iter().zip(&o) {
        assert!((a - b).abs() <= step * (1.0 + b.abs()), "{first:?} {second:?}: {a} for {b}");
    }
    for (a, b) in got_lse.iter().zip(&lse) {
        assert!(a == b || (a - b).abs() <= 2e-6 * (1.0 + b.abs()), "{a} for {b}");
    }
}

#[test]
fn merge_state_is_that_of_the_cpu() {
    let Some(device) = device() else { return };
    for first in [DType::F32, DType::F16, DType::Bf16] {
        for second in [DType::F32, DType::F16, DType::Bf16] {
            merged(&device, 37, first, second);
        }
    }
    merged(&device, 40_000, DType::F32, DType::F32);
    // A mixture: host slices and device memory.
    let (data, lse) = (numbers(8, 5), [0.0f32, 1.0]);
    let (host, host_lse) = (TensorView::f32(&data, [1, 1, 2, 4]), TensorView::f32(&lse, [1, 1, 2, 1]));
    let on_device = moved(&device, &tensor(&data, DType::F32, [1, 1, 2, 4]));
    let (o, _) = merge_state(&device, &host, &host_lse, &on_device.view().unwrap(), &host_lse).unwrap();
    assert!(o.as_cuda().is_some());
    let o = o.read_blocking().unwrap().to_f32();
    assert!(o.iter().zip(&data).all(|(a, b)| (a - b).abs() < 1e-6));
}

#[test]
fn memory_goes_in_and_out() {
    let Some(device) = device() else { return };
    let (context, stream) = device.as_cuda().unwrap();
    let data = numbers(64, 9);
    let slice = stream.clone_htod(&data).unwrap();
    let lse = stream.clone_htod(&[0.0f32; 4]).unwrap();
    // From an offset on, and by the bare pointer.
    let view = TensorView::cuda_slice(&slice, 4 * 4, DType::F32, [1, 1, 2, 4]);
    let lse_view = TensorView::cuda_slice(&lse, 0, DType::F32, [1, 1, 2, 1]);
    let (pointer, _guard) = slice.device_ptr(stream);
    // SAFETY: the slice lives until all work is done, and nobody writes it.
    let bare = unsafe { TensorView::cuda_pointer(&device, pointer + 16, 64 * 4 - 16, DType::F32, [1, 1, 2, 4]) };
    let (o, _) = merge_state(&device, &view, &lse_view, &bare, &lse_view).unwrap();
    let address = o.as_cuda().unwrap();
    let clone = o.clone();
    assert!(matches!(clone.into_cuda_slice::<f32>(), Err(Error::Unsupported { .. })), "two hold it");
    let out = o.into_cuda_slice::<f32>().unwrap();
    assert_eq!((out.device_ptr(stream).0, out.len()), (address, 8));
    let values = stream.clone_dtoh(&out).unwrap();
    assert!(values.iter().zip(&data[4..]).all(|(a, b)| (a - b).abs() < 1e-6));
    // Too short, off the grid, with gaps, of another stream.
    let merge = |view: &TensorView<'_>| merge_state(&device, view, &lse_view, view, &lse_view).map(drop);
    let late = TensorView::cuda_slice(&slice, 60 * 4, DType::F32, [1, 1, 2, 4]);
    assert!(matches!(merge(&late), Err(Error::OutOfBounds { needed: 8, available: 4, .. })));
    let odd = TensorView::cuda_slice(&slice, 2, DType::F32, [1, 1, 2, 4]);
    assert!(matches!(merge(&odd), Err(Error::Shape { .. })));
    let gaps = TensorView::cuda_slice(&slice, 0, DType::F32, [1, 1, 2, 4]).with_strides([64, 64, 8, 1]);
    assert!(matches!(merge(&gaps), Err(Error::Unsupported { .. })));
    let other = context.new_stream().unwrap();
    let elsewhere = other.clone_htod(&data).unwrap();
    let error = merge(&TensorView::cuda_slice(&elsewhere, 0, DType::F32, [1, 1, 2, 4])).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("stream"), "{error}");
    // Taken over, it is waited for.
    let taken = Tensor::from_cuda_slice(&device, elsewhere, DType::F32, [1, 4, 4, 4]).unwrap();
    assert_eq!(taken.read_blocking().unwrap().to_f32(), data);
    let short = stream.clone_htod(&[0u8; 10]).unwrap();
    let error = Tensor::from_cuda_slice(&device, short, DType::F32, [1, 1, 1, 3]).unwrap_err();
    assert!(matches!(error, Error::OutOfBounds { needed: 3, available: 2, .. }), "{error}");
}

#[test]
fn a_lent_stream_is_used_and_two_devices_do_not_mix() {
    let Some(device) = device() else { return };
    let host = CudaContext::new(0).unwrap();
    // SAFETY: one stream alone. With tracking, making it would wait for the other tests and break off their captures.
    unsafe { host.disable_event_tracking() };
    let stream = host.new_stream().unwrap();
    let lent = Device::from_cuda(stream.clone()).unwrap();
    assert_eq!(lent.as_cuda().unwrap().1, &stream);
    assert!(lent.report().to_string().contains("path: cuda (lent by the host)"));
    merged(&lent, 5, DType::Bf16, DType::F32);
    merged(&Device::from_cuda(host.default_stream()).unwrap(), 5, DType::F32, DType::F32);
    // A context of its own is as good as another GPU.
    let other = CudaContext::new_non_primary(0, 0).unwrap();
    let other = Device::from_cuda(other.new_stream().unwrap()).unwrap();
    merged(&other, 5, DType::F32, DType::F32);
    let o = moved(&other, &tensor(&numbers(8, 1), DType::F32, [1, 1, 2, 4]));
    let lse = moved(&other, &tensor(&[0.0; 2], DType::F32, [1, 1, 2, 1]));
    let (o_view, lse_view) = (o.view().unwrap(), lse.view().unwrap());
    let error = merge_state(&device, &o_view, &lse_view, &o_view, &lse_view).unwrap_err();
    assert!(matches!(error, Error::WrongDevice { got: "another CUDA device", .. }), "{error}");
    let slice = other.as_cuda().unwrap().1.clone_htod(&[0f32; 4]).unwrap();
    assert!(matches!(
        Tensor::from_cuda_slice(&device, slice, DType::F32, [1, 1, 1, 4]),
        Err(Error::WrongDevice { .. })
    ));
    let error = merge_state(&Device::cpu(), &o_view, &lse_view, &o_view, &lse_view).unwrap_err();
    assert!(matches!(error, Error::WrongDevice { expected: "the CPU", .. }), "{error}");
    // Two streams of one context: each is right by itself.
    merge_state(&other, &o_view, &lse_view, &o_view, &lse_view).unwrap();
}

#[test]
fn a_call_is_captured_and_replayed() {
    let Some(device) = device() else { return };
    let stream = device.as_cuda().unwrap().1.clone();
    let mut slice = stream.clone_htod(&[1.0f32, 2.0]).unwrap();
    let zero = stream.clone_htod(&[0.0f32]).unwrap();
    let (pointer, _) = slice.device_ptr(&stream);
    // SAFETY: the slice lives as long as the graph.
    let o = unsafe { TensorView::cuda_pointer(&device, pointer, 8, DType::F32, [1, 1, 1, 2]) };
    let lse = TensorView::cuda_slice(&zero, 0, DType::F32, [1, 1, 1, 1]);
    let step = || merge_state(&device, &o, &lse, &o, &lse);
    step().unwrap();
    let (mut graph, (merged, _)) = device.capture(step).unwrap();
    for values in [[1.0f32, 2.0], [5.0, -3.0]] {
        stream.memcpy_htod(&values, &mut slice).unwrap();
        graph.launch().unwrap();
        assert_eq!(merged.read_blocking().unwrap().to_f32(), values);
    }
    // Host memory would be gone at a replay.
    let host = TensorView::f32(&[0.0], [1, 1, 1, 1]);
    let error = device.capture(|| merge_state(&device, &o, &host, &o, &lse)).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    let error = device.capture(|| merged.read_blocking()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    graph.launch().unwrap();
}
