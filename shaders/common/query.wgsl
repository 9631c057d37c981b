#import elements
// The query input, `[batch, token, head, channel]` by strides, in q's dtype.
@group(0) @binding(1) var<storage, read> q: array<u32>;

fn query_element(batch: u32, token: u32, head: u32, channel: u32) -> f32 {
    let at = p.in_offset + batch * p.in_batch + token * p.in_token + head * p.in_head + channel;
#ifdef Q_F32
    return finite_or_zero(q[at]);
#endif
#ifdef Q_BF16
    return bf16_element(q[at >> 1u], at);
#endif
#ifdef Q_F16
    return f16_element(q[at >> 1u], at);
#endif
}
