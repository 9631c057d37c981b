//! The engine on a GPU. Left out where SOFTHASH_TEST_DEVICE does not name a CUDA device.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;
use crate::Error;
use crate::tensor::TensorView;
use std::path::Path;
use std::sync::Arc;

const OP: &str = "test";
/// Environment variable that names the device under test.
const DEVICE: &str = "SOFTHASH_TEST_DEVICE";

fn has_device() -> bool {
    let named = std::env::var(DEVICE).is_ok_and(|name| name.starts_with("cuda"));
    if !named {
        println!("left out: {DEVICE} names no CUDA device");
    }
    named
}

fn open(place: Place) -> Arc<Context> {
    Context::open(0, place).unwrap()
}

fn context() -> Option<Arc<Context>> {
    has_device().then(|| open(Place::Off))
}

/// A kernel of the tests' own.
#[derive(Clone, Copy)]
struct TestKey {
    text: &'static str,
    entry: &'static str,
}

impl KernelKey for TestKey {
    fn label(&self) -> String {
        format!("test {}", self.entry)
    }

    fn source(&self) -> KernelSource {
        let (text, entry) = (self.text, self.entry);
        KernelSource { file: "test.cu", text, headers: HEADERS, defines: vec![("N", "7".into())], options: &[], entry }
    }
}

impl Stage for TestKey {
    fn stage(&self) -> &'static str {
        self.entry
    }
}

const ADD: TestKey = TestKey {
    entry: "add",
    text: "#include \"numbers.cuh\"\nstruct P { u32 count, add; };\n\
           extern \"C\" __global__ void add(P p, const u32* from, u32* to) {\n\
           u32 at = blockIdx.x * blockDim.x + threadIdx.x; if (at < p.count) to[at] = from[at] + p.add * N; }\n",
};
const STORE: TestKey =
    TestKey { entry: "store_one", text: "extern \"C\" __global__ void store_one(int* to) { *to = 1; }" };
const SHARED: TestKey = TestKey {
    entry: "shared",
    text: "extern \"C\" __global__ void shared(unsigned bytes, unsigned* out) { extern __shared__ unsigned char s[];\n\
           for (unsigned i = threadIdx.x; i < bytes; i += blockDim.x) s[i] = (unsigned char)(i * 31);\n\
           __syncthreads(); unsigned sum = 0;\n\
           if (threadIdx.x == 0) { for (unsigned i = 0; i < bytes; i += 997) sum += s[i]; out[blockIdx.x] = sum; } }",
};
const MARK: TestKey = TestKey {
    entry: "mark",
    text: "extern \"C\" __global__ void mark(unsigned* out) { if (threadIdx.x == 0) atomicAdd(out, 1u); }",
};
const CLUSTER: TestKey = TestKey {
    entry: "cluster",
    text: "extern \"C\" __global__ void cluster(unsigned* out) { unsigned n = 1;\n\
           #if __CUDA_ARCH__ >= 900\n\
           asm volatile(\"griddepcontrol.wait;\" ::: \"memory\"); asm(\"mov.u32 %0, %%cluster_nctaid.x;\" : \"=r\"(n));\n\
           #endif\n\
           if (threadIdx.x == 0) atomicAdd(out, n); }",
};

fn words(bytes: &[u8]) -> Vec<u32> {
    bytemuck::pod_collect_to_vec(bytes)
}

fn read(ctx: &Context, buffer: &Buffer) -> Vec<u32> {
    words(&ctx.read_buffer_blocking(OP, buffer, 0, buffer.size()).unwrap())
}

fn filled(ctx: &Arc<Context>, data: &[u32]) -> Buffer {
    ctx.buffer_with(OP, bytemuck::cast_slice(data)).unwrap()
}

/// `from` + 7 `add`, into new memory.
fn add(ctx: &Arc<Context>, from: Bind, count: u32, add: u32) -> crate::Result<Buffer> {
    let to = ctx.uninit(OP, u64::from(count) * 4)?;
    let mut passes = Passes::new(ctx, OP);
    let grid = Grid::new(u64::from(count.div_ceil(64)), 64);
    passes.dispatch(ADD, [count, add], grid, vec![from, Bind::from(&to)])?;
    passes.ready()?.run(ctx, OP)?;
    Ok(to)
}

