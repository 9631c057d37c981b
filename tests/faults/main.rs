//! Bad input through the public interface: every refusal names the operation, the value and the limit, and leaves the
//! cache as it was.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/device.rs"]
mod device;
#[cfg(feature = "wgpu")]
#[path = "../common/instance.rs"]
mod instance;

use half::{bf16, f16};
use softhash::{
    Budget, CacheShape, DType, DecodeOptions, Device, Error, Hyperplanes, Mode, SocketCache, SocketConfig, Temperature,
    TensorView, merge_state,
};

/// Runs each check on the CPU and on a GPU.
macro_rules! on_each_device {
    ($($check:ident),* $(,)?) => {
        mod cpu {
            $(#[test] fn $check() { super::$check(&softhash::Device::cpu()); })*
        }
        #[cfg(feature = "wgpu")]
        mod gpu {
            $(#[test] fn $check() { super::$check(&crate::device::gpu()); })*
        }
    };
}

on_each_device!(
    configurations_out_of_range,
    shapes_that_do_not_fit,
    tensors_of_the_wrong_shape,
    tensors_of_the_wrong_dtype,
    views_outside_their_slice,
    nan_and_infinity,
    token_counts_that_do_not_fit,
    sequences_that_do_not_exist,
    options_out_of_range,
    more_than_the_device_holds,
    nothing_at_all,
    budgets_of_zero,
    merges_that_do_not_fit,
    damaged_files,
);

const SHAPE: CacheShape = CacheShape { num_q_heads: 4, num_kv_heads: 2, head_dim: 16, value_dim: 8, dtype: DType::F32 };

fn config() -> SocketConfig {
    SocketConfig { tables: 6, planes: 4, sink: 2, window: 2, budget: Budget::Tokens(8), ..SocketConfig::paper() }
}

fn wave(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.37).sin()).collect()
}

/// Two sequences of 90 and 40 tokens.
fn cache(device: &Device) -> SocketCache {
    let mut cache = SocketCache::with_page_tokens(device, config(), SHAPE, 2, 64).unwrap();
    let (k, v) = (wave(2 * 90 * 2 * 16), wave(2 * 90 * 2 * 8));
    let (k, v) = (TensorView::f32(&k, [2, 90, 2, 16]), TensorView::f32(&v, [2, 90, 2, 8]));
    cache.append_ragged(&k, &v, &[90, 40]).unwrap();
    cache
}

/// Everything that can be seen of a cache.
fn seen(cache: &mut SocketCache) -> (Vec<u8>, Vec<Vec<u8>>) {
    let saved = cache.to_bytes().unwrap();
    let q = wave(cache.sequences() * 4 * 16);
    let q = TensorView::f32(&q, [cache.sequences(), 1, 4, 16]);
    let mut results = Vec::new();
    for mode in [Mode::Sparse, Mode::Dense] {
        let attended = cache.decode_with(&q, &DecodeOptions { mode, ..Default::default() }).unwrap();
        for tensor in [attended.o, attended.lse] {
            results.push(tensor.read_blocking().unwrap().bytes().to_vec());
        }
    }
    (saved, results)
}

const RESULTS: [&str; 4] = ["sparse o", "sparse lse", "dense o", "dense lse"];

/// Asserts that `act` is refused with all `words` in its message, and that the cache is none the worse.
#[track_caller]
fn refused<T>(
    cache: &mut SocketCache,
    words: &[&str],
    act: impl FnOnce(&mut SocketCache) -> softhash::Result<T>,
) -> Error {
    let before = seen(cache);
    let Err(error) = act(cache) else { panic!("not refused; expected an error with {words:?}") };
    says(&error, words);
    let after = seen(cache);
    assert!(after.0 == before.0, "what would be saved changed under {error}");
    for (what, (after, before)) in RESULTS.iter().zip(after.1.iter().zip(&before.1)) {
        assert_eq!(after, before, "{what} changed under {error}");
    }
    error
}

