//! The CPU executor.

use crate::error::{Error, Result};
use crate::socket::executor::{Attended, Executor, Memory, Recording, SequenceData};
use crate::socket::problem::{AppendRow, AttendProblem, CacheSpec, SeqState};
use crate::tensor::TensorView;

pub(crate) struct CpuExecutor {}

impl CpuExecutor {
    pub fn new(_spec: &CacheSpec) -> Result<Self> {
        Ok(Self {})
    }
}

fn later<T>() -> Result<T> {
    Err(Error::Unsupported { op: "cpu", why: "being written".into() })
}

impl Executor for CpuExecutor {
    fn reserve(&mut self, _: usize) -> Result<()> {
        later()
    }
    fn append(&mut self, _: Recording<'_>, _: &TensorView<'_>, _: &TensorView<'_>, _: &[AppendRow]) -> Result<()> {
        later()
    }
    fn attend(&mut self, _: Recording<'_>, _: &TensorView<'_>, _: &AttendProblem) -> Result<Attended> {
        later()
    }
    fn truncate(&mut self, _: usize, _: SeqState) -> Result<()> {
        later()
    }
    fn fork(&mut self, _: Option<usize>, _: SeqState) -> Result<()> {
        later()
    }
    fn remove(&mut self, _: usize) -> Result<()> {
        later()
    }
    fn memory(&self) -> Memory {
        Memory::default()
    }
    fn non_finite_seen(&mut self) -> Result<u64> {
        Ok(0)
    }
    fn export(&mut self, _: usize, _: SeqState) -> Result<SequenceData> {
        later()
    }
    fn import(&mut self, _: usize, _: &SequenceData) -> Result<()> {
        later()
    }
}
