// Inclusive prefix sum over the WIDTH invocations of a workgroup.
#ifdef SUBGROUPS
const SCAN_PARTS: u32 = WIDTH / SUBGROUP;
var<workgroup> scan_values: array<u32, SCAN_PARTS>;

fn inclusive_scan(local: u32, value: u32) -> u32 {
    var sum = value;
    for (var step = 1u; step < SUBGROUP; step = step << 1u) {
        sum += select(0u, subgroupShuffleUp(sum, step), local % SUBGROUP >= step);
    }
    // Totals of an earlier sum may still be read.
    workgroupBarrier();
    if local % SUBGROUP == SUBGROUP - 1u {
        scan_values[local / SUBGROUP] = sum;
    }
    workgroupBarrier();
    for (var i = 0u; i < SCAN_PARTS; i++) {
        sum += select(0u, scan_values[i], i < local / SUBGROUP);
    }
    return sum;
}

fn scan_total() -> u32 {
    var total = 0u;
    for (var i = 0u; i < SCAN_PARTS; i++) {
        total += scan_values[i];
    }
    return total;
}
#else
var<workgroup> scan_values: array<u32, WIDTH>;

fn inclusive_scan(local: u32, value: u32) -> u32 {
    scan_values[local] = value;
    workgroupBarrier();
    for (var step = 1u; step < WIDTH; step = step << 1u) {
        var below = 0u;
        if local >= step {
            below = scan_values[local - step];
        }
        workgroupBarrier();
        scan_values[local] = scan_values[local] + below;
        workgroupBarrier();
    }
    return scan_values[local];
}

fn scan_total() -> u32 {
    return scan_values[WIDTH - 1u];
}
#endif