#[track_caller]
fn says(error: &Error, words: &[&str]) {
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
}

/// The variant of an error, asserted.
macro_rules! is {
    ($error:expr, $variant:ident) => {{
        let error = $error;
        assert!(matches!(error, Error::$variant { .. }), "{error:?}");
    }};
}

fn configurations_out_of_range(device: &Device) {
    type Edit = fn(&mut SocketConfig);
    let cases: &[(&[&str], Edit)] = &[
        (&["tables = 0", "1 to 1024"], |c| c.tables = 0),
        (&["tables = 1025", "1 to 1024"], |c| c.tables = 1025),
        (&["tables = 0", "1 to 1024"], |c| *c = SocketConfig::sign_projection(100)),
        (&["planes = 0", "1 to 16"], |c| c.planes = 0),
        (&["planes = 17", "1 to 16"], |c| c.planes = 17),
        (&["tables * planes = 16384", "1 to 8192"], |c| (c.tables, c.planes) = (1024, 16)),
        (&["temperature (beta) = 0", "positive"], |c| c.temperature = Temperature::Beta(0.0)),
        (&["temperature (beta) = inf", "finite"], |c| c.temperature = Temperature::Beta(f32::INFINITY)),
        (&["temperature (tau) = -1", "positive"], |c| c.temperature = Temperature::Tau(-1.0)),
        (&["temperature (tau) = NaN", "finite"], |c| c.temperature = Temperature::Tau(f32::NAN)),
        (&["budget (ratio) = 0", "above 0 and at most 1"], |c| c.budget = Budget::Ratio(0.0)),
        (&["budget (ratio) = 1.5", "above 0 and at most 1"], |c| c.budget = Budget::Ratio(1.5)),
        (&["budget (ratio) = NaN", "above 0 and at most 1"], |c| c.budget = Budget::Ratio(f32::NAN)),
        (&["budget (tokens) = 1073741825", "0 to 1073741824"], |c| c.budget = Budget::Tokens((1 << 30) + 1)),
        (&["budget (tokens) = 0", "sink and window are 0"], |c| {
            (c.budget, c.sink, c.window) = (Budget::Tokens(0), 0, 0);
        }),
        (&["sink = 18446744073709551615", "0 to 1073741824"], |c| c.sink = usize::MAX),
        (&["window = 1073741825", "0 to 1073741824"], |c| c.window = (1 << 30) + 1),
        (&["center = 0", "1 to 1048576"], |c| c.center = Some(0)),
        (&["center = 1048577", "1 to 1048576"], |c| c.center = Some((1 << 20) + 1)),
        (&["hyperplanes = Supplied of 5 values", "384 values", "2 kv heads"], |c| {
            c.hyperplanes = Hyperplanes::Supplied(vec![1.0; 5].into());
        }),
        (&["hyperplanes = NaN", "value 383 must be finite"], |c| {
            let mut rows = vec![1.0; 384];
            rows[383] = f32::NAN;
            c.hyperplanes = Hyperplanes::Supplied(rows.into());
        }),
    ];
    for (words, edit) in cases {
        let mut config = config();
        edit(&mut config);
        let error = SocketCache::new(device, config, SHAPE, 1).expect_err(words[0]);
        says(&error, words);
        is!(error, Config);
    }
}

