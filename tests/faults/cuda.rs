//! What only CUDA can do wrong: pointers, contexts, captures. Runs where `SOFTHASH_TEST_DEVICE` names a CUDA device; what
//! needs none (views that go astray) runs everywhere.

use super::*;
use softhash::cudarc::driver::{CudaContext, CudaSlice, DevicePtr};
use softhash::{Race, RaceConfig, RaceOptions, RaceShape, RaceState, Tensor};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

pub(super) fn cuda() -> Option<Device> {
    let name = std::env::var("SOFTHASH_TEST_DEVICE").ok().filter(|name| name.starts_with("cuda"));
    if name.is_none() {
        println!("left out: SOFTHASH_TEST_DEVICE names no CUDA device");
    }
    name.map(|name| Device::by_name(&name).unwrap())
}

pub(super) fn slice(device: &Device, values: &[f32]) -> CudaSlice<f32> {
    device.as_cuda().unwrap().1.clone_htod(values).unwrap()
}

const Q: [usize; 4] = [2, 1, 4, 16];
pub(super) const RACE: RaceShape =
    RaceShape { num_q_heads: 4, num_kv_heads: 2, head_dim: 16, value_dim: 8, dtype: DType::F32 };

pub(super) fn race(device: &Device) -> Race {
    Race::new(device, RaceConfig::default(), RACE).unwrap()
}

/// Values of q, k, v and the gradient of o over `rows` tokens of all sequences.
fn values(rows: usize) -> [Vec<f32>; 4] {
    [wave(rows * 4 * 16), wave(rows * 2 * 16), wave(rows * 2 * 8), wave(rows * 4 * 8)]
}

fn views(values: &[Vec<f32>; 4], batch: usize, tokens: usize) -> [TensorView<'_>; 4] {
    let dims = [(4, 16), (2, 16), (2, 8), (4, 8)];
    std::array::from_fn(|i| TensorView::f32(&values[i], [batch, tokens, dims[i].0, dims[i].1]))
}

/// A state that has seen 20 tokens of one sequence.
pub(super) fn state(race: &mut Race) -> RaceState {
    let values = values(20);
    let [q, k, v, _] = views(&values, 1, 20);
    race.forward(&q, &k, &v, None).unwrap().state
}

/// One token more: what it reads, to the bit.
fn step(race: &mut Race, state: &mut RaceState) -> Vec<u8> {
    let values = values(1);
    let [q, k, v, _] = views(&values, 1, 1);
    race.append(state, &q, &k, &v).unwrap().read_blocking().unwrap().bytes().to_vec()
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    tensor.read_blocking().unwrap().bytes().to_vec()
}

#[test]
fn pointers_and_slices_that_do_not_fit() {
    let Some(device) = cuda() else { return };
    let stream = device.as_cuda().unwrap().1.clone();
    let mut cache = super::cache(&device);
    let good = slice(&device, &wave(128));
    cache.decode(&TensorView::cuda_slice(&good, 0, DType::F32, Q)).unwrap();
    let at = good.device_ptr(&stream).0;
    // SAFETY: refused before anything is read.
    let bare = |pointer, bytes| unsafe { TensorView::cuda_pointer(&device, pointer, bytes, DType::F32, Q) };
    for (view, words) in [
        (bare(0, 512), ["an address", "got null"]),
        (bare(at + 2, 510), ["an address that is a multiple of 4", "got 0x"]),
        (bare(u64::MAX - 3, 512), ["512 bytes below the end of the address space", "got 0xffff"]),
    ] {
        is!(refused(&mut cache, &["decode", "q", words[0], words[1]], |c| c.decode(&view)), Shape);
        let mut race = race(&device);
        let values = values(2);
        let [_, k, v, _] = views(&values, 2, 1);
        let error = race.forward(&view, &k, &v, None).unwrap_err();
        says(&error, &["forward", "q", words[0], words[1]]);
    }
    for (view, has) in [
        (bare(at, 508), "has 127"),
        (bare(at, 0), "has 0"),
        (TensorView::cuda_slice(&good, 4, DType::F32, Q), "has 127"),
        (TensorView::cuda_slice(&good, 1 << 40, DType::F32, Q), "has 0"),
    ] {
        is!(refused(&mut cache, &["decode", "q needs 128 elements", has], |c| c.decode(&view)), OutOfBounds);
    }
    for strides in [[65, 64, 16, 1], [usize::MAX, 64, 16, 1], [64, 64, usize::MAX, 1]] {
        let view = TensorView::cuda_slice(&good, 0, DType::F32, Q).with_strides(strides);
        is!(refused(&mut cache, &["decode", "q needs", "has 128"], |c| c.decode(&view)), OutOfBounds);
    }
    let view = TensorView::cuda_slice(&good, 0, DType::I32, Q);
    is!(refused(&mut cache, &["decode", "q has dtype I32"], |c| c.decode(&view)), DType);
    // Nothing needs no address.
    // SAFETY: there is nothing to read.
    let nothing = unsafe { TensorView::cuda_pointer(&device, 0, 0, DType::F32, [2, 0, 4, 16]) };
    assert_eq!(cache.decode(&nothing).unwrap().o.shape(), [2, 0, 4, 8]);
}

