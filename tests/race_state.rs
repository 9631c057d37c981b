//! RACE states and configurations: what is kept, what is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common {
    pub mod device;
}

use softhash::{
    Beta, DType, Device, Error, Hyperplanes, Normalization, Race, RaceConfig, RaceOptions, RaceShape, RaceState,
    StateParts, TensorView,
};

const SHAPE: RaceShape = RaceShape { num_q_heads: 2, num_kv_heads: 2, head_dim: 8, value_dim: 6, dtype: DType::F32 };

fn race(config: RaceConfig) -> Race {
    Race::new(&Device::cpu(), config, SHAPE).unwrap()
}

fn small() -> RaceConfig {
    RaceConfig { tables: 3, planes: 2, ..RaceConfig::default() }
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + 13) as f32 * 0.37).sin() * 2.0).collect()
}

/// A state after `tokens` tokens of two sequences.
fn seen(race: &mut Race, tokens: usize) -> RaceState {
    let (x, v) = (numbers(2 * tokens * 2 * 8), numbers(2 * tokens * 2 * 6));
    let x = TensorView::f32(&x, [2, tokens, 2, 8]);
    race.forward(&x, &x, &TensorView::f32(&v, [2, tokens, 2, 6]), None).unwrap().state
}

#[test]
fn states_count_tokens_and_keep_their_invariants() {
    let mut race = race(small());
    let state = seen(&mut race, 9);
    assert_eq!((state.batch(), state.tokens(0), state.tokens(1), state.tokens(2)), (2, Some(9), Some(9), None));
    assert_eq!(state.shape(), race.state_shape());
    assert_eq!(state.shape().buckets(), 12);
    assert!(state.bytes() > 0);
    let parts = race.read_state(&state).unwrap();
    // The masses of a table add up to the tokens.
    for table in parts.a.chunks(4) {
        assert!((table.iter().sum::<f64>() - 9.0).abs() < 1e-5, "{table:?}");
    }
}

#[test]
fn forks_go_their_own_way_and_snapshots_roll_back() {
    let mut race = race(small());
    let mut state = seen(&mut race, 5);
    let snapshot = race.fork(&state).unwrap();
    let before = race.read_state(&snapshot).unwrap();
    let (x, v) = (numbers(2 * 2 * 8), numbers(2 * 2 * 6));
    let x = TensorView::f32(&x, [2, 1, 2, 8]);
    let first = race.append(&mut state, &x, &x, &TensorView::f32(&v, [2, 1, 2, 6])).unwrap();
    assert_ne!(race.read_state(&state).unwrap(), before);
    assert_eq!(race.read_state(&snapshot).unwrap(), before);
    // Rolling back is going on from the snapshot.
    let mut state = snapshot;
    let again = race.append(&mut state, &x, &x, &TensorView::f32(&v, [2, 1, 2, 6])).unwrap();
    assert_eq!(first.read_blocking().unwrap(), again.read_blocking().unwrap());
    assert_eq!(state.tokens(0), Some(6));
}

