//! The formulas of spec §2 and §3 in f64, stage by stage, for reading.