fn shapes_that_do_not_fit(device: &Device) {
    type Edit = fn(&mut CacheShape);
    let cases: &[(&[&str], Edit)] = &[
        (&["num_q_heads = 5", "multiple of num_kv_heads = 2"], |s| s.num_q_heads = 5),
        (&["num_q_heads = 1", "multiple of num_kv_heads = 2"], |s| s.num_q_heads = 1),
        (&["num_q_heads = 0", "1 to 1024"], |s| s.num_q_heads = 0),
        (&["num_kv_heads = 0", "1 to 1024"], |s| s.num_kv_heads = 0),
        (&["num_kv_heads = 1025", "1 to 1024"], |s| s.num_kv_heads = 1025),
        (&["head_dim = 0", "1 to 512"], |s| s.head_dim = 0),
        (&["head_dim = 513", "1 to 512"], |s| s.head_dim = 513),
        (&["value_dim = 0", "1 to 512"], |s| s.value_dim = 0),
        (&["value_dim = 18446744073709551615", "1 to 512"], |s| s.value_dim = usize::MAX),
        (&["dtype = I32", "F32, F16 or Bf16"], |s| s.dtype = DType::I32),
    ];
    for (words, edit) in cases {
        let mut shape = SHAPE;
        edit(&mut shape);
        let error = SocketCache::new(device, config(), shape, 1).expect_err(words[0]);
        says(&error, words);
        is!(error, Config);
    }
    for page_tokens in [0, 32, 96, 1 << 17, usize::MAX] {
        let error = SocketCache::with_page_tokens(device, config(), SHAPE, 1, page_tokens).unwrap_err();
        says(&error, &[&format!("page_tokens = {page_tokens}"), "power of two from 64 to 65536"]);
        is!(error, Config);
    }
    for sequences in [65537, usize::MAX] {
        let error = SocketCache::new(device, config(), SHAPE, sequences).unwrap_err();
        says(&error, &["new", &format!("sequences = {sequences}"), "65536"]);
        is!(error, Limit);
    }
}

fn tensors_of_the_wrong_shape(device: &Device) {
    let mut cache = cache(device);
    let data = wave(4096);
    let view = |shape| TensorView::f32(&data, shape);
    let (k, v) = ([2, 3, 2, 16], [2, 3, 2, 8]);
    for (k, v, words) in [
        ([1, 3, 2, 16], v, ["k has shape [1, 3, 2, 16]", "[2, 3, 2, 16]"]),
        ([2, 3, 4, 16], v, ["k has shape [2, 3, 4, 16]", "[2, 3, 2, 16]"]),
        ([2, 3, 2, 8], v, ["k has shape [2, 3, 2, 8]", "[2, 3, 2, 16]"]),
        ([2, 3, 2, 0], v, ["k has shape [2, 3, 2, 0]", "[2, 3, 2, 16]"]),
        (k, [3, 3, 2, 8], ["v has shape [3, 3, 2, 8]", "[2, 3, 2, 8]"]),
        (k, [2, 2, 2, 8], ["v has shape [2, 2, 2, 8]", "[2, 3, 2, 8]"]),
        (k, [2, 3, 1, 8], ["v has shape [2, 3, 1, 8]", "[2, 3, 2, 8]"]),
        (k, [2, 3, 2, 16], ["v has shape [2, 3, 2, 16]", "[2, 3, 2, 8]"]),
    ] {
        let error = refused(&mut cache, &["append", words[0], words[1]], |c| c.append(&view(k), &view(v)));
        is!(error, Shape);
    }
    let error = refused(&mut cache, &["append", "k has shape [2, 3, 2, 16]", "[1, 3, 2, 16]"], |c| {
        c.append_to(1, &view(k), &view(v))
    });
    is!(error, Shape);
    for shape in [[1, 1, 4, 16], [2, 1, 2, 16], [2, 1, 5, 16], [2, 1, 4, 8], [2, 1, 0, 16]] {
        let words = [format!("q has shape {shape:?}"), "[2, any, 4, 16]".into()];
        for op in ["decode", "prefill"] {
            let error = refused(&mut cache, &[op, &words[0], &words[1]], |c| match op {
                "decode" => c.decode(&view(shape)),
                _ => c.prefill(&view(shape)),
            });
            is!(error, Shape);
        }
    }
    // Rows may lie anywhere; the channels of a row must lie side by side.
    let strided = view(k).with_strides([96, 32, 16, 2]);
    let error =
        refused(&mut cache, &["append", "channel stride of 1", "[96, 32, 16, 2]"], |c| c.append(&strided, &view(v)));
    is!(error, Shape);
}

