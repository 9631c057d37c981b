//! The engine on lavapipe, or on the adapter that `SOFTHASH_DEVICE` names. These tests fail where it is missing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::arena::Slot;
use super::*;
use crate::error::Error;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use wgpu::BufferUsages as Usage;

mod reading;

const OP: &str = "test";

/// lavapipe, or what `SOFTHASH_DEVICE` names.
fn adapter() -> wgpu::Adapter {
    let name = std::env::var("SOFTHASH_DEVICE").unwrap_or_else(|_| "llvmpipe".into()).to_lowercase();
    pollster::block_on(adapters_best_first())
        .into_iter()
        .find(|adapter| adapter.get_info().name.to_lowercase().contains(&name))
        .expect("these tests need lavapipe (Debian: mesa-vulkan-drivers)")
}

/// Of that adapter, for other tests too. Without run-time checks of the shaders only where `unchecked`.
pub(crate) fn context(unchecked: bool) -> Arc<Context> {
    pollster::block_on(open(&adapter(), unchecked, None)).unwrap()
}

/// A device as a host has it, together with the count of errors that reached the host's own handler.
fn hosted() -> (Arc<Context>, Arc<AtomicUsize>) {
    let adapter = adapter();
    let (required_features, required_limits) = requirements(&adapter);
    let request = wgpu::DeviceDescriptor { required_features, required_limits, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&request)).unwrap();
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    device.on_uncaptured_error(Arc::new(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
    }));
    let info = adapter.get_info();
    let setup = Setup { info, device, queue, lent: true, unchecked: false, pipeline_cache: None };
    (Context::new(setup).unwrap(), seen)
}

/// Adds `BIAS` to `count` numbers.
#[derive(Clone)]
struct AddKey {
    bias: u32,
    /// How often the source was asked for.
    sources: Arc<AtomicUsize>,
}

impl AddKey {
    fn new(bias: u32) -> Self {
        Self { bias, sources: Arc::default() }
    }
}

impl KernelKey for AddKey {
    fn label(&self) -> String {
        format!("add bias={}", self.bias)
    }

    fn source(&self) -> KernelSource {
        self.sources.fetch_add(1, Ordering::SeqCst);
        let main = "
            struct Params { count: u32, unused_a: u32, unused_b: u32, unused_c: u32 }
            @group(0) @binding(0) var<uniform> params: Params;
            @group(0) @binding(1) var<storage, read> input: array<u32>;
            @group(0) @binding(2) var<uniform> extra: u32;
            @group(0) @binding(3) var<storage, read_write> output: array<u32>;
            #import add
            @compute @workgroup_size(64)
            fn main(@builtin(global_invocation_id) id: vec3<u32>) {
                if id.x < params.count {
                    output[id.x] = add(input[id.x], extra);
                }
            }";
        let add = "fn add(a: u32, b: u32) -> u32 { return a + b + BIAS; }";
        KernelSource {
            wgsl: Assembler::assemble(main, &[("add", add)], &[], &[("BIAS", self.bias)]).unwrap(),
            bindings: vec![
                Binding::Uniform { size: 16 },
                Binding::Read,
                Binding::Uniform { size: 4 },
                Binding::ReadWrite,
            ],
            entry: "main",
        }
    }
}

