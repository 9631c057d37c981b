#import params
#import input
#import tanh
#import hash
// t = tanh(w·x) of queries or keys, `[row, TABLES * PLANES]`, row = (sequence, token, head of the block): one workgroup
// per (kv head, 64 rows of that head, block of planes), a tiled matrix product.
@group(0) @binding(3) var<storage, read> planes: array<f32>;
@group(0) @binding(4) var<storage, read_write> t: array<f32>;

const PLANE_BLOCK: u32 = COLUMNS * 16u;
const PLANE_BLOCKS: u32 = (BITS + PLANE_BLOCK - 1u) / PLANE_BLOCK;
// Channels of a slice; its rows are padded against bank conflicts, and four of x lie in one vector.
const SLICE: u32 = 16u;
var<workgroup> x_slice: array<vec4<f32>, SLICE * 17u>;
var<workgroup> w_slice: array<f32, SLICE * (PLANE_BLOCK + 1u)>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let block = index % PLANE_BLOCKS;
    let head = index / PLANE_BLOCKS % p.heads;
    let first_row = index / (PLANE_BLOCKS * p.heads) * 64u;
    let rows = p.batch * p.tokens * PER_HEAD;
    let planes_at = p.planes_at + (p.head + head) * p.planes_stride + block * PLANE_BLOCK * HEAD_DIM;

    let column = local % 16u;
    let row16 = local / 16u;
    // Invocation (i, column): rows 4i to 4i + 3, with a channel to load, then with every 16th plane.
#repeat i 4
    let row$i = first_row + row16 * 4u + $iu;
    let at$i = input_at(row$i / PER_HEAD / p.tokens, row$i / PER_HEAD % p.tokens, (p.head + head) * PER_HEAD + row$i % PER_HEAD);
#end
#repeat j COLUMNS
    var sum$j = vec4<f32>();
#end
    for (var slice = 0u; slice < HEAD_DIM; slice += SLICE) {
        let channel = slice + column;
        workgroupBarrier();
#repeat i 4
        var x$i = 0.0;
        if row$i < rows && channel < HEAD_DIM {
            x$i = input_element(at$i + channel);
        }
#end
        x_slice[column * 17u + row16] = vec4<f32>(x0, x1, x2, x3);
#repeat j COLUMNS
        var w$j = 0.0;
        if block * PLANE_BLOCK + row16 + $ju * 16u < BITS && channel < HEAD_DIM {
            w$j = planes[planes_at + (row16 + $ju * 16u) * HEAD_DIM + channel];
        }
        w_slice[column * (PLANE_BLOCK + 1u) + row16 + $ju * 16u] = w$j;
#end
        workgroupBarrier();
        for (var c = 0u; c < SLICE; c++) {
            let x = x_slice[c * 17u + row16];
#repeat j COLUMNS
            sum$j += x * w_slice[c * (PLANE_BLOCK + 1u) + column + $ju * 16u];
#end
        }
    }
    let out = p.out_at + head * PER_HEAD * BITS + block * PLANE_BLOCK;
#repeat j COLUMNS
    if block * PLANE_BLOCK + column + $ju * 16u < BITS {
#repeat i 4
        if row$i < rows {
            let at = (row$i / PER_HEAD * p.heads * PER_HEAD + row$i % PER_HEAD) * BITS + column + $ju * 16u;
            t[out + at] = bounded_tanh(sum$j[$i]);
        }
#end
    }
#end
}
