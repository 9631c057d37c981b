//! [`Race`]'s states: made, copied, to the host and back.

use crate::error::{Error, Result};
use crate::race::attention::Race;
use crate::race::executor::StateData;
use crate::race::state::{RaceState, StateGradient, StateParts};
use crate::race::window::{Ring, RingData};

impl Race {
    /// The state of `batch` sequences that have seen nothing.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Limit`].
    pub fn new_state(&self, batch: usize) -> Result<RaceState> {
        let storage = self.executor.new_state("new_state", batch)?;
        let ring = self.window.as_ref().map(|window| window.new_ring("new_state", batch, false)).transpose()?;
        Ok(RaceState { storage, ring, shape: self.state_shape(), tokens: vec![0; batch] })
    }

    /// A copy that goes its own way: a shared prefix, or a snapshot to roll back to.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::WrongDevice`] for a state of another configuration or device,
    /// [`Error::OutOfMemory`].
    pub fn fork(&self, state: &RaceState) -> Result<RaceState> {
        let op = "fork";
        self.check_state(op, state, state.batch())?;
        let storage = self.executor.fork(op, &state.storage)?;
        let ring = self.fork_ring(op, state.ring.as_ref())?;
        Ok(RaceState { storage, ring, shape: state.shape, tokens: state.tokens.clone() })
    }

    pub(super) fn fork_ring(&self, op: &'static str, ring: Option<&Ring>) -> Result<Option<Ring>> {
        self.window.as_ref().zip(ring).map(|(window, ring)| window.fork(op, ring)).transpose()
    }

    fn export_ring(&self, op: &'static str, ring: Option<&Ring>) -> Result<Option<RingData>> {
        self.window.as_ref().zip(ring).map(|(window, ring)| window.export(op, ring)).transpose()
    }

    fn import_ring(&self, op: &'static str, parts: &StateParts, tokens: &[u64], grad: bool) -> Result<Option<Ring>> {
        let data = RingData { k: parts.window_k.clone(), v: parts.window_v.clone() };
        self.window.as_ref().map(|window| window.import(op, &data, tokens, grad)).transpose()
    }

    /// A and B, and the window's keys and values, on the host.
    ///
    /// # Errors
    /// As [`Race::fork`]; [`Error::DeviceLost`]; [`Error::Unsupported`] for a state with a window that replays of a CUDA
    /// graph moved on, whose tokens are not counted.
    pub fn read_state(&self, state: &RaceState) -> Result<StateParts> {
        let op = "read_state";
        self.check_state(op, state, state.batch())?;
        if let Some((window, ring)) = self.window.as_ref().zip(state.ring.as_ref()) {
            window.check_count(op, ring, &state.tokens)?;
        }
        let ring = self.export_ring(op, state.ring.as_ref())?;
        Ok(StateParts::new(self.executor.export(op, &state.storage)?, ring))
    }

    /// A state from A and B, the window's keys and values (rounded to their dtype), and the number of tokens that each
    /// sequence has taken in.
    ///
    /// # Errors
    /// [`Error::Shape`] for lengths that do not fit, [`Error::NonFinite`] for values that are not finite or, in A,
    /// negative; [`Error::OutOfMemory`].
    pub fn write_state(&self, parts: &StateParts, tokens: &[u64]) -> Result<RaceState> {
        let op = "write_state";
        parts.check(op, &self.state_shape(), tokens.len(), true)?;
        let storage = self.executor.import(op, &StateData { a: parts.a.clone(), b: parts.b.clone() })?;
        let ring = self.import_ring(op, parts, tokens, false)?;
        Ok(RaceState { storage, ring, shape: self.state_shape(), tokens: tokens.to_vec() })
    }

    /// The gradient of a state on the host.
    ///
    /// # Errors
    /// As [`Race::read_state`].
    pub fn read_state_gradient(&self, gradient: &StateGradient) -> Result<StateParts> {
        let op = "read_state_gradient";
        self.check_gradient(op, gradient, gradient.batch)?;
        let ring = self.export_ring(op, gradient.ring.as_ref())?;
        Ok(StateParts::new(self.executor.export(op, &gradient.storage)?, ring))
    }

    /// The gradient of a state, from the host.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`], [`Error::OutOfMemory`].
    pub fn write_state_gradient(&self, parts: &StateParts, batch: usize) -> Result<StateGradient> {
        let op = "write_state_gradient";
        parts.check(op, &self.state_shape(), batch, false)?;
        let storage = self.executor.import(op, &StateData { a: parts.a.clone(), b: parts.b.clone() })?;
        let ring = self.import_ring(op, parts, &vec![0; batch], true)?;
        Ok(StateGradient { storage, ring, shape: self.state_shape(), batch })
    }

    pub(super) fn check_state(&self, op: &'static str, state: &RaceState, batch: usize) -> Result<()> {
        self.state_shape().check(op, "state", &state.shape)?;
        check_batch(op, "state", state.batch(), batch)
    }

    pub(super) fn check_gradient(&self, op: &'static str, gradient: &StateGradient, batch: usize) -> Result<()> {
        self.state_shape().check(op, "state gradient", &gradient.shape)?;
        check_batch(op, "state gradient", gradient.batch, batch)
    }
}

fn check_batch(op: &'static str, tensor: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { op, tensor, got: vec![got], expected: format!("{expected} sequences") })
}