fn boxed(key: &(impl KernelKey + Clone + 'static)) -> Box<dyn KernelKey> {
    Box::new(key.clone())
}

#[derive(Clone)]
struct TextKey(&'static str, &'static str);

impl KernelKey for TextKey {
    fn label(&self) -> String {
        self.0.into()
    }

    fn source(&self) -> KernelSource {
        KernelSource { wgsl: self.1.into(), bindings: vec![Binding::ReadWrite], entry: "main" }
    }
}

const FILL: &str = "
    @group(0) @binding(0) var<storage, read_write> output: array<u32>;
    @compute @workgroup_size(1) fn main() { output[0] = 1u; }";

/// Writes one slot.
fn write(ctx: &Context, data: &[u8]) -> crate::Result<Slot> {
    Ok(ctx.arena().write_all(ctx, OP, &[data])?.remove(0))
}

/// Runs the kernel of `key` over `input` with `extra` and returns what it wrote.
fn add(ctx: &Context, key: &AddKey, input: &[u32], extra: u32) -> Vec<u32> {
    let bytes: &[u8] = bytemuck::cast_slice(input);
    let source = ctx.buffer_with(OP, "input", bytes, Usage::STORAGE).unwrap();
    let output = ctx.buffer(OP, "output", bytes.len() as u64, Usage::STORAGE | Usage::COPY_SRC).unwrap();
    let pipeline = ctx.pipeline(OP, key).unwrap();
    let params = [input.len() as u32, 0, 0, 0];
    let parts: [&[u8]; 2] = [bytemuck::cast_slice(&params), bytemuck::bytes_of(&extra)];
    let slots = ctx.arena().write_all(ctx, OP, &parts).unwrap();
    assert_eq!(slots[0].buffer, slots[1].buffer);
    let slot = |slot: &Slot| {
        wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: &slots[0].buffer,
            offset: 0,
            size: std::num::NonZeroU64::new(slot.size),
        })
    };
    let entries = [
        wgpu::BindGroupEntry { binding: 0, resource: slot(&slots[0]) },
        wgpu::BindGroupEntry { binding: 1, resource: source.as_entire_binding() },
        wgpu::BindGroupEntry { binding: 2, resource: slot(&slots[1]) },
        wgpu::BindGroupEntry { binding: 3, resource: output.as_entire_binding() },
    ];
    let group = ctx.bind_group(OP, "add", &pipeline.layout, &entries).unwrap();
    let mut encoder = ctx.encoder("add");
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline.pipeline);
        pass.set_bind_group(0, &group, &[slots[0].offset, slots[1].offset]);
        pass.dispatch_workgroups(input.len().div_ceil(64) as u32, 1, 1);
    }
    ctx.submit(OP, encoder).unwrap();
    let bytes = ctx.read_buffer_blocking(OP, &output, 0, bytes.len() as u64).unwrap();
    bytemuck::pod_collect_to_vec(&bytes)
}

#[test]
fn a_kernel_runs_checked_and_unchecked() {
    let input: Vec<u32> = (0..1000).collect();
    for unchecked in [false, true] {
        let ctx = context(unchecked);
        assert_eq!(ctx.caps().unchecked, unchecked);
        for extra in [5, 6] {
            let expected: Vec<u32> = input.iter().map(|x| x + extra + 3).collect();
            assert_eq!(add(&ctx, &AddKey::new(3), &input, extra), expected, "unchecked {unchecked}, extra {extra}");
        }
    }
}

#[test]
fn checks_are_in_the_checked_shader() {
    // WGSL defines x / 0 as x, which only the checked division keeps to: drivers left alone give other numbers.
    let key = TextKey(
        "divide",
        "@group(0) @binding(0) var<storage, read_write> data: array<u32>;
        @compute @workgroup_size(1) fn main() { data[0] = data[0] / data[1]; }",
    );
    let ctx = context(false);
    let data = bytemuck::bytes_of(&[7u32, 0]);
    let buffer = ctx.buffer_with(OP, "data", data, Usage::STORAGE | Usage::COPY_SRC).unwrap();
    let pipeline = ctx.pipeline(OP, &key).unwrap();
    let entry = wgpu::BindGroupEntry { binding: 0, resource: buffer.as_entire_binding() };
    let group = ctx.bind_group(OP, "divide", &pipeline.layout, &[entry]).unwrap();
    let mut encoder = ctx.encoder("divide");
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline.pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(1, 1, 1);
    }
    ctx.submit(OP, encoder).unwrap();
    assert_eq!(ctx.read_buffer_blocking(OP, &buffer, 0, 8).unwrap(), data);
}

