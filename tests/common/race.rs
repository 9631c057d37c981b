//! Problems of RACE attention in all shapes, and the reference's word on them.

use half::{bf16, f16};
use softhash::race::reference as math;
use softhash::{
    Beta, DType, Device, Gate, Hyperplanes, Normalization, Race, RaceConfig, RaceOptions, RaceShape, StateParts,
    Tensor, TensorView,
};

pub const ALL: [Normalization; 3] = [Normalization::Ratio, Normalization::BucketMean, Normalization::BucketSum];

/// ‖x − y‖ / ‖y‖.
pub fn error(x: &[f64], y: &[f64]) -> f64 {
    assert_eq!(x.len(), y.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut x.iter().zip(y).map(|(x, y)| x - y)) / norm(&mut y.iter().copied()).max(1e-300)
}

/// Values of about unit variance, the same for a seed everywhere.
pub fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (uniform() + uniform() + uniform() + uniform()) * 1.7).collect()
}

pub fn round(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::Bf16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

pub fn wide(x: &Tensor) -> Vec<f64> {
    x.read_blocking().unwrap().to_f32().into_iter().map(f64::from).collect()
}

/// Elements in their own dtype.
pub enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Elements {
    pub fn new(dtype: DType, x: &[f32]) -> Self {
        match dtype {
            DType::F16 => Self::F16(x.iter().map(|&x| f16::from_f32(x)).collect()),
            DType::Bf16 => Self::Bf16(x.iter().map(|&x| bf16::from_f32(x)).collect()),
            _ => Self::F32(x.to_vec()),
        }
    }

    pub fn view(&self, shape: [usize; 4]) -> TensorView<'_> {
        match self {
            Self::F32(x) => TensorView::f32(x, shape),
            Self::F16(x) => TensorView::f16(x, shape),
            Self::Bf16(x) => TensorView::bf16(x, shape),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Case {
    pub heads: (usize, usize),
    pub dims: (usize, usize),
    pub hash: (usize, usize),
    pub ensembles: usize,
    pub betas: Vec<f32>,
    pub normalization: Normalization,
    pub causal: bool,
    pub dtype: DType,
    /// Of o in a forward, of its gradient in a backward.
    pub output: DType,
    /// Of dq, dk and dv.
    pub gradients: DType,
    pub tokens: usize,
    pub lengths: Vec<usize>,
    pub initial: bool,
    /// Hyperplanes of each kv head's own.
    pub per_head: bool,
    /// Added to every value.
    pub offset: f32,
    /// Tokens of the exact window, 0 for none, and the gates that mix it in.
    pub window: usize,
    pub gates: Vec<f32>,
    pub window_scale: Option<f32>,
    /// Tokens that each sequence has seen before, which fill the ring of the window; with `initial`.
    pub seen: usize,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            heads: (2, 1),
            dims: (64, 64),
            hash: (4, 4),
            ensembles: 1,
            betas: vec![1.0],
            normalization: Normalization::Ratio,
            causal: true,
            dtype: DType::F32,
            output: DType::F32,
            gradients: DType::F32,
            tokens: 65,
            lengths: vec![65],
            initial: false,
            per_head: false,
            offset: 0.0,
            window: 0,
            gates: vec![0.5],
            window_scale: None,
            seen: 0,
        }
    }
}

pub struct Data {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub grad_o: Vec<f32>,
    pub planes: Vec<f32>,
    pub initial: StateParts,
    pub grad_final: StateParts,
}

/// One (sequence, kv head, ensemble) of a case.
pub struct Unit<'a> {
    pub batch: usize,
    pub kv_head: usize,
    pub ensemble: usize,
    pub problem: math::Problem<'a>,
    pub initial: math::State,
}

impl Case {
    pub fn batch(&self) -> usize {
        self.lengths.len()
    }

    pub fn buckets(&self) -> usize {
        self.hash.0 << self.hash.1
    }

    /// Hyperplanes of one ensemble.
    pub fn bits(&self) -> usize {
        self.hash.0 * self.hash.1
    }