fn tensors_of_the_wrong_dtype(device: &Device) {
    let mut cache = cache(device);
    let (full, half, brain) = (wave(256), vec![f16::ONE; 256], vec![bf16::ONE; 256]);
    let (k, v) = ([2, 1, 2, 16], [2, 1, 2, 8]);
    let error = refused(&mut cache, &["append", "k has dtype F16", "F32, the cache's"], |c| {
        c.append(&TensorView::f16(&half, k), &TensorView::f32(&full, v))
    });
    is!(error, DType);
    let error = refused(&mut cache, &["append", "v has dtype Bf16", "F32, the cache's"], |c| {
        c.append(&TensorView::f32(&full, k), &TensorView::bf16(&brain, v))
    });
    is!(error, DType);
    // q may be of another float type than the cache.
    cache.decode(&TensorView::f16(&half, [2, 1, 4, 16])).unwrap();
    let q = TensorView::f32(&full, [2, 1, 4, 16]);
    let options = DecodeOptions { output: Some(DType::I32), ..Default::default() };
    let error =
        refused(&mut cache, &["decode", "o has dtype I32", "F32, F16 or Bf16"], |c| c.decode_with(&q, &options));
    is!(error, DType);
}

fn views_outside_their_slice(device: &Device) {
    let mut cache = cache(device);
    let data = wave(256);
    let view = |n: usize, shape| TensorView::f32(&data[..n], shape);
    let (k, v, q) = ([2, 1, 2, 16], [2, 1, 2, 8], [2, 1, 4, 16]);
    let error =
        refused(&mut cache, &["append", "k needs 64 elements", "has 63"], |c| c.append(&view(63, k), &view(32, v)));
    is!(error, OutOfBounds);
    let error =
        refused(&mut cache, &["append", "v needs 32 elements", "has 0"], |c| c.append(&view(64, k), &view(0, v)));
    is!(error, OutOfBounds);
    let error = refused(&mut cache, &["decode", "q needs 128 elements", "has 127"], |c| c.decode(&view(127, q)));
    is!(error, OutOfBounds);
    for (strides, needed) in [
        ([1000, 32, 16, 1], "k needs 1032 elements"),
        ([usize::MAX, 32, 16, 1], "k needs 18446744073709551615 elements"),
        ([32, 32, usize::MAX, 1], "k needs 18446744073709551615 elements"),
    ] {
        let k = view(256, k).with_strides(strides);
        let error = refused(&mut cache, &["append", needed, "has 256"], |c| c.append(&k, &view(32, v)));
        is!(error, OutOfBounds);
    }
    // A stride of 0 repeats rows without storage: allowed, but not without end.
    let endless = |dim| TensorView::f32(&data, [2, 1 << 40, 2, dim]).with_strides([0, 0, 0, 1]);
    let words = ["append", "tokens", "= 1099511627776", "limit of 1073741824"];
    let error = refused(&mut cache, &words, |c| c.append(&endless(16), &endless(8)));
    is!(error, Limit);
    let q = TensorView::f32(&data, [2, 1 << 40, 4, 16]).with_strides([0, 0, 0, 1]);
    let words = ["prefill", "tokens", "= 1099511627776", "limit of 1073741824"];
    let error = refused(&mut cache, &words, |c| c.prefill(&q));
    is!(error, Limit);
}

