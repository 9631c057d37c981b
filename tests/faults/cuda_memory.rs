//! A CUDA device whose memory is taken. Runs where `SOFTHASH_TEST_DEVICE` names one.

use super::cuda::{RACE, cuda, race, slice, state};
use super::*;
use softhash::cudarc::driver::CudaSlice;
use softhash::{Race, RaceConfig, RaceOptions, RaceShape, RaceState, StateParts};

/// Takes all of the device's memory but 3 GiB; other tests that run beside need less. What a process held that has just
/// ended comes back late, and is taken too.
fn hog(device: &Device) -> Vec<CudaSlice<u8>> {
    let (context, stream) = device.as_cuda().unwrap();
    let (mut taken, mut quiet) = (Vec::new(), 0);
    while quiet < 10 {
        let more = context.mem_get_info().unwrap().0.saturating_sub(3 << 30);
        if more < 64 << 20 {
            quiet += 1;
            std::thread::sleep(std::time::Duration::from_millis(50));
            continue;
        }
        // SAFETY: never read.
        taken.push(unsafe { stream.alloc::<u8>(more) }.unwrap());
        stream.synchronize().unwrap();
        quiet = 0;
    }
    taken
}

#[test]
fn out_of_device_memory_changes_nothing() {
    let Some(device) = cuda() else { return };
    let all = device.as_cuda().unwrap().0.total_mem().unwrap();
    let has = format!("where the device has {all} in all");
    let mut cache = super::cache(&device);
    let mut race = race(&device);
    let mut own = state(&mut race);
    let held = |race: &Race, state: &RaceState| -> StateParts { race.read_state(state).unwrap() };
    seen(&mut cache);
    let row = slice(&device, &wave(256));
    let endless = |tokens, heads, dim| {
        TensorView::cuda_slice(&row, 0, DType::F32, [1, tokens, heads, dim]).with_strides([0, 0, dim, 1])
    };
    let taken = hog(&device);
    let memory = cache.memory();
    let before = (held(&race, &own), own.tokens(0));
    for _ in 0..2 {
        // Growth.
        let words = ["reserve", "out of memory asking for", &has];
        is!(refused(&mut cache, &words, |c| c.reserve(1 << 26)), OutOfMemory);
        let (k, v) = (endless(1 << 26, 2, 16), endless(1 << 26, 2, 8));
        let words = ["append", "out of memory asking for", &has];
        is!(refused(&mut cache, &words, |c| c.append_to(1, &k, &v)), OutOfMemory);
        assert_eq!((cache.len(0), cache.len(1), cache.memory()), (Some(90), Some(40), memory));
        // Results.
        let q = TensorView::cuda_slice(&row, 0, DType::F32, [2, 1 << 24, 4, 16]).with_strides([0, 0, 16, 1]);
        let words = ["prefill", "out of memory asking for 4294967296 bytes", &has];
        is!(refused(&mut cache, &words, |c| c.prefill(&q)), OutOfMemory);
        // RACE: results, states, gradients.
        let tokens = 1 << 25;
        let (q, k, v) = (endless(tokens, 4, 16), endless(tokens, 2, 16), endless(tokens, 2, 8));
        let grad_o = endless(tokens, 4, 8);
        let none = RaceOptions::default();
        for (op, error) in [
            ("forward", race.forward(&q, &k, &v, None).map(drop).unwrap_err()),
            ("append", race.append(&mut own, &q, &k, &v).map(drop).unwrap_err()),
            ("backward", race.backward(&q, &k, &v, &grad_o, Some(&own), None, &none).map(drop).unwrap_err()),
            ("new_state", race.new_state(1 << 24).map(drop).unwrap_err()),
            ("new_state", race.new_state(usize::MAX).map(drop).unwrap_err()),
        ] {
            println!("{error}");
            says(&error, &[op, "out of memory asking for", &has]);
            is!(error, OutOfMemory);
        }
        assert_eq!((held(&race, &own), own.tokens(0)), before);
    }
    // Results that are kept fill what is left, and let go they make room again.
    let tokens = 1 << 20;
    let (q, k, v) = (endless(tokens, 4, 16), endless(tokens, 2, 16), endless(tokens, 2, 8));
    for _ in 0..2 {
        let mut kept = Vec::new();
        let error = loop {
            match race.forward(&q, &k, &v, None) {
                Ok(output) => kept.push(output.o),
                Err(error) => break error,
            }
            assert!(kept.len() < 64);
        };
        println!("{} results of 128 MiB, then {error}", kept.len());
        is!(error, OutOfMemory);
        drop(kept);
        race.forward(&q, &k, &v, None).unwrap();
    }
    // On the walking kernels too.
    let shape = RaceShape { head_dim: 64, value_dim: 64, dtype: DType::Bf16, ..RACE };
    let mut walking = Race::new(&device, RaceConfig::default(), shape).unwrap();
    let of = |heads| TensorView::cuda_slice(&row, 0, DType::Bf16, [1, 1 << 23, heads, 64]).with_strides([0, 0, 64, 1]);
    let mut own = walking.new_state(1).unwrap();
    let error = walking.append(&mut own, &of(4), &of(2), &of(2)).map(drop).unwrap_err();
    says(&error, &["append", "out of memory asking for 4294967296 bytes", &has]);
    let none = RaceOptions::default();
    let error = walking.backward(&of(4), &of(2), &of(2), &of(4), Some(&own), None, &none).map(drop).unwrap_err();
    is!(error, OutOfMemory);
    assert!(held(&walking, &own).a.iter().all(|&a| a == 0.0) && own.tokens(0) == Some(0));
    pieces_where_the_whole_does_not_fit(&device);
    drop(taken);
    // What fits goes on.
    device.trim();
    cache.reserve(1 << 20).unwrap();
    let (k, v) = (endless(3, 2, 16), endless(3, 2, 8));
    cache.append_to(1, &k, &v).unwrap();
    assert_eq!(cache.len(1), Some(43));
    race.forward(&q, &k_of(&row, tokens), &v, None).map(drop).unwrap_err();
    race.forward(&q, &endless(tokens, 2, 16), &endless(tokens, 2, 8), None).unwrap();
}