    pub fn data(&self) -> Data {
        let (hq, hkv) = self.heads;
        let (d, dv) = self.dims;
        let rows = self.batch() * self.tokens;
        let rounded = |seed, n, scale: f32, offset: f32| -> Vec<f32> {
            noise(seed, n).into_iter().map(|x| round(self.dtype, x * scale + offset)).collect()
        };
        let sets = if self.per_head { hkv } else { 1 };
        let units = self.batch() * hkv * self.ensembles * self.buckets();
        // Masses as of keys seen before, and values within them.
        let a: Vec<f64> = noise(5, units).iter().map(|x| 3.0 + f64::from(*x)).collect();
        let b: Vec<f64> = noise(6, units * dv).iter().map(|x| f64::from(*x) * 2.0).collect();
        let zero = |x: Vec<f64>| if self.initial { x } else { vec![0.0; x.len()] };
        let small = |seed, n| noise(seed, n).iter().map(|x| f64::from(*x) * 0.1).collect();
        let (ring, grad_ring) = (self.ring(10, true), self.ring(12, false));
        let parts = |a, b, [window_k, window_v]: [Vec<f32>; 2]| StateParts { a, b, window_k, window_v };
        Data {
            // Projections of about unit variance.
            q: rounded(1, rows * hq * d, 1.0 / (d as f32).sqrt(), 0.0),
            k: rounded(2, rows * hkv * d, 1.0 / (d as f32).sqrt(), 0.0),
            v: rounded(3, rows * hkv * dv, 1.0, self.offset),
            grad_o: noise(7, rows * hq * dv).into_iter().map(|x| round(self.output, x)).collect(),
            planes: noise(4, sets * self.ensembles * self.bits() * d),
            initial: parts(zero(a), zero(b), ring),
            grad_final: parts(zero(small(8, units)), zero(small(9, units * dv)), grad_ring),
        }
    }

    /// Keys and values of the window's ring, or gradients of them: zero in slots that no token has reached.
    fn ring(&self, seed: u64, of_state: bool) -> [Vec<f32>; 2] {
        [self.dims.0, self.dims.1].map(|dim| {
            let row = self.heads.1 * dim;
            let mut x = noise(seed + dim as u64, self.batch() * self.window * row);
            for (i, row) in x.chunks_exact_mut(row.max(1)).enumerate() {
                let (b, slot) = (i / self.window, i % self.window);
                let filled = self.seen + if of_state { 0 } else { self.lengths[b] };
                let known = if self.initial { filled } else { 0 };
                for x in row {
                    *x = if slot < known { round(self.dtype, *x * 0.5) } else { 0.0 };
                }
            }
            x
        })
    }

    pub fn race_on(&self, device: &Device, data: &Data) -> Race {
        let beta = if self.betas.len() == 1 { Beta::Shared(self.betas[0]) } else { Beta::PerHead(self.betas.clone()) };
        let config = RaceConfig {
            tables: self.hash.0,
            planes: self.hash.1,
            ensembles: self.ensembles,
            beta,
            normalization: self.normalization,
            causal: self.causal,
            hyperplanes: Hyperplanes::Supplied(data.planes.clone().into()),
            window: self.window,
            gate: if self.gates.len() == 1 { Gate::Shared(self.gates[0]) } else { Gate::PerHead(self.gates.clone()) },
            window_scale: self.window_scale,
        };
        let shape = RaceShape {
            num_q_heads: self.heads.0,
            num_kv_heads: self.heads.1,
            head_dim: self.dims.0,
            value_dim: self.dims.1,
            dtype: self.dtype,
        };
        Race::new(device, config, shape).unwrap()
    }

    pub fn options(&self) -> RaceOptions {
        RaceOptions { output: Some(self.output), gradients: Some(self.gradients), lengths: Some(self.lengths.clone()) }
    }

