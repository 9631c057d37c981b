//! RACE inside a host application: its device lent, its buffers read in place, its encoder filled; and what is refused.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/device.rs"]
#[allow(dead_code, reason = "these tests open adapters themselves")]
mod device;
#[path = "common/instance.rs"]
mod instance;

use softhash::{
    Beta, DType, Device, Error, Gate, Normalization, Race, RaceConfig, RaceOptions, RaceShape, Tensor, TensorView, wgpu,
};
use wgpu::util::DeviceExt;

const SHAPE: RaceShape = RaceShape { num_q_heads: 4, num_kv_heads: 2, head_dim: 24, value_dim: 20, dtype: DType::F32 };

fn config() -> RaceConfig {
    RaceConfig { tables: 3, planes: 3, ..RaceConfig::default() }
}

fn windowed() -> RaceConfig {
    RaceConfig { window: 40, gate: Gate::PerHead(vec![0.2, 0.5, 0.7, 1.0]), ..config() }
}

fn numbers(seed: u32, n: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2_654_435_761).max(1);
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as f32 / u32::MAX as f32 - 0.5
    };
    (0..n).map(|_| next()).collect()
}

fn adapter() -> wgpu::Adapter {
    let name = std::env::var("SOFTHASH_TEST_DEVICE").unwrap_or_else(|_| "llvmpipe".into());
    let adapters = pollster::block_on(instance::instance().enumerate_adapters(wgpu::Backends::all()));
    adapters.into_iter().find(|a| a.get_info().name.to_lowercase().contains(&name)).expect("an adapter")
}

/// A host's own device, lent.
fn host(adapter: &wgpu::Adapter) -> (wgpu::Device, wgpu::Queue, Device) {
    let wants = Device::requirements(adapter);
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
        required_features: wants.required_features | wants.optional_features,
        required_limits: wants.required_limits,
        ..Default::default()
    }))
    .unwrap();
    let lent = Device::from_wgpu(&adapter.get_info(), device.clone(), queue.clone()).unwrap();
    (device, queue, lent)
}

fn buffer(device: &wgpu::Device, bytes: &[u8]) -> wgpu::Buffer {
    let descriptor =
        wgpu::util::BufferInitDescriptor { label: None, contents: bytes, usage: wgpu::BufferUsages::STORAGE };
    device.create_buffer_init(&descriptor)
}

fn values(x: &Tensor) -> Vec<f32> {
    x.read_blocking().unwrap().to_f32()
}

#[track_caller]
fn close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst <= 1e-5 * scale, "{worst} of {scale}");
}

/// Tokens `t` of two sequences.
fn some(seed: u32, tokens: usize) -> [Vec<f32>; 3] {
    let of = |seed, heads, dim| numbers(seed, 2 * tokens * heads * dim);
    [of(seed, 4, 24), of(seed + 1, 2, 24), of(seed + 2, 2, 20)]
}

fn views([q, k, v]: &[Vec<f32>; 3], tokens: usize) -> [TensorView<'_>; 3] {
    [
        TensorView::f32(q, [2, tokens, 4, 24]),
        TensorView::f32(k, [2, tokens, 2, 24]),
        TensorView::f32(v, [2, tokens, 2, 20]),
    ]
}

/// Steps and chunks left in one encoder and submitted late; the host trains meanwhile.
#[test]
fn appends_wait_in_the_hosts_encoder() {
    if device::is_cuda() {
        return;
    }
    for config in [config(), windowed()] {
        appends_wait(&config);
    }
}

fn appends_wait(config: &RaceConfig) {
    let (device, queue, lent) = host(&adapter());
    let mut race = Race::new(&lent, config.clone(), SHAPE).unwrap();
    pollster::block_on(race.warm_up_async(DType::F32)).unwrap();
    let compiled = lent.report().kernels.len();
    assert!(compiled >= 6, "{compiled} kernels");
    race.warm_up(DType::F32).unwrap();
    assert_eq!(lent.report().kernels.len(), compiled, "the twins compile the same");
    let mut state = race.new_state(2).unwrap();
    let mut twin = Race::new(&Device::cpu(), config.clone(), SHAPE).unwrap();
    let mut twin_state = twin.new_state(2).unwrap();

    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let (mut got, mut want) = (Vec::new(), Vec::new());
    for (i, tokens) in [70, 1, 1, 5, 1].into_iter().enumerate() {
        let data = some(7 * i as u32, tokens);
        let [q, k, v] = views(&data, tokens);
        let options = RaceOptions::default();
        got.push(race.append_into(&mut encoder, &mut state, &q, &k, &v, &options).unwrap());
        want.push(twin.append(&mut twin_state, &q, &k, &v).unwrap());
    }
    // Other parameters now do not reach what is recorded already.
    let planes = race.hyperplanes().unwrap();
    race.set_parameters(&numbers(99, planes.len()), Beta::Shared(3.0)).unwrap();
    race.set_gate(Gate::Shared(0.9)).unwrap();
    queue.submit([encoder.finish()]);
    for (got, want) in got.iter().zip(&want) {
        close(&values(got), &values(want));
    }
    assert_eq!((state.tokens(0), state.tokens(1)), (Some(78), Some(78)));
    // And they compile nothing.
    twin.set_parameters(&numbers(99, planes.len()), Beta::Shared(3.0)).unwrap();
    twin.set_gate(Gate::Shared(0.9)).unwrap();
    let data = some(1000, 1);
    let [q, k, v] = views(&data, 1);
    close(
        &values(&race.append(&mut state, &q, &k, &v).unwrap()),
        &values(&twin.append(&mut twin_state, &q, &k, &v).unwrap()),
    );
    assert_eq!(lent.report().kernels.len(), compiled);
}