#[test]
fn saved_states_come_back_exactly_and_only_under_their_hash() {
    let mut original = race(small());
    let state = seen(&mut original, 7);
    let bytes = original.state_to_bytes(&state).unwrap();
    let loaded = original.state_from_bytes(&bytes).unwrap();
    assert_eq!(original.read_state(&loaded).unwrap(), original.read_state(&state).unwrap());
    assert_eq!((loaded.tokens(0), loaded.batch()), (Some(7), 2));

    let refused = |race: &Race, bytes: &[u8], word: &str| {
        let error = race.state_from_bytes(bytes).unwrap_err();
        assert!(matches!(error, Error::File { .. }) && error.to_string().contains(word), "{word}: {error}");
    };
    refused(&race(RaceConfig { hyperplanes: Hyperplanes::Gaussian { seed: 1 }, ..small() }), &bytes, "another planes");
    refused(&race(RaceConfig { beta: Beta::Shared(0.5), ..small() }), &bytes, "another beta");
    refused(&race(RaceConfig { tables: 2, ..small() }), &bytes, "saved under");
    // The normalisation is no part of a state.
    let other = race(RaceConfig { normalization: Normalization::BucketMean, ..small() });
    assert!(other.state_from_bytes(&bytes).is_ok());

    for cut in [0, 7, 8, 100, bytes.len() - 1] {
        refused(&original, &bytes[..cut], "not a whole safetensors file");
    }
    let mut torn = bytes.clone();
    let last = torn.len() - 3;
    torn[last] ^= 4;
    refused(&original, &torn, "damaged");
    let cache_file = include_bytes!("fixtures/hash_p1l1_d64.safetensors");
    refused(&original, cache_file, "not a saved RACE state");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    original.save_state_to(&state, &path).unwrap();
    let loaded = original.load_state_from(&path).unwrap();
    assert_eq!(original.read_state(&loaded).unwrap(), original.read_state(&state).unwrap());
    refused_path(&original, folder.path());
    refused_path(&original, &folder.path().join("absent"));
    let nowhere = folder.path().join("no/such/folder/state");
    assert!(matches!(original.save_state_to(&state, nowhere), Err(Error::File { op: "save", .. })));
}

fn refused_path(race: &Race, path: &std::path::Path) {
    assert!(matches!(race.load_state_from(path), Err(Error::File { op: "load", .. })), "{}", path.display());
}

#[test]
fn states_from_the_host_are_checked() {
    let mut race = race(small());
    let state = seen(&mut race, 4);
    let parts = race.read_state(&state).unwrap();
    let written = race.write_state(&parts, &[4, 4]).unwrap();
    assert_eq!(race.read_state(&written).unwrap(), parts);
    assert!(matches!(race.write_state(&parts, &[4]), Err(Error::Shape { tensor: "a", .. })));
    let mut bad = parts.clone();
    bad.b.pop();
    assert!(matches!(race.write_state(&bad, &[4, 4]), Err(Error::Shape { tensor: "b", .. })));
    for (value, fits_gradient) in [(f64::NAN, false), (f64::INFINITY, false), (1e39, false), (-1.0, true)] {
        let mut bad = parts.clone();
        bad.a[13] = value;
        let error = race.write_state(&bad, &[4, 4]).unwrap_err();
        assert!(matches!(error, Error::NonFinite { tensor: "a", index: [0, 1, 1, 0], .. }), "{error}");
        assert_eq!(race.write_state_gradient(&bad, 2).is_ok(), fits_gradient);
    }
    let gradient = race.write_state_gradient(&parts, 2).unwrap();
    assert_eq!((gradient.batch(), gradient.shape()), (2, race.state_shape()));
    assert_eq!(race.read_state_gradient(&gradient).unwrap(), parts);
    assert!(race.write_state_gradient(&StateParts::default(), 1).is_err());
}

#[test]
fn states_of_other_shapes_and_batches_are_refused() {
    let mut race = race(small());
    let x = numbers(2 * 2 * 8);
    let (x, v) = (TensorView::f32(&x, [2, 1, 2, 8]), TensorView::f32(&x, [2, 1, 2, 6]));
    let mut one = race.new_state(1).unwrap();
    assert!(matches!(race.append(&mut one, &x, &x, &v), Err(Error::Shape { tensor: "state", .. })));
    let other = self::race(RaceConfig { planes: 3, ..small() });
    let foreign = other.new_state(2).unwrap();
    for result in [race.forward(&x, &x, &v, Some(&foreign)).map(drop), race.fork(&foreign).map(drop)] {
        assert!(matches!(result, Err(Error::Shape { tensor: "state", .. })));
    }
    assert!(race.read_state(&foreign).is_err());
    let gradient = race
        .write_state_gradient(&StateParts { a: vec![0.0; 24], b: vec![0.0; 144], ..StateParts::default() }, 1)
        .unwrap();
    let error = race.backward(&x, &x, &v, &v, None, Some(&gradient), &RaceOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Shape { tensor: "state gradient", .. }), "{error}");
}