    /// Tokens of one head and sequence.
    pub fn rows(&self, x: &[f32], batch: usize, heads: usize, head: usize, dim: usize) -> Vec<f64> {
        let at = |t: usize| ((batch * self.tokens + t) * heads + head) * dim;
        (0..self.lengths[batch]).flat_map(|t| &x[at(t)..at(t) + dim]).map(|&x| f64::from(x)).collect()
    }

    /// The reverse: adds `rows` to a tensor.
    pub fn add_rows(&self, x: &mut [f64], batch: usize, heads: usize, head: usize, rows: &[f64], weight: f64) {
        let dim = rows.len() / self.lengths[batch].max(1);
        for (t, row) in rows.chunks_exact(dim.max(1)).enumerate() {
            let at = ((batch * self.tokens + t) * heads + head) * dim;
            x[at..at + dim].iter_mut().zip(row).for_each(|(o, x)| *o += weight * x);
        }
    }

    /// Calls `body` for each unit in a state's order.
    pub fn each_unit(&self, data: &Data, body: &mut dyn FnMut(Unit<'_>)) {
        let (hq, hkv) = self.heads;
        let (d, dv) = self.dims;
        let group = hq / hkv;
        for batch in 0..self.batch() {
            for kv_head in 0..hkv {
                let (k, v) = (self.rows(&data.k, batch, hkv, kv_head, d), self.rows(&data.v, batch, hkv, kv_head, dv));
                let q: Vec<_> = (0..group).map(|g| self.rows(&data.q, batch, hq, kv_head * group + g, d)).collect();
                for ensemble in 0..self.ensembles {
                    let one = self.bits() * d;
                    let at = (if self.per_head { kv_head } else { 0 } * self.ensembles + ensemble) * one;
                    let planes: Vec<f64> = data.planes[at..at + one].iter().map(|&x| f64::from(x)).collect();
                    let problem = math::Problem {
                        tables: self.hash.0,
                        planes_per_table: self.hash.1,
                        planes: &planes,
                        beta: f64::from(self.betas[kv_head % self.betas.len()]),
                        normalization: self.normalization,
                        epsilon: Normalization::EPSILON,
                        causal: self.causal,
                        head_dim: d,
                        value_dim: dv,
                        q: q.iter().map(Vec::as_slice).collect(),
                        k: &k,
                        v: &v,
                    };
                    let initial = self.state(&data.initial, batch, kv_head, ensemble);
                    body(Unit { batch, kv_head, ensemble, problem, initial });
                }
            }
        }
    }

    /// One unit of a state or of its gradient.
    pub fn state(&self, parts: &StateParts, batch: usize, kv_head: usize, ensemble: usize) -> math::State {
        let u = (batch * self.heads.1 + kv_head) * self.ensembles + ensemble;
        let (s, dv) = (self.buckets(), self.dims.1);
        math::State { a: parts.a[u * s..(u + 1) * s].to_vec(), b: parts.b[u * s * dv..(u + 1) * s * dv].to_vec() }
    }

    /// Shapes of q, k, v and grad_o.
    pub fn shapes(&self) -> [[usize; 4]; 4] {
        let (b, t) = (self.batch(), self.tokens);
        let of = |heads, dim| [b, t, heads, dim];
        let ((hq, hkv), (d, dv)) = (self.heads, self.dims);
        [of(hq, d), of(hkv, d), of(hkv, dv), of(hq, dv)]
    }

    /// q, k, v and grad_o.
    pub fn elements(&self, data: &Data) -> [Elements; 4] {
        let of = |x: &[f32]| Elements::new(self.dtype, x);
        [of(&data.q), of(&data.k), of(&data.v), Elements::new(self.output, &data.grad_o)]
    }

    pub fn name(&self) -> String {
        format!(
            "heads {:?} dims {:?} hash {:?} x{} β {:?} {:?} causal {} {:?}→{:?} lengths {:?} initial {}",
            self.heads,
            self.dims,
            self.hash,
            self.ensembles,
            self.betas,
            self.normalization,
            self.causal,
            self.dtype,
            self.output,
            self.lengths,
            self.initial
        )
    }
}
