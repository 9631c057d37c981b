#import params
#import double
#import hash
#import segments
// The matrices of a segment's chunks, an invocation per element: one workgroup per (unit, segment, 256 elements). First
// their sum, a pair of f32, for `scan`; then, with SPREAD, each is replaced by the sum before it, that before the segment
// included. With REVERSE chunks are numbered from the last one.
@group(0) @binding(2) var<storage, read_write> matrices: array<f32>;
@group(0) @binding(3) var<storage, read_write> segments: array<vec2<f32>>;

const BLOCKS: u32 = (MATRIX + 255u) / 256u;

// What one f32 makes of a pair.
fn double_plus(a: vec2<f32>, b: f32) -> vec2<f32> {
    let sum = two_sum(a.x, b);
    return two_sum(sum.x, opaque(sum.y + a.y));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let element = index % BLOCKS * 256u + local;
    let segment = index / BLOCKS % segment_count();
    let unit = index / BLOCKS / segment_count();
    let chunks = chunks_of(unit / p.heads);
    let first = segment * SEGMENT;
    if first >= chunks || element >= MATRIX {
        return;
    }
    let end = min(chunks, first + SEGMENT);
    let matrix_at = unit * p.slots * MATRIX + element;
    let segment_at = (unit * segment_count() + segment) * MATRIX + element;
#ifdef SPREAD
    var value = segments[segment_at];
#else
    var value = vec2<f32>();
#endif
    for (var base = first; base < end; base += 8u) {
        // All loads first.
#repeat i 8
        let step$i = min(base + $iu, end - 1u);
#ifdef REVERSE
        let at$i = matrix_at + (chunks - 1u - step$i) * MATRIX;
#else
        let at$i = matrix_at + step$i * MATRIX;
#endif
        let x$i = matrices[at$i];
#end
#repeat i 8
        if base + $iu < end {
#ifdef SPREAD
            matrices[at$i] = value.x;
#endif
            value = double_plus(value, x$i);
        }
#end
    }
#ifndef SPREAD
    segments[segment_at] = value;
#endif
}
