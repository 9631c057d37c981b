#import params
#import quads
#import tanh
#import hash
// t = tanh(w·x) of queries or keys, `[row, TABLES * PLANES]`, row = (sequence, token, head of the block): one workgroup
// per (kv head, 64 rows of that head, block of FOURS * 4 planes). Eight invocations share two rows, and take every
// eighth four of their channels each.
@group(0) @binding(3) var<storage, read> planes: array<f32>;
@group(0) @binding(4) var<storage, read_write> t: array<f32>;

const PLANE_BLOCK: u32 = FOURS * 4u;
const PLANE_BLOCKS: u32 = (BITS + PLANE_BLOCK - 1u) / PLANE_BLOCK;
const SLICE: u32 = min(128u, (HEAD_DIM + 31u) / 32u * 32u);
// Planes of a slice's channels, four to a vector: next to each other what the invocations of a row read together. At the
// end sums of the eight.
var<workgroup> weights: array<vec4<f32>, max(SLICE * FOURS, 512u)>;

// Of channel 32i + 4q + c of the slice.
fn weight_at(i: u32, c: u32, q: u32, j: u32) -> u32 {
    return ((i * 4u + c) * FOURS + j) * 8u + q;
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

    let pair = local / 8u;
    let q = local % 8u;
#repeat r 2
    let row$r = first_row + pair + $ru * 32u;
    let token$r = row$r / PER_HEAD;
    let row_head$r = (p.head + head) * PER_HEAD + row$r % PER_HEAD;
    let at$r = input_at(token$r / p.tokens, token$r % p.tokens, row_head$r);
#repeat j FOURS
    var sum$rx$j = vec4<f32>();
#end
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
            weights[weight_at(channel / 32u, channel % 4u, channel / 4u % 8u, k / SLICE)] = w;
        }
        workgroupBarrier();
        for (var i = p.zero; i < SLICE / 32u; i++) {
#repeat r 2
            var x$r = vec4<f32>();
            if row$r < rows {
                x$r = input_quad(at$r, slice + i * 32u + q * 4u, HEAD_DIM);
            }
#end
#repeat c 4
#repeat j FOURS
            let w$cx$j = weights[weight_at(i, $cu, q, $ju)];
            sum0x$j += x0[$c] * w$cx$j;
            sum1x$j += x1[$c] * w$cx$j;
#end
#end
        }
    }
    // Invocation q of a row adds up its q-th four planes.
    var total0 = vec4<f32>();
    var total1 = vec4<f32>();
#repeat j FOURS
    workgroupBarrier();
    weights[local] = sum0x$j;
    weights[256u + local] = sum1x$j;
    workgroupBarrier();
    if q == $ju {
        for (var i = p.zero; i < 8u; i++) {
            total0 += weights[pair * 8u + i];
            total1 += weights[256u + pair * 8u + i];
        }
    }
#end
    let plane = block + q * 4u;
#repeat r 2
    if row$r < rows && q < FOURS {
        let out$r = p.out_at + ((token$r * p.heads + head) * PER_HEAD + row$r % PER_HEAD) * BITS;
        for (var c = p.zero; c < 4u; c++) {
            if plane + c < BITS {
                t[out$r + plane + c] = bounded_tanh(total$r[c]);
            }
        }
    }
#end
}
