//! The generator against itself, and the truth against the reference.

use crate::counter::{Counter, Part};
use crate::race_truth::Truth;
use half::bf16;
use softhash::race::reference::{self, Problem, State};
use softhash::{DType, Hyperplanes, Normalization};

#[test]
fn rows_are_those_of_the_tensor() {
    for dtype in [DType::F32, DType::Bf16] {
        let counter = Counter { seed: 3, heads: 3, channels: 40, dtype, period: 150 };
        let tensor = counter.tensor(Part::V, 20..220).unwrap().read_blocking().unwrap().to_f32();
        let mut row = vec![0.0; 40];
        for (i, found) in tensor.chunks(40).enumerate() {
            counter.row(Part::V, (20 + i / 3) as u64, i % 3, &mut row);
            assert!(found.iter().zip(&row).all(|(a, b)| f64::from(*a) == *b));
        }
        let rounded = tensor.iter().all(|x| bf16::from_f32(*x).to_f32() == *x);
        assert_eq!(rounded, dtype == DType::Bf16);
        assert_eq!(tensor[..120], tensor[150 * 120..151 * 120]);
        let spread = tensor.iter().map(|x| x * x).sum::<f32>() / tensor.len() as f32;
        assert!((1.2..1.45).contains(&spread), "{spread}");
    }
}

#[test]
fn it_is_what_the_reference_says() {
    let counter = Counter { seed: 5, heads: 2, channels: 12, dtype: DType::Bf16, period: 40 };
    let planes = Hyperplanes::Gaussian { seed: 2 }.rows(2, 3, 12, 1).unwrap();
    let planes: Vec<f64> = planes.into_iter().map(f64::from).collect();
    let truth = Truth { counter, head: 1, planes: planes.clone(), planes_per_table: 3, beta: 1.5 };
    let all = |part| {
        let mut rows = vec![0.0; 70 * 12];
        rows.chunks_mut(12).enumerate().for_each(|(t, row)| counter.row(part, t as u64, 1, row));
        rows
    };
    let [q, k, v, grad_o] = [Part::Q, Part::K, Part::V, Part::GradO].map(all);
    let problem = Problem {
        tables: 2,
        planes_per_table: 3,
        planes: &planes,
        beta: 1.5,
        normalization: Normalization::Ratio,
        epsilon: 0.0,
        causal: true,
        head_dim: 12,
        value_dim: 12,
        q: vec![&q],
        k: &k,
        v: &v,
    };
    let zeros = State::zeros(16, 12);
    let (o, _) = reference::forward(&problem, &zeros);
    let gradients = reference::backward(&problem, &zeros, &[&grad_o], &zeros);
    let found = truth.at(70, &[0, 33, 34, 69], true, |_| ());
    for at in &found {
        let row = at.token as usize * 12..(at.token as usize + 1) * 12;
        for (found, expected) in
            [(&at.o, &o[0]), (&at.dq, &gradients.dq[0]), (&at.dk, &gradients.dk), (&at.dv, &gradients.dv)]
        {
            let scale = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            for (a, b) in found.iter().zip(&expected[row.clone()]) {
                assert!((a - b).abs() < 1e-12 * scale, "token {}: {a} and {b}", at.token);
            }
        }
    }
    assert!(truth.at(70, &[3], false, |_| ())[0].dq.is_empty());
}

/// No GPU is needed for it; a missing compiler fails only where the tests are told that it is there.
#[cfg(feature = "cuda")]
#[test]
fn the_cuda_kernels_compile() {
    // SAFETY: looks whether the library can be loaded.
    if !unsafe { softhash::cudarc::nvrtc::sys::is_culib_present() } {
        assert!(std::env::var_os("REQUIRE_NVRTC").is_none(), "NVRTC is missing");
        return println!("left out: no NVRTC");
    }
    for (dtype, channels, planes, tables) in [(DType::Bf16, 128, 2, 2), (DType::F32, 64, 3, 3), (DType::F32, 40, 1, 2)]
    {
        let counter = Counter { seed: 1, heads: 3, channels, dtype, period: 1 << 20 };
        crate::counter_cuda::fill(&counter).unwrap();
        let rows = vec![0.0; planes * tables * channels];
        let truth = Truth { counter, head: 2, planes: rows, planes_per_table: planes, beta: 1.0 };
        assert_eq!(crate::truth_cuda::kernels(&truth).unwrap().is_some(), channels.is_power_of_two());
    }
}
