#import params
#import quads
#import tanh
#import hash
// t = tanh(w·x) of queries or keys, `[row, TABLES * PLANES]`, row = (sequence, token, head of the block): one workgroup
// per (kv head, 64 rows of that head, block of FOURS * 4 planes). Four invocations share a row, and take every fourth
// four of its channels each.
@group(0) @binding(3) var<storage, read> planes: array<f32>;
@group(0) @binding(4) var<storage, read_write> t: array<f32>;

const PLANE_BLOCK: u32 = FOURS * 4u;
const PLANE_BLOCKS: u32 = (BITS + PLANE_BLOCK - 1u) / PLANE_BLOCK;
const SLICE: u32 = min(128u, (HEAD_DIM + 15u) / 16u * 16u);
// Planes of a slice's channels, four to a vector: next to each other what the invocations of a row read together. At the
// end sums of the four.
var<workgroup> weights: array<vec4<f32>, max(SLICE * FOURS, 256u)>;

// Of channel 16i + 4q + c of the slice.
fn weight_at(i: u32, c: u32, q: u32, j: u32) -> u32 {
    return ((i * 4u + c) * FOURS + j) * 4u + q;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let block = index % PLANE_BLOCKS * PLANE_BLOCK;
    let head = index / PLANE_BLOCKS % p.heads;
    let first_row = index / (PLANE_BLOCKS * p.heads) * 64u;
    let rows = p.batch * p.tokens * PER_HEAD;
    let planes_at = p.planes_at + (p.head + head) * p.planes_stride;

    let row = first_row + local / 4u;
    let q = local % 4u;
    let token = row / PER_HEAD;
    let in_group = row % PER_HEAD;
    let at = input_at(token / p.tokens, token % p.tokens, (p.head + head) * PER_HEAD + in_group);
#repeat j FOURS
    var sum$j = vec4<f32>();
#end
    for (var slice = 0u; slice < HEAD_DIM; slice += SLICE) {
        workgroupBarrier();
        for (var k = local; k < SLICE * FOURS; k += 256u) {
            let channel = k % SLICE;
            let plane = block + k / SLICE * 4u;
            var w = vec4<f32>();
            for (var c = p.zero; c < 4u; c++) {
                if plane + c < BITS && slice + channel < HEAD_DIM {
                    w[c] = planes[planes_at + (plane + c) * HEAD_DIM + slice + channel];
                }
            }
            weights[weight_at(channel / 16u, channel % 4u, channel / 4u % 4u, k / SLICE)] = w;
        }
        workgroupBarrier();
        if row < rows {
            for (var i = p.zero; i < SLICE / 16u; i++) {
                let x = input_quad(at, slice + i * 16u + q * 4u, HEAD_DIM);
#repeat c 4
#repeat j FOURS
                sum$j += x[$c] * weights[weight_at(i, $cu, q, $ju)];
#end
#end
            }
        }
    }
    let out = p.out_at + ((token * p.heads + head) * PER_HEAD + in_group) * BITS;
    var total = vec4<f32>();
#repeat j FOURS
    workgroupBarrier();
    weights[local] = sum$j;
    workgroupBarrier();
    if q == ($ju & 3u) {
        let own = local / 4u * 4u;
        total = weights[own] + weights[own + 1u] + weights[own + 2u] + weights[own + 3u];
    }
    if row < rows && (($ju & 3u) == 3u || $ju + 1u == FOURS) {
        let plane = block + ($ju / 4u * 4u + q) * 4u;
        for (var c = p.zero; c < 4u; c++) {
            if q <= ($ju & 3u) && plane + c < BITS {
                t[out + plane + c] = bounded_tanh(total[c]);
            }
        }
    }
#end
}
