// Sum over the 256 invocations of a workgroup, in a fixed order.
var<workgroup> reduce_values: array<f32, 256>;

fn reduce_sum(local: u32, value: f32) -> f32 {
    workgroupBarrier();
    reduce_values[local] = value;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step = step >> 1u) {
        if local < step {
            reduce_values[local] = reduce_values[local] + reduce_values[local + step];
        }
        workgroupBarrier();
    }
    return reduce_values[0];
}