/// Another device of each kind that is there, with a name.
fn others() -> Vec<(&'static str, Device)> {
    let mut others = vec![("cpu", Device::cpu())];
    let context = CudaContext::new_non_primary(0, 0).unwrap();
    others.push(("another context", Device::from_cuda(context.new_stream().unwrap()).unwrap()));
    #[cfg(feature = "wgpu")]
    match ["nvidia", "llvmpipe"].into_iter().find_map(|name| Device::by_name(name).ok()) {
        Some(device) => others.push(("wgpu", device)),
        None => println!("left out: no wgpu adapter"),
    }
    others
}

#[test]
fn two_devices_do_not_mix() {
    let Some(device) = cuda() else { return };
    let mut all = others();
    all.push(("cuda", device));
    for (here, at_home) in &all {
        for (there, abroad) in all.iter().filter(|(there, _)| there != here) {
            println!("{there} to {here}");
            // Results of one are inputs of the other. The CPU's are host memory, which every device takes.
            let q = wave(128);
            let foreign = super::cache(abroad).decode(&TensorView::f32(&q, Q)).unwrap();
            let mut cache = super::cache(at_home);
            if *there != "cpu" {
                let (o, lse) = (foreign.o.view().unwrap(), foreign.lse.view().unwrap());
                let error = merge_state(at_home, &o, &lse, &o, &lse).unwrap_err();
                says(&error, &["merge_state", "lives on", "runs on"]);
                is!(error, WrongDevice);
                let k = abroad_tensor(abroad, &foreign.o, [2, 1, 2, 16]);
                let v = abroad_tensor(abroad, &foreign.o, [2, 1, 2, 8]);
                if let (Some(k), Some(v)) = (k.as_ref().and_then(Tensor::view), v.as_ref().and_then(Tensor::view)) {
                    let words = ["append", "lives on", "runs on"];
                    is!(refused(&mut cache, &words, |c| c.append(&k, &v)), WrongDevice);
                    let mut race = race(at_home);
                    let values = values(2);
                    let [q, host_k, _, _] = views(&values, 2, 1);
                    let error = race.forward(&q, &host_k, &v, None).unwrap_err();
                    says(&error, &["forward", "lives on", "runs on"]);
                    is!(error, WrongDevice);
                }
            }
            // States.
            let mut stranger = race(abroad);
            let mut foreign = state(&mut stranger);
            let mut race = race(at_home);
            let mut own = state(&mut race);
            let values = values(1);
            let [q, k, v, grad_o] = views(&values, 1, 1);
            let gradients = stranger.backward(&q, &k, &v, &grad_o, None, None, &RaceOptions::default()).unwrap();
            let gradient = gradients.d_initial_state;
            for (op, error) in [
                ("fork", race.fork(&foreign).unwrap_err()),
                ("append", race.append(&mut foreign, &q, &k, &v).unwrap_err()),
                ("fork", race.forward(&q, &k, &v, Some(&foreign)).unwrap_err()),
                ("read_state", race.read_state(&foreign).unwrap_err()),
                ("read_state_gradient", race.read_state_gradient(&gradient).unwrap_err()),
                ("backward", {
                    let none = RaceOptions::default();
                    race.backward(&q, &k, &v, &grad_o, None, Some(&gradient), &none).unwrap_err()
                }),
            ] {
                says(&error, &[op, "lives on", "runs on"]);
                is!(error, WrongDevice);
            }
            // Both go on.
            assert_eq!((foreign.tokens(0), own.tokens(0)), (Some(20), Some(20)));
            step(&mut race, &mut own);
            step(&mut stranger, &mut foreign);
        }
    }
}

