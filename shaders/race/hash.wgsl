// Buckets of an ensemble, its hyperplanes, and the buckets R of a table.
const BUCKETS: u32 = TABLES << PLANES;
const BITS: u32 = TABLES * PLANES;
const SIZE: f32 = f32(1u << PLANES);

// (σ(−z), σ(z)), both to their own relative precision.
fn logistic_pair(z: f32) -> vec2<f32> {
    let e = exp(-abs(z));
    let large = 1.0 / (1.0 + e);
    let small = e * large;
    return select(vec2<f32>(large, small), vec2<f32>(small, large), z > 0.0);
}
