//! The truth of [`crate::race_truth`] with its sums over all tokens made on a CUDA device, in doubles: a billion tokens
//! in seconds where 16 cores take minutes. Some pieces, drawn from all of the context, are summed on the host too and
//! compared.

use crate::counter::Part;
use crate::counter_cuda::compile;
use crate::race_truth::{At, Sums, Truth};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use softhash::cudarc::driver::{CudaFunction, CudaSlice, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg};
use softhash::cudarc::nvrtc::Ptx;
use softhash::{Device, StreamFailure};
use std::ops::Range;
use std::sync::Arc;

const TEXT: &str = include_str!("truth.cu");
/// `TILE` of that text, and bytes of shared memory that a block may have.
const TILE: usize = 16;
const SHARED: usize = 48 << 10;
/// Pieces that are summed at once.
const PIECES: usize = 4096;
/// Pieces that the host sums too.
const COMPARED: usize = 32;
/// Relative difference that two sums in doubles may have in another order.
const TOLERANCE: f64 = 1e-9;

type Result<T> = std::result::Result<T, StreamFailure>;

/// Twin of `Tensors` in truth.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Tensors {
    parts: [(u32, f32); 4],
    period: u32,
    reserved: u32,
    beta: f64,
}

// SAFETY: numbers, laid out as the kernel's struct is.
unsafe impl DeviceRepr for Tensors {}

/// The kernels for a truth, compiled; `None` for shapes that they do not take.
pub fn kernels(truth: &Truth) -> Result<Option<Ptx>> {
    let (channels, planes) = (truth.counter.channels, truth.planes_per_table);
    let tables = truth.planes.len() / channels / planes;
    let buckets = tables << planes;
    let shared = TILE * 8 * (channels + 1 + tables * planes + 3 * buckets + 2);
    let fits = channels.is_power_of_two() && (32..=512).contains(&channels) && buckets <= channels;
    if !fits || shared > SHARED {
        return Ok(None);
    }
    let defines = [("HEAD", truth.head), ("PLANES", planes), ("TABLES", tables)];
    compile(&truth.counter, TEXT, &defines).map(Some)
}

struct Summer<'a> {
    truth: &'a Truth,
    stream: Arc<CudaStream>,
    absorbed: CudaFunction,
    sent: CudaFunction,
    tensors: Tensors,
    planes: CudaSlice<f64>,
}

impl Summer<'_> {
    /// Sums of each piece: of its keys, or, given the sums before each, of what its queries send.
    fn sums(&self, pieces: &[Range<u64>], before: Option<&[Sums]>, progress: &dyn Fn(u64)) -> Result<Vec<Sums>> {
        let zeros = self.truth.zeros();
        let one = zeros.a.len() + zeros.b.len();
        let mut all = Vec::with_capacity(pieces.len());
        for (i, some) in pieces.chunks(PIECES).enumerate() {
            let mut cuts: Vec<u64> = some.iter().map(|piece| piece.start).collect();
            cuts.extend(some.last().map(|piece| piece.end));
            let cuts = self.stream.clone_htod(&cuts)?;
            let mut out = self.stream.alloc_zeros::<f64>(some.len() * one)?;
            let given = before.map(|before| {
                let before = &before[i * PIECES..][..some.len()];
                let flat: Vec<f64> = before.iter().flat_map(|sums| sums.a.iter().chain(&sums.b).copied()).collect();
                self.stream.clone_htod(&flat)
            });
            let given = given.transpose()?;
            let kernel = if given.is_some() { &self.sent } else { &self.absorbed };
            let mut launch = self.stream.launch_builder(kernel);
            launch.arg(&self.tensors).arg(&self.planes).arg(&cuts);
            if let Some(given) = &given {
                launch.arg(given);
            }
            launch.arg(&mut out);
            let (blocks, threads) = (some.len() as u32, self.truth.counter.channels as u32);
            let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
            // SAFETY: the arguments are the kernel's; a block reads two cuts and one piece's sums, and writes those of
            // one piece.
            unsafe { launch.launch(config) }?;
            let made = self.stream.clone_dtoh(&out)?;
            let split = |sums: &[f64]| {
                let (a, b) = sums.split_at(zeros.a.len());
                Sums { a: a.to_vec(), b: b.to_vec() }
            };
            all.extend(made.chunks_exact(one).map(split));
            progress(some.iter().map(|piece| piece.end - piece.start).sum());
        }
        Ok(all)
    }

    /// The host's sums of the `drawn` pieces are those of the device.
    fn compare(&self, pieces: &[Range<u64>], before: Option<&[Sums]>, made: &[Sums], drawn: &[usize]) -> Result<f64> {
        let errors = drawn.par_iter().map(|&i| {
            let host = self.truth.sums(pieces[i].clone(), before.map(|before| before[i].clone()));
            let error = |a: &[f64], b: &[f64]| crate::race_truth::error(a, b);
            error(&made[i].a, &host.a).max(error(&made[i].b, &host.b))
        });
        let worst = errors.reduce(|| 0.0, f64::max);
        if worst > TOLERANCE {
            return Err(format!("the device's sums in doubles are off by {worst:.0e} from the host's").into());
        }
        Ok(worst)
    }
}

