//! What the property tests share: problems, ways to fill a cache, and the judge.

pub mod device;
pub mod judge;
pub mod problem;