#[test]
fn buffers_too_large_are_refused() {
    let (ctx, seen) = hosted();
    let limit = ctx.caps().max_buffer;
    let error = ctx.buffer(OP, "huge", limit + 4, Usage::STORAGE).unwrap_err();
    assert!(matches!(error, Error::Limit { value, limit: l, .. } if value == limit + 4 && l == limit), "{error}");
    assert!(matches!(ctx.buffer(OP, "huge", u64::MAX, Usage::STORAGE).unwrap_err(), Error::Limit { .. }));
    assert_eq!(seen.load(Ordering::SeqCst), 0);
}

#[test]
fn mistakes_come_back_as_errors_and_never_reach_the_host() {
    let (ctx, seen) = hosted();
    let gpu = |result: crate::Result<()>| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Gpu { op: OP, .. }), "{error}");
    };
    gpu(ctx.buffer(OP, "usage", 16, Usage::MAP_READ | Usage::STORAGE).map(drop));
    let small = ctx.buffer(OP, "small", 16, Usage::STORAGE).unwrap();
    gpu(ctx.write(OP, &small, 0, &[0; 16]));
    gpu(ctx.read_buffer_blocking(OP, &small, 0, 16).map(drop));
    let mut encoder = ctx.encoder("wrong");
    encoder.copy_buffer_to_buffer(&small, 0, &small, 0, 64);
    gpu(ctx.submit(OP, encoder));
    let pipeline = ctx.pipeline(OP, &TextKey("fill", FILL)).unwrap();
    gpu(ctx.bind_group(OP, "empty", &pipeline.layout, &[]).map(drop));
    assert_eq!(seen.load(Ordering::SeqCst), 0);
    // The handler is the host's own still: a mistake outside of the context does reach it.
    ctx.queue().write_buffer(&small, 0, &[0; 16]);
    assert_eq!(seen.load(Ordering::SeqCst), 1);
}

#[test]
fn shaders_that_do_not_compile_name_their_kernel() {
    let (ctx, seen) = hosted();
    for key in [
        TextKey("no sense", "fn main( {"),
        TextKey("no entry", "@group(0) @binding(0) var<storage, read_write> output: array<u32>;"),
        TextKey(
            "wrong binding",
            "@group(0) @binding(1) var<storage, read_write> output: array<u32>;
            @compute @workgroup_size(1) fn main() { output[0] = 1u; }",
        ),
    ] {
        for _ in 0..2 {
            let error = ctx.pipeline(OP, &key).unwrap_err();
            assert!(matches!(&error, Error::Gpu { op: OP, message } if message.contains(key.0)), "{error}");
            let error = ctx.warm_up(&[boxed(&key)]).unwrap_err();
            assert!(matches!(&error, Error::Gpu { op: "warm_up", message } if message.contains(key.0)), "{error}");
        }
    }
    assert!(ctx.compiled().is_empty());
    assert_eq!(seen.load(Ordering::SeqCst), 0);
}