fn nan_and_infinity(device: &Device) {
    let mut cache = cache(device);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let (mut k, mut v, mut q) = (wave(2 * 3 * 2 * 16), wave(2 * 3 * 2 * 8), wave(2 * 2 * 4 * 16));
        let good = (k.clone(), v.clone());
        // The last element of all, and one in the middle.
        k[191] = bad;
        v[2 * 8 + 8 + 5] = bad;
        q[64 + 2 * 16 + 7] = bad;
        let (ks, vs) = ([2, 3, 2, 16], [2, 3, 2, 8]);
        let error = refused(&mut cache, &["append", "k holds a NaN or infinite value", "[1, 2, 1, 15]"], |c| {
            c.append(&TensorView::f32(&k, ks), &TensorView::f32(&good.1, vs))
        });
        is!(error, NonFinite);
        let error = refused(&mut cache, &["append", "v holds a NaN or infinite value", "[0, 1, 1, 5]"], |c| {
            c.append(&TensorView::f32(&good.0, ks), &TensorView::f32(&v, vs))
        });
        is!(error, NonFinite);
        for op in ["decode", "prefill"] {
            let words = [op, "q holds a NaN or infinite value", "[0, 1, 2, 7]"];
            let q = TensorView::f32(&q, [2, 2, 4, 16]);
            let error = refused(&mut cache, &words, |c| if op == "decode" { c.decode(&q) } else { c.prefill(&q) });
            is!(error, NonFinite);
        }
    }
    let mut half = vec![f16::ONE; 128];
    half[127] = f16::NAN;
    let words = ["decode", "q holds a NaN or infinite value", "[1, 0, 3, 15]"];
    let error = refused(&mut cache, &words, |c| c.decode(&TensorView::f16(&half, [2, 1, 4, 16])));
    is!(error, NonFinite);
    let mut brain = vec![bf16::ONE; 128];
    brain[0] = bf16::NEG_INFINITY;
    let words = ["decode", "q holds a NaN or infinite value", "[0, 0, 0, 0]"];
    let error = refused(&mut cache, &words, |c| c.decode(&TensorView::bf16(&brain, [2, 1, 4, 16])));
    is!(error, NonFinite);
    // Huge finite values are no error, and make no NaN as long as a dot product does not overflow.
    let before = seen(&mut cache);
    let q = vec![1e30; 2 * 4 * 16];
    let attended = cache.decode(&TensorView::f32(&q, [2, 1, 4, 16])).unwrap();
    let o = attended.o.read_blocking().unwrap().to_f32();
    assert!(o.iter().all(|x| x.is_finite()), "{o:?}");
    // Where it does, only that result suffers.
    let q = vec![f32::MAX; 2 * 4 * 16];
    cache.decode(&TensorView::f32(&q, [2, 1, 4, 16])).unwrap();
    assert!(seen(&mut cache) == before);
    assert_eq!(cache.non_finite_seen().unwrap(), 0);
}

fn token_counts_that_do_not_fit(device: &Device) {
    let mut cache = cache(device);
    let (k, v) = (wave(2 * 3 * 2 * 16), wave(2 * 3 * 2 * 8));
    let (k, v) = (TensorView::f32(&k, [2, 3, 2, 16]), TensorView::f32(&v, [2, 3, 2, 8]));
    for counts in [&[][..], &[3], &[3, 3, 3], &[3, 4], &[usize::MAX, 0]] {
        let words = ["append", &format!("counts has shape {counts:?}"), "2 values of at most 3"];
        let error = refused(&mut cache, &words, |c| c.append_ragged(&k, &v, counts));
        is!(error, Shape);
    }
    for (len, held) in [(91, 90), (usize::MAX, 90)] {
        let words = ["truncate", &format!("tokens to keep = {len}"), &format!("limit of {held}")];
        let error = refused(&mut cache, &words, |c| c.truncate(0, len));
        is!(error, Limit);
    }
}

fn sequences_that_do_not_exist(device: &Device) {
    let mut cache = cache(device);
    let (k, v) = (wave(2 * 16), wave(2 * 8));
    let (k, v) = (TensorView::f32(&k, [1, 1, 2, 16]), TensorView::f32(&v, [1, 1, 2, 8]));
    for index in [2, usize::MAX] {
        let sequence = format!("sequence {index} does not exist");
        let has = "the cache has 2";
        is!(refused(&mut cache, &["append", &sequence, has], |c| c.append_to(index, &k, &v)), NoSuchSequence);
        is!(refused(&mut cache, &["truncate", &sequence, has], |c| c.truncate(index, 0)), NoSuchSequence);
        is!(refused(&mut cache, &["fork", &sequence, has], |c| c.fork(index)), NoSuchSequence);
        is!(refused(&mut cache, &["remove", &sequence, has], |c| c.remove(index)), NoSuchSequence);
        assert_eq!(cache.len(index), None);
    }
}

