// Inclusive prefix sum over the 256 invocations of a workgroup.
var<workgroup> scan_values: array<u32, 256>;

fn inclusive_scan(local: u32, value: u32) -> u32 {
    scan_values[local] = value;
    workgroupBarrier();
    for (var step = 1u; step < 256u; step = step << 1u) {
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
    return scan_values[255];
}