#[test]
fn kernels_run_in_order_with_parts_copies_and_clears() {
    let Some(ctx) = context() else { return };
    let one = filled(&ctx, &[1, 2, 3, 4, 5]);
    let two = ctx.buffer(OP, 20).unwrap();
    let far = ctx.uninit(OP, 20_000 * 4).unwrap();
    let mut passes = Passes::new(&ctx, OP);
    let part = passes.part(&[10u32, 20, 30]);
    // More than the arguments of one launch.
    let large: Vec<u32> = (0..20_000).collect();
    let large_part = passes.part(&large);
    passes.dispatch(ADD, [3u32, 1], Grid::new(1, 32), vec![part, Bind::from(&two)]).unwrap();
    passes.copy(Bind::at(&two, 0), Bind::at(&one, 8), 8);
    passes.clear(Bind::at(&one, 0), 4);
    passes.dispatch(ADD, [20_000u32, 1], Grid::new(625, 32), vec![large_part, Bind::from(&far)]).unwrap();
    passes.dispatch(ADD, [1u32, 1], Grid::new(0, 32), vec![Bind::null(), Bind::null()]).unwrap();
    passes.ready().unwrap().run(&ctx, OP).unwrap();
    assert_eq!(read(&ctx, &two), [17, 27, 37, 0, 0]);
    assert_eq!(read(&ctx, &one), [0, 2, 17, 27, 5]);
    assert!(read(&ctx, &far).iter().zip(&large).all(|(a, b)| *a == b + 7));
    ctx.write(OP, &one, 4, bytemuck::bytes_of(&9u32)).unwrap();
    ctx.copy(OP, (&one, 4), (&two, 16), 4).unwrap();
    assert_eq!(words(&ctx.read_buffer_blocking(OP, &two, 12, 8).unwrap()), [0, 9]);
    for error in [
        ctx.write(OP, &one, 17, &[0; 4]).unwrap_err(),
        ctx.copy(OP, (&one, 0), (&two, 17), 4).unwrap_err(),
        ctx.read_buffer_blocking(OP, &one, 17, 4).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Limit { value: 21, limit: 20, .. }), "{error}");
    }
}

#[test]
fn grids_blocks_and_shared_memory_are_checked() {
    let Some(ctx) = context() else { return };
    let count = ctx.buffer(OP, 4).unwrap();
    let launch = |key, grid| {
        let mut passes = Passes::new(&ctx, OP);
        passes.dispatch(key, (), grid, vec![Bind::from(&count)])?;
        passes.ready()?.run(&ctx, OP)
    };
    launch(MARK, Grid::new(100_000, 32)).unwrap();
    launch(MARK, Grid::xyz([3, 4, 5], 64)).unwrap();
    launch(MARK, Grid::new(64, 64).cooperative()).unwrap();
    launch(MARK, Grid::new(2, 1024)).unwrap();
    launch(MARK, Grid::new(1, 32).overlap()).unwrap();
    assert_eq!(read(&ctx, &count), [100_000 + 60 + 64 + 2 + 1]);
    for (grid, what) in [
        (Grid::new(1 << 31, 32), "blocks of one launch"),
        (Grid::xyz([1, 65536, 1], 32), "blocks of one launch"),
        (Grid::new(1, 2048), "threads of a block"),
        (Grid::new(1, 32).shared(1 << 20), "bytes of shared memory"),
    ] {
        let error = launch(MARK, grid).unwrap_err();
        assert!(matches!(error, Error::Limit { .. }) && error.to_string().contains(what), "{error}");
    }
    // Not even the largest GPU holds as many blocks at once: refused by the driver, and the device lives on.
    let error = launch(MARK, Grid::new(1 << 20, 1024).cooperative()).unwrap_err();
    assert!(matches!(error, Error::Gpu { .. }) && error.to_string().contains("registers"), "{error}");
    if ctx.caps().clusters {
        ctx.clear(OP, &count).unwrap();
        launch(CLUSTER, Grid::new(8, 32).cluster(4)).unwrap();
        launch(CLUSTER, Grid::new(8, 32).cluster(2).overlap()).unwrap();
        assert_eq!(read(&ctx, &count), [8 * 4 + 8 * 2]);
    }
    let most = ctx.caps().shared_memory;
    assert!(most > 96 << 10, "{most}");
    for bytes in [most, 1000, most / 2] {
        let mut passes = Passes::new(&ctx, OP);
        let grid = Grid::new(1, 256).shared(bytes);
        passes.dispatch(SHARED, [bytes], grid, vec![Bind::from(&count)]).unwrap();
        passes.ready().unwrap().run(&ctx, OP).unwrap();
        let expected = (0..bytes).step_by(997).map(|i| i * 31 % 256).sum::<u32>();
        assert_eq!(read(&ctx, &count), [expected]);
    }
}