#[test]
fn configurations_are_checked_field_by_field() {
    let refused = |config: RaceConfig, shape: RaceShape, field: &str| {
        let error = Race::new(&Device::cpu(), config, shape).unwrap_err();
        let Error::Config { field: found, .. } = &error else { panic!("{error}") };
        assert_eq!(*found, field, "{error}");
    };
    refused(RaceConfig { tables: 0, ..small() }, SHAPE, "tables");
    refused(RaceConfig { tables: 65, ..small() }, SHAPE, "tables");
    refused(RaceConfig { planes: 9, ..small() }, SHAPE, "planes");
    refused(RaceConfig { planes: 0, ..small() }, SHAPE, "planes");
    refused(RaceConfig { ensembles: 0, ..small() }, SHAPE, "ensembles");
    refused(RaceConfig { tables: 64, planes: 8, ..small() }, SHAPE, "tables * 2^planes");
    for beta in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        refused(RaceConfig { beta: Beta::Shared(beta), ..small() }, SHAPE, "beta");
        refused(RaceConfig { beta: Beta::PerHead(vec![1.0, beta]), ..small() }, SHAPE, "beta");
    }
    refused(RaceConfig { beta: Beta::PerHead(vec![1.0]), ..small() }, SHAPE, "beta (values per head)");
    let supplied = |n| RaceConfig { hyperplanes: Hyperplanes::Supplied(vec![0.5; n].into()), ..small() };
    refused(supplied(47), SHAPE, "hyperplanes");
    assert!(Race::new(&Device::cpu(), supplied(6 * 8), SHAPE).is_ok());
    assert!(Race::new(&Device::cpu(), supplied(2 * 6 * 8), SHAPE).is_ok());
    refused(small(), RaceShape { num_q_heads: 3, ..SHAPE }, "num_q_heads");
    refused(small(), RaceShape { head_dim: 0, ..SHAPE }, "head_dim");
    refused(small(), RaceShape { value_dim: 513, ..SHAPE }, "value_dim");
    refused(small(), RaceShape { dtype: DType::I32, ..SHAPE }, "dtype");
    let beta = Beta::from_log_temp(0.0, 64);
    assert_eq!(beta, Beta::Shared(0.125));
    assert_eq!(small().buckets(), 12);
}

#[test]
fn parameters_are_taken_whole_or_not_at_all() {
    let mut race = race(small());
    let before = race.hyperplanes().unwrap();
    assert_eq!(before.len(), 6 * 8);
    let mut bad = before.clone();
    bad[3] = f32::NAN;
    assert!(race.set_parameters(&bad, Beta::Shared(1.0)).is_err());
    assert!(race.set_parameters(&before, Beta::Shared(0.0)).is_err());
    assert!(race.set_parameters(&before[1..], Beta::Shared(1.0)).is_err());
    assert_eq!((race.hyperplanes().unwrap(), &race.config().beta), (before.clone(), &Beta::Shared(1.0)));

    // New ones act as if they had been there from the start.
    let doubled: Vec<f32> = before.iter().map(|w| 2.0 * w).collect();
    race.set_parameters(&doubled, Beta::PerHead(vec![0.5, 2.0])).unwrap();
    let config = RaceConfig {
        hyperplanes: Hyperplanes::Supplied(doubled.into()),
        beta: Beta::PerHead(vec![0.5, 2.0]),
        ..small()
    };
    let (mut fresh, mut changed) = (self::race(config), race);
    let (a, b) = (seen(&mut fresh, 6), seen(&mut changed, 6));
    assert_eq!(fresh.read_state(&a).unwrap(), changed.read_state(&b).unwrap());
    assert_eq!(fresh.device().path_name(), "cpu");
    assert_eq!(fresh.shape(), SHAPE);
    assert!(fresh.warm_up(DType::F16).is_ok());
}

