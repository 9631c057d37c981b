//! Choosing what runs the work, and saying what was chosen.

use crate::error::Result;
use crate::socket::cpu::CpuExecutor;
use crate::socket::executor::Executor;
use crate::socket::problem::CacheSpec;

/// What runs the work: the CPU, or a GPU. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Device {
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Cpu,
}

impl Device {
    /// The CPU path, which always works.
    pub fn cpu() -> Self {
        Self { kind: Kind::Cpu }
    }

    /// Whether this is the CPU path.
    pub fn is_cpu(&self) -> bool {
        matches!(self.kind, Kind::Cpu)
    }

    pub(crate) fn executor(&self, spec: &CacheSpec) -> Result<Box<dyn Executor>> {
        match &self.kind {
            Kind::Cpu => Ok(Box::new(CpuExecutor::new(spec)?)),
        }
    }
}