#[test]
fn running_out_of_memory_names_the_bytes_and_changes_nothing() {
    let Some(ctx) = context() else { return };
    let kept = filled(&ctx, &[1, 2, 3]);
    let all = ctx.caps().memory;
    for bytes in [all, 1 << 50, u64::MAX] {
        let error = ctx.uninit(OP, bytes).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { bytes: asked, .. } if asked == bytes), "{error}");
        let mut scratch = Scratch::default();
        assert!(matches!(scratch.get(&ctx, OP, bytes), Err(Error::OutOfMemory { .. })));
        assert_eq!(scratch.bytes(), 0);
    }
    // What is dropped can be taken again, as often as one likes.
    for _ in 0..8 {
        drop(ctx.buffer(OP, all / 4).unwrap());
    }
    assert_eq!(read(&ctx, &add(&ctx, Bind::from(&kept), 3, 1).unwrap()), [8, 9, 10]);
}

#[test]
fn a_kernel_that_does_not_compile_says_where_and_the_device_lives_on() {
    if !has_device() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let ctx = open(Place::Folder(folder.path().into()));
    let cases = [
        ("extern \"C\" __global__ void bad(int* to) {\n  to[0] = nothing; }", "test.cu(2): error"),
        ("#include \"gone.cuh\"\n", "no header \"gone.cuh\""),
        ("extern \"C\" __global__ void other() {}", "not found"),
        ("extern \"C\" __global__ void bad(int* to) { asm(\"no.such.instruction;\"); }", "ptxas"),
    ];
    for (text, part) in cases {
        let key = TestKey { text, entry: "bad" };
        let error = ctx.kernel(OP, &key).unwrap_err();
        assert!(matches!(error, Error::Gpu { .. }), "{error}");
        assert!(error.to_string().contains("kernel test bad") && error.to_string().contains(part), "{error}");
        assert!(ctx.warm_up(&[Box::new(key)]).is_err());
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is kept of what failed");
    let from = filled(&ctx, &[1]);
    assert_eq!(read(&ctx, &add(&ctx, Bind::from(&from), 1, 1).unwrap()), [8]);
}

#[test]
fn compiled_kernels_come_from_disk_and_damaged_ones_are_made_anew() {
    if !has_device() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let from_disk = || {
        let ctx = open(Place::Folder(folder.path().into()));
        let from = filled(&ctx, &[1]);
        assert_eq!(read(&ctx, &add(&ctx, Bind::from(&from), 1, 1).unwrap()), [8]);
        let kernel = ctx.kernel(OP, &ADD).unwrap();
        assert!(kernel.registers > 0 && kernel.max_threads >= 1024 && kernel.local == 0);
        kernel.from_disk
    };
    let files = || -> Vec<_> { std::fs::read_dir(folder.path()).unwrap().map(|f| f.unwrap().path()).collect() };
    assert!(!from_disk());
    assert!(from_disk());
    let [file] = &files()[..] else { panic!("{:?}", files()) };
    let whole = std::fs::read(file).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    // The last is whole by its checksum, and no code of any GPU.
    for damaged in [flipped, whole[..100].to_vec(), Vec::new(), crate::engine::seal::sealed(b"not a kernel")] {
        std::fs::write(file, damaged).unwrap();
        assert!(!from_disk());
        assert_eq!(std::fs::read(file).unwrap(), whole, "put right");
        assert!(from_disk());
    }
    assert_eq!(files().len(), 1);
}

#[test]
fn a_captured_step_is_replayed_on_what_is_there_then() {
    let Some(ctx) = context() else { return };
    let from = filled(&ctx, &[1, 2, 3]);
    let mut scratch = Scratch::default();
    let mut step = |with_part: bool| -> crate::Result<Buffer> {
        let between = scratch.get(&ctx, OP, 12)?;
        let to = ctx.buffer(OP, 12)?;
        let mut passes = Passes::new(&ctx, OP);
        let binds = vec![Bind::from(&from), Bind::from(&between)];
        passes.dispatch(ADD, [3u32, 1], Grid::new(1, 32), binds)?;
        // Small data travels with the graph.
        let source = if with_part { passes.part(&[100u32, 200, 300]) } else { Bind::from(&between) };
        passes.dispatch(ADD, [3u32, 1], Grid::new(1, 32), vec![source, Bind::from(&to)])?;
        passes.ready()?.run(&ctx, OP)?;
        Ok(to)
    };
    assert_eq!(read(&ctx, &step(false).unwrap()), [15, 16, 17]);
    let (mut graph, to) = ctx.capture(|| step(false)).unwrap();
    let (mut other, constant) = ctx.capture(|| step(true)).unwrap();
    drop(scratch);
    // Memory that was free meanwhile goes to others.
    let others: Vec<_> = (0..20).map(|i| filled(&ctx, &[i; 3])).collect();
    for first in [1u32, 50, 1000] {
        ctx.write(OP, &from, 0, bytemuck::bytes_of(&first)).unwrap();
        graph.launch().unwrap();
        other.launch().unwrap();
        assert_eq!(read(&ctx, &to), [first + 14, 16, 17]);
        assert_eq!(read(&ctx, &constant), [107, 207, 307]);
    }
    drop((graph, other));
    for (i, buffer) in (0..).zip(&others) {
        assert_eq!(read(&ctx, buffer), [i; 3]);
    }
}

#[test]
fn what_cannot_be_captured_is_refused_and_leaves_the_stream_whole() {
    let Some(ctx) = context() else { return };
    let buffer = filled(&ctx, &[1]);
    type Call = fn(&Arc<Context>, &Buffer) -> crate::Result<()>;
    let calls: [(&str, Call); 5] = [
        ("write", |ctx, buffer| ctx.write(OP, buffer, 0, &[0; 4])),
        ("buffer_with", |ctx, _| ctx.buffer_with(OP, &[0; 4]).map(drop)),
        ("settle", |ctx, _| ctx.settle(OP)),
        ("read", |ctx, buffer| ctx.read_buffer_blocking(OP, buffer, 0, 4).map(drop)),
        ("capture", |ctx, _| ctx.capture(|| Ok(())).map(drop)),
    ];
    for (name, call) in calls {
        let error = ctx.capture(|| call(&ctx, &buffer)).expect_err(name);
        assert!(matches!(error, Error::Unsupported { .. }), "{name}: {error}");
        // Refused and not passed on: the rest of the capture is as good as any.
        let (mut graph, to) = ctx
            .capture(|| {
                call(&ctx, &buffer).expect_err(name);
                add(&ctx, Bind::from(&buffer), 1, 1)
            })
            .unwrap();
        graph.launch().unwrap();
        assert_eq!(read(&ctx, &to), [8], "{name}");
    }
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        ctx.capture(|| -> crate::Result<()> { panic!("planted") }).map(drop)
    }));
    assert!(caught.is_err());
    assert_eq!(read(&ctx, &add(&ctx, Bind::from(&buffer), 1, 1).unwrap()), [8]);
    // A kernel that was never compiled may be met in a capture too.
    let fresh = open(Place::Off);
    let buffer = filled(&fresh, &[1]);
    let (mut graph, to) = fresh.capture(|| add(&fresh, Bind::from(&buffer), 1, 1)).unwrap();
    graph.launch().unwrap();
    assert_eq!(read(&fresh, &to), [8]);
}

