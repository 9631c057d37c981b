//! Steps of SOCKET replayed as a CUDA graph.

use super::cuda::seconds;
use super::data::Problem;
use softhash::{Attended, DType, DecodeOptions, Device, SocketCache, TensorView};

/// Launches of a graph that one figure is the mean of.
const REPLAYS: u32 = 20;

/// Gives the seconds of one decode, as a graph; `None` where the device is not CUDA.
pub fn replayed(
    device: &Device,
    cache: &mut SocketCache,
    problem: &Problem,
    options: &DecodeOptions,
) -> Option<impl FnMut() -> f64 + use<>> {
    let (_, stream) = device.as_cuda()?;
    let timer = device.cuda_timer(1).unwrap()?;
    let bits: &[u16] = bytemuck::cast_slice(problem.query_elements());
    let query = stream.clone_htod(bits).unwrap();
    let shape = [1, 1, problem.q_heads, problem.head_dim];
    let view = TensorView::cuda_slice(&query, 0, DType::Bf16, shape);
    let read = |result: &Attended| result.o.read_blocking().unwrap();
    let expected = read(&cache.decode_with(&view, options).unwrap());
    let (mut graph, result) = device.capture(|| cache.decode_with(&view, options)).unwrap();
    graph.launch().unwrap();
    assert!(read(&result) == expected, "a replayed step gives another result: no times are taken");
    Some(move || {
        // Held for as long as the graph reads and writes them.
        let _ = (&query, &result);
        let launch = || (0..REPLAYS).for_each(|_| graph.launch().unwrap());
        seconds(&timer, launch) / f64::from(REPLAYS)
    })
}
