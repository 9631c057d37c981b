// Per-key scalars of the scoring, from the norms that hashing comes by.
fn key_gain(value_norm: f32, key_square: f32, projection_sum: f32) -> f32 {
#ifdef SIGN_PROJECTION
    return select(0.0, key_square / projection_sum, projection_sum > 0.0);
#else
    return value_norm;
#endif
}

fn key_bias(value_norm: f32) -> f32 {
    return log(max(value_norm, 1.17549435e-38));
}