#[test]
fn a_host_captures_its_own_stream() {
    if !has_device() {
        return;
    }
    use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
    let stream = open(Place::Off).stream().clone();
    let ctx = Context::new(stream.clone(), Place::Off).unwrap();
    let from = filled(&ctx, &[1]);
    add(&ctx, Bind::from(&from), 1, 1).unwrap();
    for mode in [
        CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL,
        CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
    ] {
        stream.begin_capture(mode).unwrap();
        let to = add(&ctx, Bind::from(&from), 1, 1).unwrap();
        // Dropped at once, and yet nobody else's while the graph lives.
        let gone = add(&ctx, Bind::from(&to), 1, 1).unwrap();
        let pointer = gone.pointer();
        drop(gone);
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
        let others: Vec<_> = (0..20).map(|i| filled(&ctx, &[i])).collect();
        assert!(others.iter().all(|other| other.pointer() != pointer));
        for first in [1u32, 5] {
            ctx.write(OP, &from, 0, bytemuck::bytes_of(&first)).unwrap();
            graph.launch().unwrap();
            assert_eq!(read(&ctx, &to), [first + 7]);
        }
    }
}

#[test]
fn reads_wait_without_holding_the_polling_thread() {
    let Some(ctx) = context() else { return };
    use futures::FutureExt;
    let from = filled(&ctx, &[1, 2, 3, 4]);
    let reads = (0..4).map(|i| {
        let to = add(&ctx, Bind::from(&from), 4, i).unwrap();
        let ctx = ctx.clone();
        async move { words(&ctx.read_buffer(OP, &to, 4, 8).await.unwrap()) }.boxed()
    });
    let mut all = futures::future::join_all(reads);
    let values = loop {
        match (&mut all).now_or_never() {
            Some(values) => break values,
            None => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    };
    assert_eq!(values, [[2, 3], [9, 10], [16, 17], [23, 24]]);
    let never = ctx.read_buffer(OP, &from, 0, 16);
    drop(never);
    assert_eq!(ctx.read_buffer(OP, &from, 0, 0).now_or_never().unwrap().unwrap(), Vec::<u8>::new());
}

#[test]
fn threads_share_a_context() {
    let Some(ctx) = context() else { return };
    std::thread::scope(|scope| {
        for i in 0..8u32 {
            let ctx = &ctx;
            scope.spawn(move || {
                for round in 0..50 {
                    let from = filled(ctx, &[round, i]);
                    let to = add(ctx, Bind::from(&from), 2, i).unwrap();
                    assert_eq!(read(ctx, &to), [round + 7 * i, 8 * i]);
                }
            });
        }
    });
}

#[test]
fn launches_are_timed() {
    let Some(ctx) = context() else { return };
    let from = filled(&ctx, &[0; 1 << 16]);
    let mut passes = Passes::new(&ctx, OP);
    for _ in 0..3 {
        let binds = vec![Bind::from(&from), Bind::from(&from)];
        passes.dispatch(ADD, [1u32 << 16, 0], Grid::new(1024, 64), binds).unwrap();
    }
    let ready = passes.ready().unwrap();
    assert_eq!(ready.stages(), ["add"; 3]);
    let timer = Timer::new(&ctx, 4).unwrap().expect("a driver that times");
    ready.submit(&ctx, OP, Some(&timer)).unwrap();
    let spans = timer.read_blocking().unwrap();
    println!("{spans:?}");
    let start = std::time::Instant::now();
    for _ in 0..1000 {
        let mut passes = Passes::new(&ctx, OP);
        for _ in 0..3 {
            let binds = vec![Bind::from(&from), Bind::from(&from)];
            passes.dispatch(ADD, [64u32, 0], Grid::new(1, 64), binds).unwrap();
        }
        passes.ready().unwrap().run(&ctx, OP).unwrap();
    }
    let submitted = start.elapsed() / 1000;
    let start = std::time::Instant::now();
    let taken: Vec<_> = (0..1000).map(|_| ctx.uninit(OP, 1 << 16).unwrap()).collect();
    println!("host: {submitted:?} for three launches, {:?} for memory", start.elapsed() / 1000);
    drop(taken);
    assert!(spans[..3].iter().all(|span| span.is_some_and(|ns| ns > 0.0)));
    assert_eq!(spans[3], None);
    assert!(matches!(Timer::new(&ctx, 0), Err(Error::Limit { .. })));
}

#[test]
fn inputs_are_packed_or_read_in_place() {
    let Some(ctx) = context() else { return };
    let data: Vec<f32> = (0..60).map(|i| i as f32).collect();
    let view = TensorView::f32(&data, [2, 3, 2, 4]).with_strides([30, 10, 5, 1]);
    let input = stage(&ctx, OP, "x", &view, 1..2, 1..3).unwrap();
    assert_eq!(input.strides, Strides { batch: 16, token: 8, head: 4 });
    assert_eq!((input.alignment, input.strides.narrow(OP).unwrap().token), (16, 8));
    assert!(Strides { batch: 1 << 32, token: 0, head: 0 }.narrow(OP).is_err());
    let to = ctx.buffer(OP, 64).unwrap();
    let mut passes = Passes::new(&ctx, OP);
    passes.copy(input.bind, Bind::from(&to), 64);
    passes.ready().unwrap().run(&ctx, OP).unwrap();
    let expected: Vec<f32> = [40, 45, 50, 55].iter().flat_map(|&at| (at..at + 4).map(|i| i as f32)).collect();
    assert_eq!(bytemuck::pod_collect_to_vec::<u8, f32>(&ctx.read_buffer_blocking(OP, &to, 0, 64).unwrap()), expected);
}

/// Runs `poison` of this file in a process of its own, as a broken context spoils every test of its process.
#[test]
fn a_broken_context_is_told_by_whatever_call_comes_next() {
    if !has_device() {
        return;
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "engine::cuda::tests::poison", "--ignored", "--nocapture"]);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("told by all"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    println!("{text}");
}

#[test]
#[ignore = "run by another test"]
fn poison() {
    let ctx = open(Place::Off);
    let buffer = filled(&ctx, &[1]);
    let mut passes = Passes::new(&ctx, OP);
    passes.dispatch(STORE, (), Grid::new(1, 1), vec![Bind::lent(16)]).unwrap();
    passes.ready().unwrap().run(&ctx, OP).unwrap();
    let lost = |what: &str, result: crate::Result<()>| {
        let error = result.expect_err(what);
        assert!(matches!(error, Error::DeviceLost { .. }) && !error.to_string().contains('\n'), "{what}: {error}");
        println!("{what}: {error}");
    };
    lost("settle", ctx.settle(OP));
    lost("check_alive", ctx.check_alive(OP));
    lost("read", ctx.read_buffer_blocking(OP, &buffer, 0, 4).map(drop));
    lost("uninit", ctx.uninit(OP, 4).map(drop));
    lost("write", ctx.write(OP, &buffer, 0, &[0; 4]));
    lost("kernel", ctx.kernel(OP, &ADD).map(drop));
    lost("warm_up", ctx.warm_up(&[Box::new(ADD)]));
    lost("ready", Passes::new(&ctx, OP).ready().map(drop));
    lost("capture", ctx.capture(|| Ok(())).map(drop));
    lost("timer", Timer::new(&ctx, 1).map(drop));
    let again = Context::open(0, Place::Off).map(drop);
    println!("opening again: {again:?}");
    drop(buffer);
    drop(ctx);
    println!("told by all");
}

/// A second process on the same cache folder; only whole entries may be seen.
#[test]
fn the_folder_is_told() {
    if !has_device() {
        return;
    }
    let ctx = open(Place::Folder("/nowhere/at/all".into()));
    assert_eq!(ctx.cache_folder(), Some(Path::new("/nowhere/at/all")));
    // Nothing can be kept there, which is nobody's concern.
    let from = filled(&ctx, &[1]);
    assert_eq!(read(&ctx, &add(&ctx, Bind::from(&from), 1, 1).unwrap()), [8]);
    assert_eq!(ctx.compiled().len(), 1);
    assert!(ctx.arch().starts_with("sm_"), "{}", ctx.arch());
}