/// Buffers with gaps, odd offsets and NaN in them.
#[test]
fn buffers_are_read_in_place() {
    if device::is_cuda() {
        return;
    }
    let (device, _, lent) = host(&adapter());
    for (dtype, tokens) in [(DType::F16, 70), (DType::Bf16, 1), (DType::Bf16, 33)] {
        let shape = RaceShape { dtype, ..SHAPE };
        let config = RaceConfig { normalization: Normalization::BucketMean, ..windowed() };
        // Heads before tokens, rows one element longer than they need be, all after an odd number of elements.
        let strides = |heads: usize, dim: usize| [heads * tokens * (dim + 1), dim + 1, tokens * (dim + 1), 1];
        let packed = |seed, heads: usize, dim: usize, poison: bool| -> Vec<u8> {
            let n = 2 * heads * tokens * (dim + 1) + 3;
            let x = numbers(seed, n);
            let bits = |i: usize, x: f32| match dtype {
                DType::F16 if poison && i % 97 == 5 => 0x7e01,
                _ if poison && i % 97 == 5 => 0xff80,
                _ if i % 97 == 5 => 0,
                DType::F16 => half::f16::from_f32(x).to_bits(),
                _ => half::bf16::from_f32(x).to_bits(),
            };
            let mut bytes: Vec<u8> = x.iter().enumerate().flat_map(|(i, &x)| bits(i, x).to_le_bytes()).collect();
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let mut results = Vec::new();
        for poison in [true, false] {
            let parts = [(1, 4, 24), (2, 2, 24), (3, 2, 20)]
                .map(|(seed, heads, dim)| (buffer(&device, &packed(seed, heads, dim, poison)), heads, dim));
            let [q, k, v] = [0, 1, 2].map(|i: usize| {
                let (buffer, heads, dim) = &parts[i];
                TensorView::buffer(buffer, 6, dtype, [2, tokens, *heads, *dim]).with_strides(strides(*heads, *dim))
            });
            let mut race = Race::new(&lent, config.clone(), shape).unwrap();
            let options = RaceOptions {
                output: Some(DType::F32),
                lengths: Some(vec![tokens, tokens - 1]),
                ..RaceOptions::default()
            };
            let out = race.forward_with(&q, &k, &v, None, &options).unwrap();
            let ends = race.read_state(&out.state).unwrap();
            results.push((values(&out.o), ends.window_k, ends.window_v));
        }
        assert!(results[0] == results[1], "NaN is not zero");
        let mut cpu = Race::new(&Device::cpu(), config.clone(), shape).unwrap();
        let parts = [(1, 4, 24), (2, 2, 24), (3, 2, 20)].map(|(seed, heads, dim)| {
            let words: Vec<u16> = bytemuck::pod_collect_to_vec(&packed(seed, heads, dim, false));
            (words, heads, dim)
        });
        let [q, k, v] = [0, 1, 2].map(|i: usize| {
            let (words, heads, dim) = &parts[i];
            let shape = [2, tokens, *heads, *dim];
            let view = match dtype {
                DType::F16 => TensorView::f16(&bytemuck::cast_slice(words)[3..], shape),
                _ => TensorView::bf16(&bytemuck::cast_slice(words)[3..], shape),
            };
            view.with_strides(strides(*heads, *dim))
        });
        let options =
            RaceOptions { output: Some(DType::F32), lengths: Some(vec![tokens, tokens - 1]), ..RaceOptions::default() };
        let out = cpu.forward_with(&q, &k, &v, None, &options).unwrap();
        close(&results[0].0, &values(&out.o));
        let ends = cpu.read_state(&out.state).unwrap();
        assert!(results[0].1 == ends.window_k && results[0].2 == ends.window_v);
    }
}

#[track_caller]
fn says<T: std::fmt::Debug>(result: softhash::Result<T>, words: &[&str]) -> Error {
    let error = result.unwrap_err();
    let text = error.to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
    error
}

#[test]
fn what_cannot_be_done_is_refused_and_the_state_stays() {
    if device::is_cuda() {
        return;
    }
    let adapter = adapter();
    let (device, _, lent) = host(&adapter);
    let (_, _, other) = host(&adapter);
    let mut race = Race::new(&lent, config(), SHAPE).unwrap();
    let mut state = race.new_state(2).unwrap();
    let data = some(5, 70);
    let [q, k, v] = views(&data, 70);
    race.append(&mut state, &q, &k, &v).unwrap();
    let before = race.read_state(&state).unwrap();

    // A state of another device, and a buffer of another one.
    let mut elsewhere = Race::new(&other, config(), SHAPE).unwrap();
    let mut foreign = elsewhere.new_state(2).unwrap();
    says(race.append(&mut foreign, &q, &k, &v), &["append", "state", "another GPU device"]);
    says(race.read_state(&foreign), &["another GPU device"]);
    says(race.fork(&foreign), &["another GPU device"]);
    let cpu = Race::new(&Device::cpu(), config(), SHAPE).unwrap();
    let mut on_host = cpu.new_state(2).unwrap();
    says(race.append(&mut on_host, &q, &k, &v), &["append", "the CPU"]);
    assert_eq!(elsewhere.append(&mut foreign, &q, &k, &v).unwrap().shape(), [2, 70, 4, 20]);

    // Buffers that cannot be bound.
    let bytes = bytemuck::cast_slice(&data[0]);
    let descriptor =
        wgpu::util::BufferInitDescriptor { label: None, contents: bytes, usage: wgpu::BufferUsages::COPY_DST };
    let unusable = device.create_buffer_init(&descriptor);
    let bad = TensorView::buffer(&unusable, 0, DType::F32, [2, 70, 4, 24]);
    says(race.append(&mut state, &bad, &k, &v), &["append", "STORAGE usage"]);
    let step = some(6, 1);
    let [_, k1, v1] = views(&step, 1);
    let bad = TensorView::buffer(&unusable, 0, DType::F32, [2, 1, 4, 24]);
    says(race.append(&mut state, &bad, &k1, &v1), &["append", "STORAGE usage"]);

    // Odd rows of 16-bit results.
    let mut odd = Race::new(&lent, config(), RaceShape { value_dim: 19, ..SHAPE }).unwrap();
    let options = RaceOptions { output: Some(DType::Bf16), ..RaceOptions::default() };
    let v19 = TensorView::f32(&data[2], [2, 70, 2, 19]);
    says(odd.forward_with(&q, &k, &v19, None, &options), &["odd value_dim = 19", "F32"]);

    // More than the device holds.
    let large = RaceConfig { tables: 16, planes: 8, ensembles: 64, ..RaceConfig::default() };
    let huge = RaceShape { num_q_heads: 512, num_kv_heads: 512, head_dim: 8, value_dim: 512, dtype: DType::F32 };
    let error = says(Race::new(&lent, large, huge), &["new", "limit"]);
    assert!(matches!(error, Error::Limit { .. }), "{error:?}");
    says(race.new_state(1 << 40), &["new_state", "limit"]);

    assert_eq!(race.read_state(&state).unwrap(), before);
    assert_eq!(state.tokens(0), Some(70));
}

#[test]
fn a_lost_device_is_said_to_be_lost() {
    if device::is_cuda() {
        return;
    }
    let adapter = adapter();
    let (device, _, lent) = host(&adapter);
    let mut race = Race::new(&lent, config(), SHAPE).unwrap();
    let data = some(5, 3);
    let [q, k, v] = views(&data, 3);
    let out = race.forward(&q, &k, &v, None).unwrap();
    let mut state = race.fork(&out.state).unwrap();
    device.destroy();
    let errors = [
        race.forward(&q, &k, &v, None).map(drop),
        race.append(&mut state, &q, &k, &v).map(drop),
        race.fork(&state).map(drop),
        race.read_state(&state).map(drop),
        race.new_state(2).map(drop),
        race.warm_up(DType::F16),
        race.set_parameters(&race.hyperplanes().unwrap(), Beta::Shared(1.0)),
        out.o.read_blocking().map(drop),
    ];
    for result in errors {
        let error = says(result, &["device is lost"]);
        assert!(matches!(error, Error::DeviceLost { .. }), "{error:?}");
    }
    assert_eq!(state.tokens(0), Some(3));
    let mut again = Race::new(&host(&adapter).2, config(), SHAPE).unwrap();
    again.forward(&q, &k, &v, None).unwrap();
}