/// A tensor on a device, in the memory of `result` or in its own.
fn abroad_tensor(device: &Device, result: &Tensor, shape: [usize; 4]) -> Option<Tensor> {
    let values = wave(shape.iter().product());
    if device.as_cuda().is_some() {
        return Some(Tensor::from_cuda_slice(device, slice(device, &values), DType::F32, shape).unwrap());
    }
    #[cfg(feature = "wgpu")]
    if device.as_wgpu().is_some() {
        let buffer = result.as_buffer()?.clone();
        return Tensor::from_buffer(device, buffer, DType::F32, shape).ok();
    }
    let _ = result;
    None
}

#[test]
fn nothing_and_too_much_for_race() {
    let Some(device) = cuda() else { return };
    let mut race = race(&device);
    let empty = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    for (batch, tokens) in [(0, 5), (3, 0), (0, 0)] {
        let [q, k, v, grad_o] = views(&empty, batch, tokens);
        let output = race.forward(&q, &k, &v, None).unwrap();
        assert_eq!(output.o.shape(), [batch, tokens, 4, 8]);
        assert!(bytes(&output.o).is_empty());
        let gradients = race.backward(&q, &k, &v, &grad_o, None, None, &RaceOptions::default()).unwrap();
        assert!(bytes(&gradients.dq).is_empty());
        assert!(gradients.d_planes.read_blocking().unwrap().to_f32().iter().all(|&x| x == 0.0));
    }
    // A sequence of no tokens beside one of some; padding reads zero.
    let values = values(6);
    let [q, k, v, _] = views(&values, 2, 3);
    let options = RaceOptions { lengths: Some(vec![0, 2]), ..Default::default() };
    let output = race.forward_with(&q, &k, &v, None, &options).unwrap();
    let o = output.o.read_blocking().unwrap().to_f32();
    let is_zero: Vec<_> = o.chunks(32).map(|row| row.iter().all(|&x| x == 0.0)).collect();
    assert_eq!(is_zero, [true, true, true, false, false, true]);
    assert_eq!((output.state.tokens(0), output.state.tokens(1)), (Some(0), Some(2)));
    // No product of sizes wraps around.
    let row = slice(&device, &wave(256));
    let many = |heads, dim| {
        TensorView::cuda_slice(&row, 0, DType::F32, [1 << 20, 1 << 30, heads, dim]).with_strides([0, 0, dim, 1])
    };
    let error = race.forward(&many(4, 16), &many(2, 16), &many(2, 8), None).map(drop).unwrap_err();
    println!("{error}");
    is!(error, OutOfMemory);
    step(&mut race, &mut state_of(&device));
}

fn state_of(device: &Device) -> RaceState {
    state(&mut race(device))
}