/// As [`Truth::at`]; `None` where the device or the shape is none for it.
pub fn at(
    device: &Device,
    truth: &Truth,
    tokens: u64,
    wanted: &[u64],
    backward: bool,
    progress: impl Fn(u64),
) -> Result<Option<Vec<At>>> {
    let Some((context, stream)) = device.as_cuda() else { return Ok(None) };
    let Some(ptx) = kernels(truth)? else { return Ok(None) };
    let module = context.load_module(ptx)?;
    let words = [Part::Q, Part::K, Part::V, Part::GradO].map(|part| truth.counter.shader_words(part, 0));
    let tensors = Tensors {
        parts: words.map(|[base, _, _, _, _, scale, _]| (base, f32::from_bits(scale))),
        period: words[0][4],
        reserved: 0,
        beta: truth.beta,
    };
    let summer = Summer {
        truth,
        stream: stream.clone(),
        absorbed: module.load_function("absorbed")?,
        sent: module.load_function("sent")?,
        tensors,
        planes: stream.clone_htod(&truth.planes)?,
    };
    let pieces = truth.pieces(tokens, wanted);
    let mut rng = ChaCha8Rng::seed_from_u64(tokens);
    let mut drawn: Vec<usize> = (1..COMPARED).map(|_| (rng.next_u64() % pieces.len() as u64) as usize).collect();
    drawn.push(pieces.len() - 1);

    let absorbed = summer.sums(&pieces, None, &progress)?;
    let mut worst = summer.compare(&pieces, None, &absorbed, &drawn)?;
    // The sums before every piece, and after the last.
    let mut states = vec![truth.zeros()];
    for sums in &absorbed {
        let mut next = states[states.len() - 1].clone();
        next.add_all(sums);
        states.push(next);
    }
    drop(absorbed);
    let mut later = Vec::new();
    if backward {
        let before = &states[..pieces.len()];
        later = summer.sums(&pieces, Some(before), &progress)?;
        worst = worst.max(summer.compare(&pieces, Some(before), &later, &drawn)?);
        for i in (1..later.len()).rev() {
            let (before, after) = later.split_at_mut(i);
            before[i - 1].add_all(&after[0]);
        }
    }
    println!("sums in doubles made on the device; {COMPARED} pieces of them on the host too, within {worst:.0e}");
    let piece_of = |token: u64| pieces.partition_point(|piece| piece.start < token);
    let one = |&token: &u64| truth.one(token, &states[piece_of(token) + 1], later.get(piece_of(token)));
    Ok(Some(wanted.iter().map(one).collect()))
}