#[test]
fn a_kernel_compiles_once_however_many_ask() {
    let ctx = context(true);
    let key = AddKey::new(1);
    let pipelines: Vec<_> = std::thread::scope(|scope| {
        let ask = || ctx.pipeline(OP, &key).unwrap();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(key.sources.load(Ordering::SeqCst), 1);
    assert!(pipelines.iter().all(|pipeline| Arc::ptr_eq(pipeline, &pipelines[0])));
    let others: Vec<AddKey> = (0..6).map(AddKey::new).collect();
    let keys: Vec<_> = others.iter().map(boxed).collect();
    ctx.warm_up(&keys).unwrap();
    let labels: Vec<_> = ctx.compiled().iter().map(|pipeline| pipeline.label.clone()).collect();
    assert_eq!(labels, (0..6).map(|bias| format!("add bias={bias}")).collect::<Vec<_>>());
    let compiled: Vec<_> = others.iter().map(|key| key.sources.load(Ordering::SeqCst)).collect();
    assert_eq!(compiled, [1, 0, 1, 1, 1, 1], "the second was there already");
}

/// Polls once, on this thread.
fn poll_once<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> std::task::Poll<T> {
    future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
}

#[test]
fn kernels_compile_while_the_poller_does_other_work() {
    let ctx = context(true);
    let keys: Vec<AddKey> = (0..6).chain(0..6).map(AddKey::new).collect();
    // While this cell's lock is held, its kernel cannot be done: a poll that waited for it would never come back.
    let (locked, release) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
    struct Held(AddKey, std::sync::Mutex<Option<std::sync::mpsc::Receiver<()>>>, std::sync::mpsc::Sender<()>);
    impl KernelKey for Held {
        fn label(&self) -> String {
            self.0.label()
        }
        fn source(&self) -> KernelSource {
            self.2.send(()).unwrap();
            let _ = self.1.lock().unwrap().take().unwrap().recv();
            self.0.source()
        }
    }
    let held = Held(AddKey::new(9), std::sync::Mutex::new(Some(release.1)), locked.0);
    let mut all: Vec<Box<dyn KernelKey>> = vec![Box::new(held)];
    all.extend(keys.iter().map(boxed));
    let mut warm_up = std::pin::pin!(ctx.clone().warm_up_async(all));
    assert!(ctx.compiled().is_empty(), "nothing happens before the first poll");
    assert!(poll_once(warm_up.as_mut()).is_pending());
    locked.1.recv().unwrap();
    assert!(poll_once(warm_up.as_mut()).is_pending());
    release.0.send(()).unwrap();
    pollster::block_on(warm_up).unwrap();
    let labels: Vec<_> = ctx.compiled().iter().map(|pipeline| pipeline.label.clone()).collect();
    assert_eq!(labels, [0, 1, 2, 3, 4, 5, 9].map(|bias| format!("add bias={bias}")));
    let sources = |key: usize| keys[key].sources.load(Ordering::SeqCst);
    assert!((0..6).all(|key| sources(key) + sources(key + 6) == 1), "twins compile once");
    // All there: nothing is compiled again.
    pollster::block_on(ctx.clone().warm_up_async(keys.iter().map(boxed).collect())).unwrap();
    assert!((0..6).all(|key| sources(key) + sources(key + 6) == 1));
}

#[test]
fn kernels_compile_in_turn_between_polls() {
    let ctx = context(true);
    let keys: Vec<AddKey> = (0..3).map(AddKey::new).collect();
    let mut warm_up = std::pin::pin!(super::pipeline::compile_in_turn(ctx.clone(), keys.iter().map(boxed).collect()));
    for done in 1..=3 {
        assert!(poll_once(warm_up.as_mut()).is_pending());
        assert_eq!(ctx.compiled().len(), done);
    }
    assert!(matches!(poll_once(warm_up.as_mut()), std::task::Poll::Ready(Ok(()))));
    let broken = vec![boxed(&TextKey("broken", "fn main("))];
    let error = pollster::block_on(super::pipeline::compile_in_turn(ctx, broken)).unwrap_err();
    assert!(error.to_string().contains("broken"), "{error}");
}

#[test]
fn errors_of_compilers_elsewhere_come_back() {
    struct Panicking;
    impl KernelKey for Panicking {
        fn label(&self) -> String {
            "panicking".into()
        }
        fn source(&self) -> KernelSource {
            panic!("planted")
        }
    }
    let (ctx, seen) = hosted();
    let warm_up = |key: Box<dyn KernelKey>| {
        let keys = vec![boxed(&AddKey::new(0)), key, boxed(&AddKey::new(1))];
        pollster::block_on(ctx.clone().warm_up_async(keys))
    };
    let error = warm_up(boxed(&TextKey("broken", "fn main("))).unwrap_err();
    assert!(matches!(&error, Error::Gpu { op: "warm_up", message } if message.contains("broken")), "{error}");
    assert_eq!(ctx.compiled().len(), 2, "the others are there");
    let error = warm_up(Box::new(Panicking)).unwrap_err();
    assert!(matches!(&error, Error::Gpu { op: "warm_up", .. }), "{error}");
    assert_eq!(seen.load(Ordering::SeqCst), 0, "the host hears nothing");
    ctx.device().destroy();
    let error = warm_up(boxed(&AddKey::new(2))).unwrap_err();
    assert!(matches!(error, Error::DeviceLost { .. }), "{error}");
}

#[test]
fn variants_are_told_from_the_text() {
    let ctx = context(true);
    let half = TextKey(
        "half",
        "enable f16;
        @group(0) @binding(0) var<storage, read_write> output: array<f16>;
        @compute @workgroup_size(1) fn main() { output[0] = 1h; }",
    );
    let group = TextKey(
        "group",
        "@group(0) @binding(0) var<storage, read_write> output: array<u32>;
        @compute @workgroup_size(8) fn main() { output[0] = subgroupAdd(1u); }",
    );
    assert!(ctx.caps().f16 && ctx.caps().subgroups, "lavapipe and current GPUs have both");
    let uses = |key: &TextKey| {
        let pipeline = ctx.pipeline(OP, key).unwrap();
        (pipeline.uses_f16, pipeline.uses_subgroups)
    };
    assert_eq!(uses(&TextKey("fill", FILL)), (false, false));
    assert_eq!(uses(&half), (true, false));
    assert_eq!(uses(&group), (false, true));
}

#[test]
fn arena_slots_are_never_rewritten() {
    let ctx = context(true);
    let align = u64::from(ctx.caps().uniform_align.max(ctx.caps().storage_align));
    let mut slots = Vec::new();
    for i in 0..10_000u32 {
        let slot = write(&ctx, bytemuck::cast_slice(&[i; 4])).unwrap();
        assert_eq!((u64::from(slot.offset) % align, slot.size), (0, 16));
        slots.push(slot);
        if i % 1000 == 0 {
            ctx.submit(OP, ctx.encoder("flush")).unwrap();
        }
    }
    let mut buffers: Vec<&wgpu::Buffer> = Vec::new();
    let mut places = HashSet::new();
    for slot in &slots {
        let known = buffers.iter().position(|buffer| **buffer == slot.buffer);
        let buffer = known.unwrap_or_else(|| {
            buffers.push(&slot.buffer);
            buffers.len() - 1
        });
        assert!(places.insert((buffer, slot.offset)), "a slot was given twice");
    }
    // The numbers themselves: copied out of the slots after all of them were written.
    let gathered = ctx.buffer(OP, "gathered", 4 * 10_000, Usage::COPY_SRC | Usage::COPY_DST | Usage::STORAGE).unwrap();
    let pipeline = ctx.pipeline(OP, &GatherKey).unwrap();
    let mut encoder = ctx.encoder("gather");
    let mut bound_buffer = None;
    let mut group = None;
    for (i, slot) in slots.iter().enumerate() {
        if bound_buffer != Some(&slot.buffer) {
            bound_buffer = Some(&slot.buffer);
            let bound = wgpu::BufferBinding { buffer: &slot.buffer, offset: 0, size: std::num::NonZeroU64::new(16) };
            let entries = [
                wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::Buffer(bound) },
                wgpu::BindGroupEntry { binding: 1, resource: gathered.as_entire_binding() },
            ];
            group = Some(ctx.bind_group(OP, "gather", &pipeline.layout, &entries).unwrap());
        }
        if i % 97 == 0 {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, group.as_ref(), &[slot.offset]);
            pass.dispatch_workgroups(1, 1, 1);
        }
    }
    ctx.submit(OP, encoder).unwrap();
    let read = ctx.read_buffer_blocking(OP, &gathered, 0, 4 * 10_000).unwrap();
    let read: Vec<u32> = bytemuck::pod_collect_to_vec(&read);
    for i in (0..10_000).step_by(97) {
        assert_eq!(read[i], i as u32 + 1, "slot {i}");
    }
}

