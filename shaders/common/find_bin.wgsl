#import scan
// Finds the bin in which the `wanted`-th largest key of a row lies.
struct FoundBin {
    bin: u32,
    above: u32,
    total: u32,
}
var<workgroup> found_bin: u32;
var<workgroup> found_above: u32;

// Bins from the highest down: invocation i owns BINS / 256 of them.
fn find_bin(local: u32, histogram_at: u32, wanted: u32) -> FoundBin {
    const OWN = BINS / 256u;
    let top = BINS - 1u - local * OWN;
    var own = 0u;
    for (var i = 0u; i < OWN; i++) {
        own += histogram_read(histogram_at + top - i);
    }
    if local == 0u {
        found_bin = 0u;
        found_above = 0u;
    }
    let upto = inclusive_scan(local, own);
    let total = scan_total();
    if upto >= wanted && upto - own < wanted {
        var above = upto - own;
        var bin = top;
        for (var i = 0u; i < OWN; i++) {
            let count = histogram_read(histogram_at + top - i);
            bin = top - i;
            if above + count >= wanted {
                break;
            }
            above += count;
        }
        found_bin = bin;
        found_above = above;
    }
    workgroupBarrier();
    return FoundBin(found_bin, found_above, total);
}