#[test]
fn captures_that_go_wrong_leave_everything_whole() {
    let Some(device) = cuda() else { return };
    let stream = device.as_cuda().unwrap().1.clone();
    let on_device = slice(&device, &wave(128));
    let q = TensorView::cuda_slice(&on_device, 0, DType::F32, Q);
    let (k, v) = (slice(&device, &wave(64)), slice(&device, &wave(32)));
    let (k, v) = (
        TensorView::cuda_slice(&k, 0, DType::F32, [2, 1, 2, 16]),
        TensorView::cuda_slice(&v, 0, DType::F32, [2, 1, 2, 8]),
    );
    let mut eager = super::cache(&device);
    let want = bytes(&eager.decode(&q).unwrap().o);
    eager.append(&k, &v).unwrap();
    let want_after = bytes(&eager.decode(&q).unwrap().o);

    // Cold: scratch memory grows, and what has to be zero is zero, whether the graph is launched or not.
    let mut cache = super::cache(&device);
    drop(device.capture(|| cache.decode(&q)).unwrap());
    assert_eq!(bytes(&cache.decode(&q).unwrap().o), want);
    let mut cache = super::cache(&device);
    let (mut graph, attended) = device.capture(|| cache.decode(&q)).unwrap();
    graph.launch().unwrap();
    assert_eq!(bytes(&attended.o), want);
    assert_eq!(bytes(&cache.decode(&q).unwrap().o), want);

    // An append that needs pages, captured and never launched: tokens are counted, and what comes later is right.
    let mut cache = super::cache(&device);
    let fill = |cache: &mut SocketCache, upto: usize| {
        while cache.len(1).unwrap() < upto {
            cache.append(&k, &v).unwrap();
        }
    };
    let mut other = super::cache(&device);
    fill(&mut cache, 64);
    fill(&mut other, 64);
    assert_eq!((cache.len(0), cache.len(1)), (Some(114), Some(64)));
    drop(device.capture(|| cache.append(&k, &v)).unwrap());
    assert_eq!((cache.len(0), cache.len(1)), (Some(115), Some(65)));
    for (sequence, len) in [(0, 114), (1, 64)] {
        cache.truncate(sequence, len).unwrap();
    }
    fill(&mut cache, 140);
    fill(&mut other, 140);
    assert_eq!(bytes(&cache.decode(&q).unwrap().o), bytes(&other.decode(&q).unwrap().o));

    // Refused in the middle, and everything as before; what was captured before the refusal never runs.
    let mut cache = super::cache(&device);
    let host = wave(128);
    let host = TensorView::f32(&host, Q);
    let words = ["decode", "while a CUDA graph is captured"];
    is!(refused(&mut cache, &words, |c| device.capture(|| c.decode(&host)).map(drop)), Unsupported);
    is!(refused(&mut cache, &["fork", "captured"], |c| device.capture(|| c.fork(0)).map(drop)), Unsupported);
    let words = ["read", "captured"];
    let act = |c: &mut SocketCache| device.capture(|| c.decode(&q)?.o.read_blocking()).map(drop);
    is!(refused(&mut cache, &words, act), Unsupported);
    let words = ["capture", "another capture cannot begin"];
    let act = |c: &mut SocketCache| device.capture(|| device.capture(|| c.decode(&q)).map(drop)).map(drop);
    is!(refused(&mut cache, &words, act), Unsupported);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        device.capture(|| -> softhash::Result<()> {
            cache.decode(&q)?;
            panic!("planted")
        })
    }));
    assert!(panicked.is_err());
    assert_eq!(bytes(&cache.decode(&q).unwrap().o), want);

    // A graph outlives its cache, and does not mind what becomes of the pages.
    let (mut graph, attended) = device.capture(|| cache.decode(&q)).unwrap();
    graph.launch().unwrap();
    assert_eq!(bytes(&attended.o), want);
    cache.append(&k, &v).unwrap();
    graph.launch().unwrap();
    assert_eq!(bytes(&attended.o), want);
    assert_eq!(bytes(&cache.decode(&q).unwrap().o), want_after);
    cache.truncate(0, 3).unwrap();
    cache.truncate(1, 0).unwrap();
    graph.launch().unwrap();
    cache.decode(&q).unwrap();
    cache.remove(1).unwrap();
    graph.launch().unwrap();
    drop(cache);
    // Others take what memory is free.
    let others: Vec<_> = (0..20).map(|_| super::cache(&device)).collect();
    graph.launch().unwrap();
    stream.synchronize().unwrap();
    drop((graph, attended, others));

    // RACE: a step captured cold and never launched, then steps.
    let mut fresh = race(&device);
    let mut fresh_state = state(&mut fresh);
    let want = [(); 3].map(|()| step(&mut fresh, &mut fresh_state));
    let mut race = race(&device);
    let mut own = state(&mut race);
    let values = values(1);
    let slices = values.each_ref().map(|values| slice(&device, values));
    let dims = [(4, 16), (2, 16), (2, 8), (4, 8)];
    let [q, k, v, _] =
        std::array::from_fn(|i| TensorView::cuda_slice(&slices[i], 0, DType::F32, [1, 1, dims[i].0, dims[i].1]));
    let mut forked = race.fork(&own).unwrap();
    drop(device.capture(|| race.append(&mut forked, &q, &k, &v)).unwrap());
    assert_eq!([(); 3].map(|()| step(&mut race, &mut own)), want);
    let host = views(&values, 1, 1);
    let before = (own.tokens(0), race.read_state(&own).unwrap());
    let error = device.capture(|| race.append(&mut own, &host[0], &host[1], &host[2])).map(drop).unwrap_err();
    is!(error, Unsupported);
    let error = device.capture(|| race.read_state(&own)).map(drop).unwrap_err();
    is!(error, Unsupported);
    assert_eq!((own.tokens(0), race.read_state(&own).unwrap()), before);
}