/// Marks the place that a slot names: `output[slot.x] = slot.w + 1`.
struct GatherKey;

impl KernelKey for GatherKey {
    fn label(&self) -> String {
        "gather".into()
    }

    fn source(&self) -> KernelSource {
        let wgsl = "
            @group(0) @binding(0) var<uniform> slot: vec4<u32>;
            @group(0) @binding(1) var<storage, read_write> output: array<u32>;
            @compute @workgroup_size(1) fn main() { output[slot.x] = slot.w + 1u; }";
        let bindings = vec![Binding::Uniform { size: 16 }, Binding::ReadWrite];
        KernelSource { wgsl: wgsl.into(), bindings, entry: "main" }
    }
}

#[test]
fn slots_of_one_call_share_a_buffer() {
    let ctx = context(true);
    let large = vec![7u8; 100_000];
    for round in 0..5 {
        let slots = ctx.arena().write_all(&ctx, OP, &[&large, &[1, 2, 3], &[], &large]).unwrap();
        assert!(slots.iter().all(|slot| slot.buffer == slots[0].buffer), "round {round}");
        assert_eq!(slots.iter().map(|slot| slot.size).collect::<Vec<_>>(), [100_000, 4, 4, 100_000]);
        for pair in slots.windows(2) {
            assert!(u64::from(pair[0].offset) + pair[0].size <= u64::from(pair[1].offset));
        }
        let last = &slots[3];
        assert!(u64::from(last.offset) + last.size <= last.buffer.size());
    }
    // More than a whole buffer of slots.
    let slot = write(&ctx, &vec![1; 1 << 20]).unwrap();
    assert_eq!((slot.offset, slot.size), (0, 1 << 20));
    assert!(ctx.arena().write_all(&ctx, OP, &[]).unwrap().is_empty());
}

