#import params
#import quads
#import tanh
#import hash
// t = tanh(w·x) of queries or keys, `[row, TABLES * PLANES]`, row = (sequence, token, head of the block): one workgroup
// per (kv head, 64 rows of that head, block of FOURS * 4 planes). An invocation has a row, and a quarter of a slice of
// its channels.
@group(0) @binding(3) var<storage, read> planes: array<f32>;
@group(0) @binding(4) var<storage, read_write> t: array<f32>;

const PLANE_BLOCK: u32 = FOURS * 4u;
const PLANE_BLOCKS: u32 = (BITS + PLANE_BLOCK - 1u) / PLANE_BLOCK;
const SLICE: u32 = min(128u, (HEAD_DIM + 15u) / 16u * 16u);
// Planes of a slice's channels, four to a vector; at the end sums of the quarters.
var<workgroup> weights: array<vec4<f32>, max(SLICE * FOURS, 256u)>;

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

    let row = first_row + local % 64u;
    let quarter = local / 64u * (SLICE / 4u);
    let token = row / PER_HEAD;
    let in_group = row % PER_HEAD;
    let at = input_at(token / p.tokens, token % p.tokens, (p.head + head) * PER_HEAD + in_group);
#repeat j FOURS
    var sum$j = vec4<f32>();
#end
    for (var slice = 0u; slice < HEAD_DIM; slice += SLICE) {
        workgroupBarrier();
        for (var i = local; i < SLICE * FOURS; i += 256u) {
            let channel = slice + i % SLICE;
            let plane = block + i / SLICE * 4u;
            var w = vec4<f32>();
            for (var c = p.zero; c < 4u; c++) {
                if plane + c < BITS && channel < HEAD_DIM {
                    w[c] = planes[planes_at + (plane + c) * HEAD_DIM + channel];
                }
            }
            weights[i % SLICE * FOURS + i / SLICE] = w;
        }
        workgroupBarrier();
        if row < rows {
            for (var c = 0u; c < SLICE / 4u; c += 4u) {
                let x = input_quad(at, slice + quarter + c, HEAD_DIM);
#repeat i 4
#repeat j FOURS
                sum$j += x[$i] * weights[(quarter + c + $iu) * FOURS + $ju];
#end
#end
            }
        }
    }
    let out = p.out_at + ((token * p.heads + head) * PER_HEAD + in_group) * BITS;
#repeat j FOURS
    workgroupBarrier();
    weights[local] = sum$j;
    workgroupBarrier();
    if local / 64u == ($ju & 3u) && row < rows {
        let sum = weights[local % 64u] + weights[64u + local % 64u] + weights[128u + local % 64u] + weights[192u + local % 64u];
        for (var c = p.zero; c < 4u; c++) {
            if block + $ju * 4u + c < BITS {
                t[out + block + $ju * 4u + c] = bounded_tanh(sum[c]);
            }
        }
    }
#end
}