#[test]
fn wrong_tensors_are_refused_and_change_nothing() {
    let mut race = race(small());
    let mut state = seen(&mut race, 3);
    let before = race.read_state(&state).unwrap();
    let x = numbers(2 * 4 * 2 * 8);
    let good = TensorView::f32(&x, [2, 4, 2, 8]);
    let v = TensorView::f32(&x, [2, 4, 2, 6]);
    let halves = vec![half::f16::ONE; 128];
    let wrong = [
        (TensorView::f32(&x, [2, 4, 1, 8]), "q"),
        (TensorView::f32(&x, [2, 4, 2, 4]), "q"),
        (TensorView::f16(&halves, [2, 4, 2, 8]), "q"),
        (TensorView::f32(&x[1..], [2, 4, 2, 8]), "q"),
    ];
    for (q, name) in wrong {
        let error = race.append(&mut state, &q, &good, &v).unwrap_err();
        let found = match &error {
            Error::Shape { tensor, .. } | Error::DType { tensor, .. } | Error::OutOfBounds { tensor, .. } => *tensor,
            _ => panic!("{error}"),
        };
        assert_eq!(found, name, "{error}");
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let mut y = x.clone();
        y[77] = bad;
        let y = TensorView::f32(&y, [2, 4, 2, 8]);
        for (q, k, name) in [(&y, &good, "q"), (&good, &y, "k")] {
            let error = race.append(&mut state, q, k, &v).unwrap_err();
            assert!(
                matches!(&error, Error::NonFinite { tensor, index: [1, 0, 1, 5], .. } if *tensor == name),
                "{error}"
            );
        }
    }
    let short = TensorView::f32(&x, [2, 3, 2, 8]);
    assert!(matches!(race.append(&mut state, &good, &short, &v), Err(Error::Shape { tensor: "k", .. })));
    for lengths in [vec![4], vec![4, 5]] {
        let options = RaceOptions { lengths: Some(lengths), ..RaceOptions::default() };
        let error = race.append_with(&mut state, &good, &good, &v, &options).unwrap_err();
        assert!(matches!(error, Error::Shape { tensor: "lengths", .. }), "{error}");
    }
    let options = RaceOptions { output: Some(DType::I32), ..RaceOptions::default() };
    assert!(matches!(race.append_with(&mut state, &good, &good, &v, &options), Err(Error::DType { tensor: "o", .. })));
    assert_eq!(race.read_state(&state).unwrap(), before);
    assert_eq!(state.tokens(0), Some(3));

    let mut full = self::race(RaceConfig { causal: false, ..small() });
    let mut state = full.new_state(2).unwrap();
    assert!(matches!(full.append(&mut state, &good, &good, &v), Err(Error::Unsupported { op: "append", .. })));
    let limit = race.write_state(&before, &[1 << 48, 0]).unwrap();
    let error = race.forward(&good, &good, &v, Some(&limit)).unwrap_err();
    assert!(matches!(error, Error::Limit { what: "tokens of a sequence", .. }), "{error}");
}