#[test]
fn a_lost_device_says_so_everywhere() {
    for (ctx, lent) in [(context(true), false), (hosted().0, true)] {
        let buffer = ctx.buffer(OP, "data", 16, Usage::STORAGE | Usage::COPY_SRC | Usage::COPY_DST).unwrap();
        ctx.check_alive(OP).unwrap();
        let encoder = ctx.encoder("early");
        ctx.device().destroy();
        let lost = |what: &str, result: crate::Result<()>| {
            let error = result.expect_err(what);
            assert!(matches!(error, Error::DeviceLost { .. }), "lent {lent}, {what}: {error}");
        };
        lost("check_alive", ctx.check_alive(OP));
        lost("submit", ctx.submit(OP, encoder));
        lost("read", pollster::block_on(ctx.read_buffer(OP, &buffer, 0, 16)).map(drop));
        lost("read_blocking", ctx.read_buffer_blocking(OP, &buffer, 0, 16).map(drop));
        lost("empty read", ctx.read_buffer_blocking(OP, &buffer, 0, 0).map(drop));
        lost("buffer", ctx.buffer(OP, "late", 16, Usage::STORAGE).map(drop));
        lost("buffer_with", ctx.buffer_with(OP, "late", &[1], Usage::STORAGE).map(drop));
        lost("write", ctx.write(OP, &buffer, 0, &[0; 16]));
        lost("arena", write(&ctx, &[1]).map(drop));
        lost("pipeline", ctx.pipeline(OP, &TextKey("fill", FILL)).map(drop));
        lost("warm_up", ctx.warm_up(&[boxed(&AddKey::new(0))]));
        lost("timer", Timer::new(&ctx, 1).map(drop));
        lost("submit", ctx.submit(OP, ctx.encoder("late")));
    }
}

