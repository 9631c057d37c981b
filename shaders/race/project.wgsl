#import params
#import quads
#import tanh
#import hash
// t = tanh(w·x) of queries or keys, `[row, TABLES * PLANES]`, row = (sequence, token, head of the block): one workgroup
// per (kv head, 128 rows of that head, block of FOURS * 4 planes). Four invocations share two rows, and take every fourth
// four of their channels each.
@group(0) @binding(3) var<storage, read> planes: array<f32>;
@group(0) @binding(4) var<storage, read_write> t: array<f32>;

const PLANE_BLOCK: u32 = FOURS * 4u;
const PLANE_BLOCKS: u32 = (BITS + PLANE_BLOCK - 1u) / PLANE_BLOCK;
const SLICE: u32 = min(128u, (HEAD_DIM + 63u) / 64u * 64u);
// Planes of a slice's channels, four to a vector: next to each other what the invocations of a row read together. At the
// end sums of the four.
var<workgroup> weights: array<vec4<f32>, max(SLICE * FOURS, 512u)>;

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
    let first_row = index / (PLANE_BLOCKS * p.heads) * 128u;
    let rows = p.batch * p.tokens * PER_HEAD;
    let planes_at = p.planes_at + (p.head + head) * p.planes_stride;

    let own = local / 4u;
    let q = local % 4u;
#repeat r 2
    let row$r = first_row + own + $ru * 64u;
    let token$r = row$r / PER_HEAD;
    let in_group$r = row$r % PER_HEAD;
    // Past the last row it reads one that there is.
    let real$r = min(row$r, rows - 1u) / PER_HEAD;
    let at$r = input_at(real$r / p.tokens, real$r % p.tokens, (p.head + head) * PER_HEAD + in_group$r);
#repeat j FOURS
    var sum$rx$j = vec4<f32>();
#end
#end
    for (var slice = 0u; slice < HEAD_DIM; slice += SLICE) {
        workgroupBarrier();
        for (var k = local; k < SLICE * FOURS; k += 256u) {
            let channel = k % SLICE;
            let plane = block + k / SLICE * 4u;
            let inside = slice + channel < HEAD_DIM;
            let at = planes_at + plane * HEAD_DIM + slice + channel;
            var w = vec4<f32>();
#repeat c 4
            if inside && plane + $cu < BITS {
                w[$c] = planes[at + $cu * HEAD_DIM];
            }
#end
            weights[weight_at(channel / 16u, channel % 4u, channel / 4u % 4u, k / SLICE)] = w;
        }
        workgroupBarrier();
        for (var i = p.zero; i < SLICE / 16u; i += 4u) {
            // All loads first.
#repeat u 4
            let channel$u = slice + (i + $uu) * 16u + q * 4u;
#repeat r 2
            let x$rx$u = input_quad(at$r, channel$u, HEAD_DIM);
#end
#end
#repeat u 4
#repeat c 4
#repeat j FOURS
            let w$ux$cx$j = weights[weight_at(i + $uu, $cu, q, $ju)];
            sum0x$j += x0x$u[$c] * w$ux$cx$j;
            sum1x$j += x1x$u[$c] * w$ux$cx$j;
#end
#end
#end
        }
    }
    // Every invocation of a row adds up a four of planes, or two.
#repeat j FOURS
    workgroupBarrier();
    weights[local] = sum0x$j;
    weights[256u + local] = sum1x$j;
    workgroupBarrier();
    if q == ($ju & 3u) {
        let plane = block + $ju * 4u;
#repeat r 2
        let four$r = $ru * 256u + own * 4u;
        let total$r = weights[four$r] + weights[four$r + 1u] + (weights[four$r + 2u] + weights[four$r + 3u]);
        if row$r < rows {
            let out = p.out_at + ((token$r * p.heads + head) * PER_HEAD + in_group$r) * BITS + plane;
            for (var c = p.zero; c < 4u; c++) {
                if plane + c < BITS {
                    t[out + c] = bounded_tanh(total$r[c]);
                }
            }
        }
#end
    }
#end
}