/// Gradients of inputs in the inputs' type are those in f32, rounded; another type is refused.
#[test]
fn gradients_are_of_the_type_asked_for() {
    let shape = RaceShape { dtype: DType::Bf16, ..SHAPE };
    let mut race = Race::new(&Device::cpu(), small(), shape).unwrap();
    let halves: Vec<half::bf16> = numbers(2 * 4 * 2 * 8).into_iter().map(half::bf16::from_f32).collect();
    let (x, v) = (TensorView::bf16(&halves, [2, 4, 2, 8]), TensorView::bf16(&halves[..96], [2, 4, 2, 6]));
    let mut backward = |gradients| {
        let options = RaceOptions { gradients, ..RaceOptions::default() };
        race.backward(&x, &x, &v, &v, None, None, &options)
    };
    let (wide, narrow) = (backward(None).unwrap(), backward(Some(DType::Bf16)).unwrap());
    for (wide, narrow) in [(wide.dq, narrow.dq), (wide.dk, narrow.dk), (wide.dv, narrow.dv)] {
        assert_eq!((wide.dtype(), narrow.dtype()), (DType::F32, DType::Bf16));
        let rounded = wide.read_blocking().unwrap().to_f32().into_iter().map(|x| half::bf16::from_f32(x).to_f32());
        assert!(rounded.eq(narrow.read_blocking().unwrap().to_f32()));
    }
    assert_eq!(narrow.d_planes.dtype(), DType::F32);
    let error = backward(Some(DType::F16)).unwrap_err();
    assert!(matches!(error, Error::DType { tensor: "gradients", .. }), "{error}");
}

#[test]
fn nothing_to_do_is_done() {
    let mut race = race(small());
    let empty = TensorView::f32(&[], [2, 0, 2, 8]);
    let out = race.forward(&empty, &empty, &TensorView::f32(&[], [2, 0, 2, 6]), None).unwrap();
    assert_eq!((out.o.shape(), out.state.tokens(0)), (&[2, 0, 2, 6][..], Some(0)));
    assert!(out.o.read_blocking().unwrap().to_f32().is_empty());
    let v = TensorView::f32(&[], [2, 0, 2, 6]);
    let back = race.backward(&empty, &empty, &v, &v, None, None, &RaceOptions::default()).unwrap();
    assert_eq!(back.dv.shape(), [2, 0, 2, 6]);
    assert!(back.d_planes.read_blocking().unwrap().to_f32().iter().all(|x| *x == 0.0));
    let none = TensorView::f32(&[], [0, 3, 2, 8]);
    let out = race.forward(&none, &none, &TensorView::f32(&[], [0, 3, 2, 6]), None).unwrap();
    assert_eq!(out.state.batch(), 0);
}

/// β so large that no bucket of the query holds any mass: o is zero and not NaN, and so are its gradients.
fn query_without_mass_reads_zero(device: &Device) {
    let config = RaceConfig {
        tables: 1,
        planes: 2,
        beta: Beta::Shared(500.0),
        hyperplanes: Hyperplanes::Supplied([[1f32, 0.0].repeat(4), [0f32, 1.0].repeat(4)].concat().into()),
        ..RaceConfig::default()
    };
    let mut race = Race::new(device, config, SHAPE).unwrap();
    let (q, k, v) = ([9f32; 2 * 8], [-9f32; 2 * 8], [1f32; 2 * 6]);
    let (q, k) = (TensorView::f32(&q, [1, 1, 2, 8]), TensorView::f32(&k, [1, 1, 2, 8]));
    let v = TensorView::f32(&v, [1, 1, 2, 6]);
    let o = race.forward(&q, &k, &v, None).unwrap().o.read_blocking().unwrap().to_f32();
    assert_eq!(o, [0.0; 12]);
    let back = race.backward(&q, &k, &v, &v, None, None, &RaceOptions::default()).unwrap();
    for gradient in [&back.dq, &back.dk, &back.dv, &back.d_beta, &back.d_planes] {
        let gradient = gradient.read_blocking().unwrap().to_f32();
        assert!(gradient.iter().all(|x| x.is_finite()), "{gradient:?}");
    }
    // A query that shares the bucket reads its value.
    let o = race.forward(&k, &k, &v, None).unwrap().o.read_blocking().unwrap().to_f32();
    assert_eq!(o, [1.0; 12]);
}

#[test]
fn a_query_without_mass_reads_zero() {
    query_without_mass_reads_zero(&Device::cpu());
}

#[cfg(feature = "wgpu")]
#[test]
fn a_query_without_mass_reads_zero_on_the_gpu() {
    query_without_mass_reads_zero(&common::device::gpu());
}
