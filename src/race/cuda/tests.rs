//! Every variant of every kernel, and the structs they read.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::kernels::{Kernel, Key};
use super::params::{Finish, Groups, PieceParams, Scan, Shares, Step, Walk};
use super::shared;
use super::window_kernels::{Way, WindowKernel, WindowKey};
use crate::engine::cuda::KernelKey;
use crate::race::plan::Geometry;
use crate::race::window::WindowGeometry;
use crate::tensor::{DType, TensorView};
use crate::{Device, Error, Race, RaceConfig, RaceOptions, RaceShape, RaceState};

fn geometry(
    heads: (usize, usize),
    dims: (usize, usize),
    (ensembles, tables, planes): (usize, usize, usize),
    dtype: DType,
    ratio: bool,
) -> Geometry {
    let (num_q_heads, num_kv_heads) = heads;
    let (group, (head_dim, value_dim)) = (num_q_heads / num_kv_heads, dims);
    Geometry { num_q_heads, num_kv_heads, group, head_dim, value_dim, dtype, tables, planes, ensembles, ratio }
}

/// Shared memory that a block of a GPU of 9.0 may have.
const MOST: usize = 227 << 10;

/// Kernels for any shape.
fn any(geometry: Geometry, output: DType, grad: DType) -> Vec<Key> {
    let mut kernels = vec![
        Kernel::Scan { reverse: false },
        Kernel::Scan { reverse: true },
        Kernel::AddParameters,
        Kernel::FinishParameters,
        Kernel::Fold,
        Kernel::ChunkSums,
        Kernel::GroupTotals,
        Kernel::Products,
        Kernel::Gains { grad },
        Kernel::QuerySums { grad },
    ];
    for flag in [false, true] {
        kernels.extend([
            Kernel::Hash { queries: flag },
            Kernel::GroupPrefix { reverse: flag },
            Kernel::ReadWeights { read: flag },
            Kernel::Output { output, read: flag },
            Kernel::Values { grad, read: flag },
            Kernel::Query { read: flag },
            Kernel::Key { absorb: flag },
            Kernel::Value { grad, absorb: flag },
            Kernel::ThroughHash { queries: flag },
            Kernel::HashInputs { queries: flag },
            Kernel::HashParameters { queries: flag },
        ]);
    }
    let all = kernels.into_iter().map(|kernel| Key { kernel, geometry });
    all.chain(steps(geometry, output)).collect()
}

/// Those of a step.
fn steps(geometry: Geometry, output: DType) -> Vec<Key> {
    let mut channels = geometry.step_channels().to_vec();
    channels.dedup();
    channels.into_iter().map(|channels| Key { kernel: Kernel::Step { output, channels }, geometry }).collect()
}

/// Kernels that walk.
fn walking(geometry: Geometry, terms: usize, output: DType, gradients: DType) -> Vec<Key> {
    let mut kernels = vec![Kernel::Sums { terms }];
    kernels.extend(shared::forward(&geometry, terms, MOST).map(|fit| Kernel::Forward { terms, fit, output }));
    if let Some(fit) = shared::backward(&geometry, terms, MOST) {
        kernels
            .extend([Kernel::BackwardQuery { terms, fit, gradients }, Kernel::BackwardKey { terms, fit, gradients }]);
    }
    kernels.into_iter().map(|kernel| Key { kernel, geometry }).collect()
}

pub(crate) fn test_keys() -> Vec<Box<dyn KernelKey>> {
    let (half, bf16, full) = (DType::F16, DType::Bf16, DType::F32);
    let mut keys = any(geometry((32, 8), (128, 128), (1, 4, 4), bf16, true), bf16, bf16);
    keys.extend(any(geometry((3, 1), (5, 7), (2, 3, 3), full, false), half, full));
    keys.extend(any(geometry((2, 1), (512, 512), (1, 16, 8), half, false), full, half));
    for (tables, planes) in [(2, 2), (3, 3), (4, 4)] {
        let geometry = geometry((4, 4), (128, 128), (1, tables, planes), bf16, true);
        keys.extend(walking(geometry, 1, bf16, bf16));
        keys.extend(steps(geometry, bf16));
        keys.extend(walking(geometry, 2, full, full));
        keys.extend(walking(Geometry { dtype: full, ..geometry }, 2, full, full));
    }
    keys.extend(walking(geometry((8, 2), (64, 64), (1, 5, 3), full, true), 2, full, full));
    keys.extend(walking(geometry((8, 2), (64, 64), (1, 5, 3), half, true), 2, half, full));
    keys.extend(walking(geometry((2, 2), (64, 64), (1, 4, 4), bf16, true), 3, full, full));
    let mut keys: Vec<_> = keys.into_iter().map(|key| Box::new(key) as Box<dyn KernelKey>).collect();
    for (num_q_heads, num_kv_heads, head_dim, value_dim, dtype) in [
        (32, 8, 128, 128, bf16),
        (4, 4, 64, 64, half),
        (4, 2, 128, 128, full),
        (3, 1, 5, 7, full),
        (2, 1, 512, 512, half),
    ] {
        let geometry = WindowGeometry { num_q_heads, num_kv_heads, head_dim, value_dim, dtype };
        let terms = match dtype {
            DType::Bf16 => 1,
            DType::F16 => 2,
            _ => 3,
        };
        let ways = [Some(Way::Any), geometry.has_tiles(MOST).then_some(Way::Tiles { terms })];
        let kernels = ways.into_iter().flatten().flat_map(|way| WindowKernel::every(way, dtype, dtype));
        keys.extend(kernels.map(|kernel| Box::new(WindowKey { kernel, geometry }) as Box<dyn KernelKey>));
    }
    keys
}

