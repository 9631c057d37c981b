// Sum and maximum over the 256 invocations of a workgroup, in a fixed order.
#ifdef SUBGROUPS
const REDUCE_PARTS: u32 = 256u / SUBGROUP;
var<workgroup> reduce_values: array<f32, REDUCE_PARTS>;

fn reduce_sum(local: u32, value: f32) -> f32 {
    var sum = value;
    for (var step = SUBGROUP / 2u; step > 0u; step = step >> 1u) {
        sum += subgroupShuffleXor(sum, step);
    }
    // An earlier sum may still be read.
    workgroupBarrier();
    if local % SUBGROUP == 0u {
        reduce_values[local / SUBGROUP] = sum;
    }
    workgroupBarrier();
    sum = 0.0;
    for (var i = 0u; i < REDUCE_PARTS; i++) {
        sum += reduce_values[i];
    }
    return sum;
}

fn reduce_max(local: u32, value: f32) -> f32 {
    var top = value;
    for (var step = SUBGROUP / 2u; step > 0u; step = step >> 1u) {
        top = max(top, subgroupShuffleXor(top, step));
    }
    workgroupBarrier();
    if local % SUBGROUP == 0u {
        reduce_values[local / SUBGROUP] = top;
    }
    workgroupBarrier();
    for (var i = 0u; i < REDUCE_PARTS; i++) {
        top = max(top, reduce_values[i]);
    }
    return top;
}
#else
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

fn reduce_max(local: u32, value: f32) -> f32 {
    workgroupBarrier();
    reduce_values[local] = value;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step = step >> 1u) {
        if local < step {
            reduce_values[local] = max(reduce_values[local], reduce_values[local + step]);
        }
        workgroupBarrier();
    }
    return reduce_values[0];
}
#endif