#[test]
fn a_loss_is_noticed_by_whatever_call_comes_first() {
    type Call = fn(&Context, &wgpu::Buffer) -> crate::Result<()>;
    let calls: [(&str, Call); 9] = [
        ("buffer", |ctx, _| ctx.buffer(OP, "late", 16, Usage::STORAGE).map(drop)),
        ("write", |ctx, buffer| ctx.write(OP, buffer, 0, &[0; 16])),
        ("arena", |ctx, _| write(ctx, &[1]).map(drop)),
        ("warm_up", |ctx, _| ctx.warm_up(&[boxed(&AddKey::new(0))])),
        ("buffer_with", |ctx, _| ctx.buffer_with(OP, "late", &[1], Usage::STORAGE).map(drop)),
        ("pipeline", |ctx, _| ctx.pipeline(OP, &TextKey("fill", FILL)).map(drop)),
        ("submit", |ctx, _| ctx.submit(OP, ctx.encoder("late"))),
        ("read", |ctx, buffer| pollster::block_on(ctx.read_buffer(OP, buffer, 0, 16)).map(drop)),
        ("read_blocking", |ctx, buffer| ctx.read_buffer_blocking(OP, buffer, 0, 16).map(drop)),
    ];
    for (name, call) in calls {
        let (ctx, seen) = hosted();
        let buffer = ctx.buffer(OP, "data", 16, Usage::COPY_SRC | Usage::COPY_DST).unwrap();
        ctx.device().destroy();
        let error = call(&ctx, &buffer).expect_err(name);
        assert!(matches!(error, Error::DeviceLost { .. }), "{name}: {error}");
        assert_eq!(seen.load(Ordering::SeqCst), 0, "{name}");
    }
}

#[test]
fn asking_for_life_costs_little_and_leaves_nothing() {
    let ctx = context(true);
    let start = std::time::Instant::now();
    for _ in 0..20_000 {
        ctx.check_alive(OP).unwrap();
    }
    let each = start.elapsed() / 20_000;
    println!("check_alive: {each:?}");
    assert!(each < std::time::Duration::from_micros(100), "{each:?}");
    ctx.submit(OP, ctx.encoder("empty")).unwrap();
}

#[test]
fn pipeline_cache_data_is_taken_and_bad_data_dropped() {
    let adapter = adapter();
    let open_with = |data| pollster::block_on(open(&adapter, true, data)).unwrap();
    let ctx = open_with(None);
    assert!(ctx.caps().pipeline_cache, "Vulkan has one");
    ctx.pipeline(OP, &AddKey::new(2)).unwrap();
    let data = ctx.pipeline_cache_data().unwrap();
    let mut torn = data.clone();
    *torn.last_mut().unwrap() ^= 1;
    let mut cut = data.clone();
    cut.truncate(40);
    for given in [data, torn, cut, Vec::new(), vec![0; 1000]] {
        let ctx = open_with(Some(given));
        assert_eq!(add(&ctx, &AddKey::new(2), &[1, 2, 3], 4), [7, 8, 9]);
        assert!(ctx.pipeline_cache_data().is_some());
    }
}

#[test]
fn spans_are_timed() {
    let ctx = context(true);
    let timer = Timer::new(&ctx, 2).unwrap().expect("lavapipe has timestamps");
    let buffer = ctx.buffer(OP, "data", 64 << 20, Usage::COPY_DST | Usage::STORAGE).unwrap();
    let mut encoder = ctx.encoder("timed");
    timer.begin(&mut encoder, 0);
    encoder.clear_buffer(&buffer, 0, None);
    timer.end(&mut encoder, 0);
    {
        let description = wgpu::ComputePassDescriptor { label: None, timestamp_writes: Some(timer.pass(1)) };
        drop(encoder.begin_compute_pass(&description));
    }
    timer.resolve(&mut encoder);
    let start = std::time::Instant::now();
    ctx.submit(OP, encoder).unwrap();
    let spans = timer.read_blocking().unwrap();
    let wall = start.elapsed().as_nanos() as f64;
    println!("spans {spans:?} ns within {wall} ns");
    let cleared = spans[0].expect("lavapipe's stamps are sound");
    assert!(cleared > 0.0 && cleared < wall, "{cleared} of {wall}");
    assert!(spans[1].is_some_and(|pass| pass < wall));
    assert!(matches!(Timer::new(&ctx, 0), Err(Error::Limit { .. })));
    assert!(matches!(Timer::new(&ctx, 1 << 20), Err(Error::Limit { .. })));
}