fn options_out_of_range(device: &Device) {
    let mut cache = cache(device);
    let q = wave(2 * 4 * 16);
    let q = TensorView::f32(&q, [2, 1, 4, 16]);
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let options = DecodeOptions { scale: Some(scale), ..Default::default() };
        let words = [format!("scale = {scale}"), "must be finite".into()];
        let error = refused(&mut cache, &[&words[0], &words[1]], |c| c.decode_with(&q, &options));
        is!(error, Config);
    }
}

fn more_than_the_device_holds(device: &Device) {
    let mut cache = cache(device);
    // The first calls make room for scratch data, which is no part of what is compared.
    seen(&mut cache);
    let memory = cache.memory();
    for tokens in [1 << 40, usize::MAX] {
        let words = ["reserve", &format!("tokens of a sequence = {tokens}"), "limit of 1073741824"];
        let error = refused(&mut cache, &words, |c| c.reserve(tokens));
        is!(error, Limit);
        assert_eq!(cache.memory(), memory);
    }
    // What does fit is still given.
    cache.reserve(500).unwrap();
    assert!(cache.memory().keys > memory.keys);
}

fn nothing_at_all(device: &Device) {
    // No sequences.
    let mut none = SocketCache::new(device, config(), SHAPE, 0).unwrap();
    none.append(&TensorView::f32(&[], [0, 7, 2, 16]), &TensorView::f32(&[], [0, 7, 2, 8])).unwrap();
    none.reset().unwrap();
    for mode in [Mode::Sparse, Mode::Dense, Mode::Auto] {
        let options = DecodeOptions { mode, selection: true, ..Default::default() };
        let attended = none.decode_with(&TensorView::f32(&[], [0, 1, 4, 16]), &options).unwrap();
        assert_eq!(attended.o.shape(), [0, 1, 4, 8]);
        assert!(attended.o.read_blocking().unwrap().bytes().is_empty());
        assert!(attended.lse.read_blocking().unwrap().bytes().is_empty());
    }

    // No tokens: an append of nothing is no change, and attention to nothing is o = 0, lse = −∞.
    let mut empty = SocketCache::new(device, config(), SHAPE, 2).unwrap();
    empty.append(&TensorView::f32(&[], [2, 0, 2, 16]), &TensorView::f32(&[], [2, 0, 2, 8])).unwrap();
    assert!(empty.is_empty());
    let q = wave(2 * 3 * 4 * 16);
    let q = TensorView::f32(&q, [2, 3, 4, 16]);
    for what in ["sparse", "dense", "prefill"] {
        let attended = match what {
            "sparse" => empty.decode(&q),
            "dense" => empty.dense_decode(&q),
            _ => empty.prefill(&q),
        }
        .unwrap();
        assert_eq!(attended.o.shape(), [2, 3, 4, 8]);
        assert!(attended.o.read_blocking().unwrap().to_f32().iter().all(|&x| x == 0.0), "{what}");
        assert!(attended.lse.read_blocking().unwrap().to_f32().iter().all(|&x| x == f32::NEG_INFINITY), "{what}");
    }

    // A sequence beside an empty one, and more query tokens than keys: rows before the first key see nothing.
    let (k, v) = (wave(2 * 2 * 16), wave(2 * 2 * 8));
    empty.append_to(1, &TensorView::f32(&k, [1, 2, 2, 16]), &TensorView::f32(&v, [1, 2, 2, 8])).unwrap();
    let attended = empty.decode(&q).unwrap();
    let lse = attended.lse.read_blocking().unwrap().to_f32();
    let finite: Vec<_> = lse.chunks(4).map(|heads| heads.iter().all(|x| x.is_finite())).collect();
    assert_eq!(finite, [false, false, false, false, true, true]);
    let o = attended.o.read_blocking().unwrap().to_f32();
    assert!(o[..4 * 4 * 8].iter().all(|&x| x == 0.0) && o[4 * 4 * 8..].iter().any(|&x| x != 0.0));

    // Nothing appended to what is there, and no query tokens.
    let mut cache = cache(device);
    let before = seen(&mut cache);
    cache.append(&TensorView::f32(&[], [2, 0, 2, 16]), &TensorView::f32(&[], [2, 0, 2, 8])).unwrap();
    let (k, v) = (wave(2 * 3 * 2 * 16), wave(2 * 3 * 2 * 8));
    let (k, v) = (TensorView::f32(&k, [2, 3, 2, 16]), TensorView::f32(&v, [2, 3, 2, 8]));
    cache.append_ragged(&k, &v, &[0, 0]).unwrap();
    let attended = cache.decode(&TensorView::f32(&[], [2, 0, 4, 16])).unwrap();
    assert_eq!(attended.o.shape(), [2, 0, 4, 8]);
    assert!(attended.o.read_blocking().unwrap().bytes().is_empty());
    assert!(seen(&mut cache) == before);
}