/// Inputs of the host that the device cannot hold beside the results, in the 3 GiB that are left.
fn pieces_where_the_whole_does_not_fit(device: &Device) {
    let shape = RaceShape { head_dim: 64, value_dim: 64, ..RACE };
    let mut race = Race::new(device, RaceConfig::default(), shape).unwrap();
    let row = wave(4 * 64);
    let of = |tokens, heads| TensorView::f32(&row, [1, tokens, heads, 64]).with_strides([0, 0, 64, 1]);
    // Inputs and results are 2.25 and 1.125 GiB.
    let tokens = 9 << 17;
    let mut own = race.new_state(1).unwrap();
    let o = race.append(&mut own, &of(tokens, 4), &of(tokens, 2), &of(tokens, 2)).unwrap();
    assert_eq!(own.tokens(0), Some(tokens as u64));
    // The mean of equal values is their value.
    let read = o.read_blocking().unwrap().to_f32();
    drop(o);
    for (i, o) in read.chunks(256).enumerate().step_by(9973) {
        for (channel, &o) in o.iter().enumerate() {
            let v = row[channel / 128 * 64 + channel % 64];
            assert!((o - v).abs() <= 2e-5 * v.abs().max(1e-2), "token {i}, channel {channel}: {o} for {v}");
        }
    }
    // Inputs and results are 1.69 and 1.125 GiB, and what the forward pass works with stays.
    let tokens = 9 << 16;
    let (q, k, v, none) = (of(tokens, 4), of(tokens, 2), of(tokens, 2), RaceOptions::default());
    let gradients = race.backward(&q, &k, &v, &of(tokens, 4), None, None, &none).unwrap();
    let dv = gradients.dv.read_blocking().unwrap().to_f32();
    // A value has a share 1/t in what token t, counted from one, reads.
    let mut shares = 0.0;
    for (s, dv) in dv.chunks(128).enumerate().rev() {
        shares += 1.0 / (s + 1) as f64;
        if s % 9973 != 0 {
            continue;
        }
        for (channel, &dv) in dv.iter().enumerate() {
            let head = channel / 64 * 128 + channel % 64;
            let expected = shares * f64::from(row[head] + row[head + 64]);
            assert!(
                (f64::from(dv) - expected).abs() <= 1e-4 * (shares + expected.abs()),
                "{s}, {channel}: {dv} for {expected}"
            );
        }
    }
}

/// Keys of a token less: refused for their shape.
fn k_of(row: &CudaSlice<f32>, tokens: usize) -> TensorView<'_> {
    TensorView::cuda_slice(row, 0, DType::F32, [1, tokens - 1, 2, 16]).with_strides([0, 0, 16, 1])
}
