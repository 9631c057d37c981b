//! What the benches share.

#![allow(dead_code, reason = "each of them takes a part of it")]

pub mod ceiling;
pub mod clock;
#[path = "../../examples/common/counter.rs"]
pub mod counter;
#[path = "../../examples/common/counter_gpu.rs"]
pub mod counter_gpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
pub mod judge;
pub mod origin;
pub mod outcome;
pub mod race_dense;
pub mod race_layer;
pub mod race_record;
pub mod race_step;
#[path = "../../examples/common/race_truth.rs"]
pub mod race_truth;
pub mod race_window;
pub mod record;
pub mod resident;
pub mod scorings;
pub mod step;