fn budgets_of_zero(device: &Device) {
    // With sink and window a budget of no further keys is a choice, not a fault.
    let config = SocketConfig { budget: Budget::Tokens(0), ..config() };
    let mut cache = SocketCache::new(device, config, SHAPE, 1).unwrap();
    let (k, v) = (wave(50 * 2 * 16), wave(50 * 2 * 8));
    cache.append(&TensorView::f32(&k, [1, 50, 2, 16]), &TensorView::f32(&v, [1, 50, 2, 8])).unwrap();
    let q = wave(4 * 16);
    let options = DecodeOptions { selection: true, ..Default::default() };
    let attended = cache.decode_with(&TensorView::f32(&q, [1, 1, 4, 16]), &options).unwrap();
    let indices = attended.selection.unwrap().indices.read_blocking().unwrap();
    for head in indices.to_i32().chunks(indices.shape()[3]) {
        let selected: Vec<_> = head.iter().copied().filter(|&i| i >= 0).collect();
        assert_eq!(selected, [0, 1, 48, 49]);
    }
}

fn merges_that_do_not_fit(device: &Device) {
    let (o, lse) = (wave(2 * 4 * 8), wave(2 * 4));
    let halves = vec![f16::ONE; 8];
    let good = (TensorView::f32(&o, [2, 1, 4, 8]), TensorView::f32(&lse, [2, 1, 4, 1]));
    merge_state(device, &good.0, &good.1, &good.0, &good.1).unwrap();
    let other = TensorView::f32(&o, [1, 2, 4, 8]);
    let error = merge_state(device, &good.0, &good.1, &other, &good.1).unwrap_err();
    says(&error, &["merge_state", "[1, 2, 4, 8]", "[2, 1, 4, 8]"]);
    is!(error, Shape);
    let wide = TensorView::f32(&o, [2, 1, 4, 8]);
    let error = merge_state(device, &good.0, &wide, &good.0, &good.1).unwrap_err();
    says(&error, &["merge_state", "lse", "[2, 1, 4, 8]", "[2, 1, 4, 1]"]);
    is!(error, Shape);
    let half = TensorView::f16(&halves, [2, 1, 4, 1]);
    let error = merge_state(device, &good.0, &good.1, &good.0, &half).unwrap_err();
    says(&error, &["merge_state", "lse", "F16", "F32"]);
    is!(error, DType);
    let short = TensorView::f32(&o[..63], [2, 1, 4, 8]);
    let error = merge_state(device, &short, &good.1, &good.0, &good.1).unwrap_err();
    says(&error, &["merge_state", "64", "63"]);
    is!(error, OutOfBounds);
}

