//! The CPU executor.

use crate::engine::Recording;
use crate::error::Result;
use crate::race::config::{Parameters, RaceConfig, RaceShape};
use crate::race::executor::{
    Call, InputGradients, Inputs, ParameterSums, Pass, RaceExecutor, StateData, StateStorage, needed,
};
use crate::race::reference::{self, Problem, State};
use crate::tensor::convert::{encode, host_values};
use crate::tensor::{DType, Tensor};

/// A and B in f64, `[batch, num_kv_heads, ensembles, buckets]` and that times `value_dim`.
#[derive(Clone, Debug)]
pub(crate) struct CpuState {
    pub a: Vec<f64>,
    pub b: Vec<f64>,
}

impl CpuState {
    pub fn bytes(&self) -> u64 {
        ((self.a.len() + self.b.len()) * 8) as u64
    }
}

struct Unit {
    planes: Vec<f64>,
    beta: f64,
    q: Vec<Vec<f64>>,
    grad_o: Vec<Vec<f64>>,
    k: Vec<f64>,
    v: Vec<f64>,
}

impl Unit {
    fn problem(&self, race: &CpuRace) -> Problem<'_> {
        Problem {
            tables: race.config.tables,
            planes_per_table: race.config.planes,
            planes: &self.planes,
            beta: self.beta,
            normalization: race.config.normalization,
            epsilon: crate::Normalization::EPSILON,
            causal: true,
            head_dim: race.shape.head_dim,
            value_dim: race.shape.value_dim,
            q: self.q.iter().map(Vec::as_slice).collect(),
            k: &self.k,
            v: &self.v,
        }
    }
}

impl CpuState {
    fn unit(&self, race: &CpuRace, [b, kv_head, ensemble]: [usize; 3]) -> State {
        let (s, d) = (race.config.buckets(), race.shape.value_dim);
        let u = (b * race.shape.num_kv_heads + kv_head) * race.config.ensembles + ensemble;
        State { a: self.a[u * s..(u + 1) * s].to_vec(), b: self.b[u * s * d..(u + 1) * s * d].to_vec() }
    }

    fn set_unit(&mut self, race: &CpuRace, [b, kv_head, ensemble]: [usize; 3], state: &State) {
        let (s, d) = (race.config.buckets(), race.shape.value_dim);
        let u = (b * race.shape.num_kv_heads + kv_head) * race.config.ensembles + ensemble;
        self.a[u * s..(u + 1) * s].copy_from_slice(&state.a);
        self.b[u * s * d..(u + 1) * s * d].copy_from_slice(&state.b);
    }
}

/// Gradients of β and of the hyperplanes, in f64.
#[derive(Clone, Debug)]
pub(crate) struct CpuParameterSums {
    pub beta: Vec<f64>,
    pub planes: Vec<f64>,
}

/// The CPU executor.
pub(crate) struct CpuRace {
    config: RaceConfig,
    shape: RaceShape,
    parameters: Parameters,
}

impl CpuRace {
    pub fn new(config: &RaceConfig, shape: &RaceShape, parameters: &Parameters) -> Result<Self> {
        Ok(Self { config: config.clone(), shape: *shape, parameters: parameters.clone() })
    }

    fn units(&self) -> usize {
        self.shape.num_kv_heads * self.config.ensembles
    }

    fn values(&self, op: &'static str, inputs: &Inputs<'_>) -> Result<[Vec<f32>; 4]> {
        let q = host_values(op, "q", &needed(op, "q", inputs.q)?)?;
        let k = host_values(op, "k", &needed(op, "k", inputs.k)?)?;
        let v = host_values(op, "v", &needed(op, "v", inputs.v)?)?;
        let grad_o = match &inputs.grad_o {
            Some(view) => host_values(op, "grad_o", view)?,
            None => Vec::new(),
        };
        Ok([q, k, v, grad_o])
    }