/// Bytes of the fields of a struct of a kernel's text, as the compiler lays them out.
fn size_in_text(text: &str, name: &str) -> usize {
    let start = text.find(&format!("struct {name} {{")).expect(name);
    let body = &text[start..start + text[start..].find("};").unwrap()];
    let mut size: usize = 0;
    let mut largest = 1;
    for line in body.lines().skip(1).map(str::trim).filter(|line| !line.starts_with("//") && !line.is_empty()) {
        let (kind, names) = line.trim_end_matches(';').split_once(' ').unwrap();
        let one = if kind == "i64" { 8 } else { 4 };
        largest = largest.max(one);
        for _ in names.split(',') {
            size = size.next_multiple_of(one) + one;
        }
    }
    size.next_multiple_of(largest)
}

#[test]
fn structs_are_those_of_the_texts() {
    macro_rules! text {
        ($name:literal) => {
            include_str!(concat!("../../../shaders/cuda/race/", $name))
        };
    }
    for (text, name, size) in [
        (text!("walk.cuh"), "Walk", size_of::<Walk>()),
        (text!("scan.cu"), "Scan", size_of::<Scan>()),
        (text!("add_parameters.cu"), "Shares", size_of::<Shares>()),
        (text!("any/any.cuh"), "Piece", size_of::<PieceParams>()),
        (text!("any/groups.cuh"), "Groups", size_of::<Groups>()),
        (text!("any/step.cu"), "Step", size_of::<Step>()),
        (text!("any/finish_parameters.cu"), "Finish", size_of::<Finish>()),
    ] {
        assert_eq!(size_in_text(text, name), size, "{name}");
    }
}

/// An append with a window for which memory runs out, wherever it does, leaves both halves of the state as they were. The
/// lengths of so many sequences take memory too.
#[test]
fn an_append_without_memory_moves_nothing() {
    let Some(name) = std::env::var("SOFTHASH_TEST_DEVICE").ok().filter(|name| name.starts_with("cuda")) else { return };
    let device = Device::by_name(&name).unwrap();
    let ctx = device.cuda_context().unwrap();
    let shape = RaceShape { num_q_heads: 2, num_kv_heads: 1, head_dim: 16, value_dim: 16, dtype: DType::F32 };
    // The last is more than one piece.
    for (batch, tokens) in [(17, 1), (17, 3), (4, 40_000)] {
        let config = RaceConfig { window: 4, ..RaceConfig::default() };
        let mut race = Race::new(&device, config, shape).unwrap();
        let values: Vec<f32> = (0..batch * tokens * 32).map(|i| (i as f32 * 0.37).sin()).collect();
        let view = |heads: usize| TensorView::f32(&values[..batch * tokens * heads * 16], [batch, tokens, heads, 16]);
        let (q, kv) = (view(2), view(1));
        let mut state = race.new_state(batch).unwrap();
        // Where one sequence has no token a step takes lengths too.
        let lengths = (0..batch).map(|b| if b == 3 { 0 } else { tokens }).collect();
        let options = RaceOptions { lengths: Some(lengths), ..RaceOptions::default() };
        let append = |race: &mut Race, state: &mut RaceState| race.append_with(state, &q, &kv, &kv, &options).map(drop);
        append(&mut race, &mut state).unwrap();
        let mut twin = race.fork(&state).unwrap();
        let known = race.read_state(&state).unwrap();
        let mut refusals = 0;
        loop {
            ctx.refuse_after(refusals);
            let appended = append(&mut race, &mut state);
            ctx.refuse_after(u64::MAX);
            match appended {
                Ok(()) => break,
                Err(error) => assert!(matches!(error, Error::OutOfMemory { .. }), "{error}"),
            }
            assert!(race.read_state(&state).unwrap() == known, "{tokens} tokens, {refusals} pieces of memory");
            refusals += 1;
        }
        assert!(refusals > 3, "{refusals}");
        append(&mut race, &mut twin).unwrap();
        assert!(race.read_state(&state).unwrap() == race.read_state(&twin).unwrap());
    }
}

/// What the host asks for is what the kernels carve.
#[test]
fn shared_memory_is_that_of_the_texts() {
    // Printed by benches/cuda/race.cu for the same shapes.
    let g = |tables, planes| geometry((4, 4), (128, 128), (1, tables, planes), DType::Bf16, true);
    for (geometry, sums, forward, backward) in [
        (g(4, 4), 92672, (2, 102_912), (1, 175_104)),
        (g(2, 2), 83456, (2, 74304), (2, 102_464)),
        (g(3, 3), 86784, (2, 84096), (2, 115_328)),
    ] {
        let of = |fit: Option<shared::Fit>| fit.map(|fit| (fit.blocks, fit.bytes));
        assert_eq!(shared::sums(&geometry, 1), sums);
        assert_eq!(of(shared::forward(&geometry, 1, MOST)), Some(forward));
        assert_eq!(of(shared::backward(&geometry, 1, MOST)), Some(backward));
    }
}