fn damaged_files(device: &Device) {
    let mut cache = cache(device);
    let file = cache.to_bytes().unwrap();
    SocketCache::from_bytes(device, &file).unwrap();
    for len in [0, 7, 8, 100, file.len() / 2, file.len() - 1] {
        let error = refused(&mut cache, &["load", "not a whole safetensors file"], |c| {
            SocketCache::from_bytes(c.device(), &file[..len])
        });
        is!(error, File);
    }
    let mut tampered = file.clone();
    tampered[file.len() - 5] ^= 0x10;
    let error =
        refused(&mut cache, &["load", "checksum", "damaged"], |c| SocketCache::from_bytes(c.device(), &tampered));
    is!(error, File);
    let missing = std::env::temp_dir().join("softhash: no such file");
    let error = SocketCache::load_from(device, &missing).unwrap_err();
    says(&error, &["load", "no such file"]);
    is!(error, File);
}

/// Runs `name` of this file in a process that may not have more than 3 GB of address space.
#[cfg(target_os = "linux")]
fn run_short_of_memory(name: &str) {
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "ulimit -v 3000000 && exec \"$@\"", "sh"]).arg(std::env::current_exe().unwrap());
    let output = shell.args(["--exact", name, "--ignored", "--nocapture"]).output().unwrap();
    let text = [output.stdout, output.stderr].map(|x| String::from_utf8_lossy(&x).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// Memory that the system really refuses, in the middle of growing.
fn short_of_memory(device: &Device) {
    // A page takes 8 MB of keys and 4 MB of values, so that 500 of them pass the limit and each alone is nothing.
    let mut cache = SocketCache::with_page_tokens(device, config(), SHAPE, 500, 65536).unwrap();
    let (k, v) = (wave(90 * 2 * 16), wave(90 * 2 * 8));
    cache.append_to(0, &TensorView::f32(&k, [1, 90, 2, 16]), &TensorView::f32(&v, [1, 90, 2, 8])).unwrap();
    seen(&mut cache);
    let memory = cache.memory();
    let (k, v) = (wave(500 * 2 * 16), wave(500 * 2 * 8));
    let (k, v) = (TensorView::f32(&k, [500, 1, 2, 16]), TensorView::f32(&v, [500, 1, 2, 8]));
    for _ in 0..2 {
        let error = refused(&mut cache, &["append", "out of memory asking for"], |c| c.append(&k, &v));
        is!(error, OutOfMemory);
        let error = refused(&mut cache, &["reserve", "out of memory asking for"], |c| c.reserve(65536));
        is!(error, OutOfMemory);
        assert_eq!(cache.memory(), memory);
        assert_eq!((cache.len(0), cache.len(1)), (Some(90), Some(0)));
    }
    // What fits goes on.
    let (k, v) = (TensorView::f32(&[1.0; 32], [1, 1, 2, 16]), TensorView::f32(&[1.0; 16], [1, 1, 2, 8]));
    cache.append_to(499, &k, &v).unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn a_refused_allocation_changes_nothing() {
    run_short_of_memory("short_of_memory_on_the_cpu");
}

#[test]
#[ignore = "run by a_refused_allocation_changes_nothing"]
fn short_of_memory_on_the_cpu() {
    short_of_memory(&Device::cpu());
}

#[test]
fn no_such_adapter() {
    let error = Device::by_name("no such adapter").unwrap_err();
    says(&error, &["no GPU adapter", "no such adapter", "found:", "cpu"]);
    is!(error, NoAdapter);
}

/// What only a GPU can do wrong.
#[cfg(feature = "wgpu")]
mod buffers;

/// What only CUDA can do wrong.
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_memory;
#[cfg(all(feature = "cuda", target_os = "linux"))]
mod drivers;
