//! Steps with the exact window in a CUDA graph. Needs `SOFTHASH_TEST_DEVICE=cuda`; without it there is nothing to test.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common {
    #[allow(dead_code, reason = "each test takes what it needs")]
    pub mod race;
}

use common::race::{error, noise, round, wide};
use half::bf16;
use softhash::{DType, Device, Gate, Race, RaceConfig, RaceShape, RaceState, TensorView};

const BATCH: usize = 2;
const SHAPE: RaceShape = RaceShape { num_q_heads: 4, num_kv_heads: 2, head_dim: 64, value_dim: 64, dtype: DType::Bf16 };

fn race(device: &Device) -> Race {
    let gate = Gate::PerHead(vec![0.3, 1.0, 0.0, 0.7]);
    Race::new(device, RaceConfig { tables: 2, planes: 3, window: 5, gate, ..RaceConfig::default() }, SHAPE).unwrap()
}

/// q, k and v of some tokens.
fn rows(seed: u64, tokens: usize) -> [Vec<bf16>; 3] {
    let of = |seed, heads| noise(seed, BATCH * tokens * heads * 64);
    let narrow = |x: Vec<f32>| x.into_iter().map(|x| bf16::from_f32(round(DType::Bf16, x))).collect();
    [of(seed, 4), of(seed + 1, 2), of(seed + 2, 2)].map(narrow)
}

fn views(rows: &[Vec<bf16>; 3], tokens: usize) -> [TensorView<'_>; 3] {
    let of = |i: usize, heads| TensorView::bf16(&rows[i], [BATCH, tokens, heads, 64]);
    [of(0, 4), of(1, 2), of(2, 2)]
}

/// A state after some tokens, more than the window.
fn begun(race: &mut Race) -> RaceState {
    let first = rows(1, 12);
    let [q, k, v] = views(&first, 12);
    race.forward(&q, &k, &v, None).unwrap().state
}

#[test]
fn a_step_is_captured_and_its_replays_go_on() {
    let Ok(name) = std::env::var("SOFTHASH_TEST_DEVICE") else { return };
    if !name.starts_with("cuda") {
        return;
    }
    let (cpu, cuda) = (Device::cpu(), Device::by_name(&name).unwrap());
    let (mut want, mut race) = (race(&cpu), race(&cuda));
    let (mut truth, mut state) = (begun(&mut want), begun(&mut race));
    let stream = cuda.as_cuda().unwrap().1.clone();
    let bits = |rows: &[Vec<bf16>; 3]| rows.clone().map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<u16>>());
    let mut slices = bits(&rows(100, 1)).map(|x| stream.clone_htod(&x).unwrap());
    let pointers: Vec<_> = {
        use softhash::cudarc::driver::DevicePtr;
        slices.iter().map(|slice| slice.device_ptr(&stream).0).collect()
    };
    let view = |i: usize, heads: usize| {
        let bytes = (BATCH * heads * 64 * 2) as u64;
        // SAFETY: the slices live as long as the graph.
        unsafe { TensorView::cuda_pointer(&cuda, pointers[i], bytes, DType::Bf16, [BATCH, 1, heads, 64]) }
    };
    let [q, k, v] = [view(0, 4), view(1, 2), view(2, 2)];
    // Compiles and takes scratch memory.
    let mut other = race.fork(&state).unwrap();
    race.append(&mut other, &q, &k, &v).unwrap();
    let (mut graph, o) = cuda.capture(|| race.append(&mut state, &q, &k, &v)).unwrap();
    let close = |got: &[f64], want: &[f64], step: u64| {
        let off = error(got, want);
        assert!(off < 6e-3, "step {step} is off by {off:.1e}");
    };
    for step in 0..9 {
        let token = rows(200 + 10 * step, 1);
        for (slice, x) in slices.iter_mut().zip(bits(&token)) {
            stream.memcpy_htod(&x, slice).unwrap();
        }
        graph.launch().unwrap();
        let [q, k, v] = views(&token, 1);
        close(&wide(&o), &wide(&want.append(&mut truth, &q, &k, &v).unwrap()), step);
    }
    // What follows goes on from there.
    let token = rows(500, 3);
    let [q, k, v] = views(&token, 3);
    let got = wide(&race.append(&mut state, &q, &k, &v).unwrap());
    close(&got, &wide(&want.append(&mut truth, &q, &k, &v).unwrap()), 9);
    // Where the keys of its window stand the host does not know any more, and says so.
    let refused = race.read_state(&state).unwrap_err().to_string();
    assert!(refused.contains("no longer those counted"), "{refused}");
}