/// Runs a test of this file alone in a process of its own, with a time limit.
pub fn run_alone(name: &str, set: &[(&str, &str)]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture", "--test-threads", "1"]);
    command.envs(set.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let start = Instant::now();
    // What it prints fits the pipes.
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(100) {
            child.kill().unwrap();
            let output = child.wait_with_output().unwrap();
            panic!("{name} hangs: {output:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

pub fn texts(output: &Output) -> [String; 2] {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned())
}

/// A broken context spoils every test of its process, so it has one of its own.
#[test]
fn a_lost_context_is_told_by_every_call() {
    if cuda().is_none() {
        return;
    }
    let output = run_alone("cuda::a_wild_pointer", &[]);
    let [out, err] = texts(&output);
    println!("{out}");
    assert!(output.status.success() && out.contains("told by all") && !err.contains("panicked"), "{out}\n{err}");
}

#[test]
#[ignore = "run by a_lost_context_is_told_by_every_call"]
fn a_wild_pointer() {
    let device = cuda().unwrap();
    let others: Vec<_> = others().into_iter().filter(|(name, _)| *name != "another context").collect();
    let mut elsewhere: Vec<_> = others.iter().map(|(name, device)| (*name, super::cache(device))).collect();
    let before: Vec<_> = elsewhere.iter_mut().map(|(_, cache)| seen(cache)).collect();

    let mut lost = super::cache(&device);
    let q = wave(128);
    let q = TensorView::f32(&q, Q);
    let computed = lost.decode(&q).unwrap();
    let resident = slice(&device, &wave(128));
    let (mut graph, captured) = {
        let q = TensorView::cuda_slice(&resident, 0, DType::F32, Q);
        device.capture(|| lost.decode(&q)).unwrap()
    };
    let timer = device.cuda_timer(2).unwrap().unwrap();
    timer.start(0).unwrap();
    let mut race = race(&device);
    let mut own = state(&mut race);
    let parts = race.read_state(&own).unwrap();

    // SAFETY: none: there is no memory, and that is the test.
    let wild = unsafe { TensorView::cuda_pointer(&device, 1 << 20, 512, DType::F32, Q) };
    let first = lost.decode(&wild).and_then(|attended| attended.o.read_blocking().map(drop)).unwrap_err();
    println!("first: {first}");
    is!(first, DeviceLost);
    let (k, v) = (wave(64), wave(32));
    let (k, v) = (TensorView::f32(&k, [2, 1, 2, 16]), TensorView::f32(&v, [2, 1, 2, 8]));
    let values = values(1);
    let [rq, rk, rv, rg] = views(&values, 1, 1);
    let path = std::env::temp_dir().join(format!("softhash-lost-cuda-{}", std::process::id()));
    let none = RaceOptions::default();
    let lse = computed.lse.view().unwrap();
    let o = computed.o.view().unwrap();
    let errors = [
        ("append", lost.append(&k, &v).unwrap_err()),
        ("decode", lost.decode(&q).map(drop).unwrap_err()),
        ("decode", lost.dense_decode(&q).map(drop).unwrap_err()),
        ("prefill", lost.prefill(&q).map(drop).unwrap_err()),
        ("reserve", lost.reserve(10_000).unwrap_err()),
        ("fork", lost.fork(0).map(drop).unwrap_err()),
        ("", lost.profile_with(&q, &DecodeOptions::default()).map(drop).unwrap_err()),
        ("read", computed.o.read_blocking().map(drop).unwrap_err()),
        ("", lost.to_bytes().map(drop).unwrap_err()),
        ("", lost.save_to(&path).unwrap_err()),
        ("", lost.non_finite_seen().map(drop).unwrap_err()),
        ("merge_state", merge_state(&device, &o, &lse, &o, &lse).map(drop).unwrap_err()),
        ("launch graph", graph.launch().unwrap_err()),
        ("capture", device.capture(|| Ok(())).map(drop).unwrap_err()),
        ("timer", timer.stop(0).unwrap_err()),
        ("timer", timer.read_blocking().map(drop).unwrap_err()),
        ("timer", device.cuda_timer(1).map(drop).unwrap_err()),
        ("into_cuda_slice", captured.lse.into_cuda_slice::<f32>().map(drop).unwrap_err()),
        ("new", SocketCache::new(&device, config(), SHAPE, 1).map(drop).unwrap_err()),
        ("new", Race::new(&device, RaceConfig::default(), RACE).map(drop).unwrap_err()),
        ("", race.forward(&rq, &rk, &rv, None).map(drop).unwrap_err()),
        ("append", race.append(&mut own, &rq, &rk, &rv).map(drop).unwrap_err()),
        ("", race.backward(&rq, &rk, &rv, &rg, None, None, &none).map(drop).unwrap_err()),
        ("new_state", race.new_state(1).map(drop).unwrap_err()),
        ("fork", race.fork(&own).map(drop).unwrap_err()),
        ("read_state", race.read_state(&own).map(drop).unwrap_err()),
        ("write_state", race.write_state(&parts, &[0]).map(drop).unwrap_err()),
        ("warm_up", race.warm_up(DType::F16).unwrap_err()),
        ("warm_up", lost.warm_up(DType::F16, DType::F16).unwrap_err()),
        // Not even anew: the driver keeps the error for as long as the process lives.
        ("open device", Device::cuda(0).map(drop).unwrap_err()),
        ("open device", Device::by_name("cuda").map(drop).unwrap_err()),
    ];
    for (op, error) in errors {
        println!("{error}");
        says(&error, &[op, "device is lost", "until this process ends"]);
        is!(error, DeviceLost);
    }
    assert!(!path.exists(), "nothing is written of a lost cache");
    assert_eq!((lost.len(0), lost.len(1), own.tokens(0)), (Some(90), Some(40), Some(20)));
    println!("{}", device.report());
    device.trim();
    assert!(Device::enumerate().iter().any(|adapter| adapter.name.starts_with("cuda:0")));
    drop((graph, timer, computed, race, own, resident));
    drop(lost);
    drop(device);
    println!("all dropped");
    for ((name, cache), before) in elsewhere.iter_mut().zip(before) {
        assert!(seen(cache) == before, "{name}");
        println!("{name} goes on");
    }
    println!("told by all");
}

/// Views of CUDA memory on devices that have none.
#[test]
fn cuda_memory_means_nothing_elsewhere() {
    // Without wgpu neither is found.
    let adapter = ["llvmpipe", "nvidia"].into_iter().find_map(|name| Device::by_name(name).ok());
    for device in std::iter::once(Device::cpu()).chain(adapter) {
        let mut cache = super::cache(&device);
        // SAFETY: refused before anything is read.
        let view = |shape| unsafe { TensorView::cuda_pointer(&device, 1 << 20, 1 << 20, DType::F32, shape) };
        let (k, v) = (view([2, 1, 2, 16]), view([2, 1, 2, 8]));
        is!(refused(&mut cache, &["append", "lives on"], |c| c.append(&k, &v)), WrongDevice);
        is!(refused(&mut cache, &["decode", "lives on"], |c| c.decode(&view(Q))), WrongDevice);
        let (o, lse) = (view([2, 1, 4, 8]), view([2, 1, 4, 1]));
        is!(merge_state(&device, &o, &lse, &o, &lse).unwrap_err(), WrongDevice);
        let mut race = race(&device);
        let values = values(2);
        let [q, k, _, _] = views(&values, 2, 1);
        is!(race.forward(&q, &k, &v, None).map(drop).unwrap_err(), WrongDevice);
        let error = Tensor::from_f32(vec![0.0], [1; 4]).unwrap().into_cuda_slice::<f32>().unwrap_err();
        is!(error, WrongDevice);
    }
}