    /// Sequence, kv head, ensemble; and what they attend.
    fn problems(&self, call: &Call, [q, k, v, grad_o]: &[Vec<f32>; 4]) -> Vec<([usize; 3], Unit)> {
        let s = &self.shape;
        let mut out = Vec::new();
        for (b, &length) in call.lengths.iter().enumerate() {
            for kv_head in 0..s.num_kv_heads {
                for ensemble in 0..self.config.ensembles {
                    let of = |x: &[f32], heads, dim, head| {
                        if x.is_empty() {
                            return Vec::new();
                        }
                        Self::rows(x, [call.tokens, heads, dim], b, head, length)
                    };
                    let group = kv_head * s.group()..(kv_head + 1) * s.group();
                    let planes = self.parameters.rows(&self.config, kv_head, ensemble);
                    out.push((
                        [b, kv_head, ensemble],
                        Unit {
                            planes: planes.iter().map(|&w| f64::from(w)).collect(),
                            beta: f64::from(self.parameters.beta.of_head(kv_head)),
                            q: group.clone().map(|h| of(q, s.num_q_heads, s.head_dim, h)).collect(),
                            grad_o: group.map(|h| of(grad_o, s.num_q_heads, s.value_dim, h)).collect(),
                            k: of(k, s.num_kv_heads, s.head_dim, kv_head),
                            v: of(v, s.num_kv_heads, s.value_dim, kv_head),
                        },
                    ));
                }
            }
        }
        out
    }

    /// Rows of one head and sequence as f64.
    fn rows(x: &[f32], [tokens, heads, dim]: [usize; 3], b: usize, head: usize, length: usize) -> Vec<f64> {
        let row = |t: usize| &x[((b * tokens + t) * heads + head) * dim..][..dim];
        (0..length).flat_map(|t| row(t).iter().map(|&x| f64::from(x))).collect()
    }
}

fn put(x: &mut [f32], [tokens, heads, dim]: [usize; 3], b: usize, head: usize, rows: &[f64], weight: f64) {
    for (t, row) in rows.chunks_exact(dim).enumerate() {
        let at = ((b * tokens + t) * heads + head) * dim;
        x[at..at + dim].iter_mut().zip(row).for_each(|(x, y)| *x += (weight * y) as f32);
    }
}

impl RaceExecutor for CpuRace {
    fn set_parameters(&mut self, parameters: &Parameters) -> Result<()> {
        self.parameters = parameters.clone();
        Ok(())
    }

    fn new_state(&self, _: &'static str, batch: usize) -> Result<StateStorage> {
        let masses = batch * self.units() * self.config.buckets();
        Ok(StateStorage::Cpu(CpuState { a: vec![0.0; masses], b: vec![0.0; masses * self.shape.value_dim] }))
    }

    fn fork(&self, op: &'static str, state: &StateStorage) -> Result<StateStorage> {
        Ok(StateStorage::Cpu(state.cpu(op)?.clone()))
    }

    fn new_sums(&self, _: &'static str) -> Result<ParameterSums> {
        let planes = vec![0.0; self.parameters.planes.rows.len()];
        Ok(ParameterSums::Cpu(CpuParameterSums { beta: vec![0.0; self.parameters.beta.values().len()], planes }))
    }

    fn forward(
        &mut self,
        _: Recording<'_>,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &mut StateStorage,
    ) -> Result<Option<Tensor>> {
        let op = call.op;
        if call.pass != Pass::Causal {
            return Err(crate::Error::Unsupported { op, why: "attention that is not causal".into() });
        }
        let values = self.values(op, inputs)?;
        let state = state.cpu_mut(op)?;
        let mut o = vec![0f32; call.batch() * call.tokens * self.shape.num_q_heads * self.shape.value_dim];
        for (unit, before) in self.problems(call, &values) {
            let (heads, after) = reference::forward(&before.problem(self), &state.unit(self, unit));
            for (g, rows) in heads.iter().enumerate() {
                let head = unit[1] * self.shape.group() + g;
                let dims = [call.tokens, self.shape.num_q_heads, self.shape.value_dim];
                put(&mut o, dims, unit[0], head, rows, 1.0 / self.config.ensembles as f64);
            }
            state.set_unit(self, unit, &after);
        }
        let shape = vec![call.batch(), call.tokens, self.shape.num_q_heads, self.shape.value_dim];
        Ok(Some(Tensor::host(call.output, shape, encode(call.output, &o))))
    }

    fn backward(
        &mut self,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &StateStorage,
        grad_state: &mut StateStorage,
        sums: &mut ParameterSums,
    ) -> Result<InputGradients> {
        let op = call.op;
        if call.pass != Pass::Causal {
            return Err(crate::Error::Unsupported { op, why: "attention that is not causal".into() });
        }
        let values = self.values(op, inputs)?;
        let (state, grad_state, sums) = (state.cpu(op)?, grad_state.cpu_mut(op)?, sums.cpu_mut(op)?);
        let s = &self.shape;
        let room = |heads, dim| vec![0f32; call.batch() * call.tokens * heads * dim];
        let mut dq = room(s.num_q_heads, s.head_dim);
        let (mut dk, mut dv) = (room(s.num_kv_heads, s.head_dim), room(s.num_kv_heads, s.value_dim));
        for (unit, before) in self.problems(call, &values) {
            let [b, kv_head, ensemble] = unit;
            let weight = 1.0 / self.config.ensembles as f64;
            let grads: Vec<Vec<f64>> = before.grad_o.iter().map(|g| g.iter().map(|g| g * weight).collect()).collect();
            let grads: Vec<&[f64]> = grads.iter().map(Vec::as_slice).collect();
            let out = reference::backward(
                &before.problem(self),
                &state.unit(self, unit),
                &grads,
                &grad_state.unit(self, unit),
            );
            for (g, rows) in out.dq.iter().enumerate() {
                put(&mut dq, [call.tokens, s.num_q_heads, s.head_dim], b, kv_head * s.group() + g, rows, 1.0);
            }
            put(&mut dk, [call.tokens, s.num_kv_heads, s.head_dim], b, kv_head, &out.dk, 1.0);
            put(&mut dv, [call.tokens, s.num_kv_heads, s.value_dim], b, kv_head, &out.dv, 1.0);
            grad_state.set_unit(self, unit, &out.dinitial);
            let beta = if sums.beta.len() == 1 { 0 } else { kv_head };
            sums.beta[beta] += out.dbeta;
            let one = out.dplanes.len();
            let set = if self.parameters.planes.sets == 1 { 0 } else { kv_head };
            let at = (set * self.config.ensembles + ensemble) * one;
            sums.planes[at..at + one].iter_mut().zip(&out.dplanes).for_each(|(x, y)| *x += y);
        }
        let tensor = |heads, dim, data: &[f32]| {
            Some(Tensor::host(DType::F32, vec![call.batch(), call.tokens, heads, dim], encode(DType::F32, data)))
        };
        Ok(InputGradients {
            dq: tensor(s.num_q_heads, s.head_dim, &dq),
            dk: tensor(s.num_kv_heads, s.head_dim, &dk),
            dv: tensor(s.num_kv_heads, s.value_dim, &dv),
        })
    }

    fn finish_sums(&self, op: &'static str, sums: ParameterSums) -> Result<(Tensor, Tensor)> {
        let sums = sums.cpu(op)?;
        let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
        let beta = Tensor::host(DType::F32, vec![sums.beta.len()], encode(DType::F32, &narrow(&sums.beta)));
        let planes = &self.parameters.planes;
        let shape = vec![planes.sets, planes.bits, planes.head_dim];
        Ok((beta, Tensor::host(DType::F32, shape, encode(DType::F32, &narrow(&sums.planes)))))
    }

    fn export(&self, op: &'static str, state: &StateStorage) -> Result<StateData> {
        let state = state.cpu(op)?;
        Ok(StateData { a: state.a.clone(), b: state.b.clone() })
    }

    fn import(&self, _: &'static str, data: &StateData) -> Result<StateStorage> {
        Ok(StateStorage::Cpu(CpuState { a: data.a.clone(), b: data.b.clone() }))
    }
}
