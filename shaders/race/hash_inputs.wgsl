#import params
#import hash
#import sums
#import hash_rows
// Gradient of q or k, dx = Wᵀ·du: one workgroup per (block of WIDTH channels, kv head, 32 rows of that head).
// Ensembles after the first add (`flags` = 1).
@group(0) @binding(2) var<storage, read> t: array<f32>;
@group(0) @binding(3) var<storage, read> s: array<f32>;
@group(0) @binding(4) var<storage, read> planes: array<f32>;
@group(0) @binding(5) var<storage, read_write> dx: array<f32>;

const BLOCKS: u32 = (HEAD_DIM + WIDTH - 1u) / WIDTH;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let start = index % BLOCKS * WIDTH;
    let head = index / BLOCKS % p.heads;
    let first = index / (BLOCKS * p.heads) * 32u;
    let rows = p.batch * p.tokens * PER_HEAD;
    let planes_at = p.planes_at + (p.head + head) * p.planes_stride;
    let beta = beta_of(p.head + head);

    let column = local % 32u;
    let row8 = local / 32u;
    clear_sums();
    for (var slice = 0u; slice < BITS; slice += 32u) {
        workgroupBarrier();
        var x = vec4<f32>();
        for (var i = 0u; i < 4u; i++) {
            let row = first + row8 * 4u + i;
            if row < rows && slice + column < BITS {
                x[i] = projection_gradient(row_place(row, head), slice + column, beta);
            }
        }
        left[left_at(column, row8)] = x;
        for (var base = 0u; base < min(32u, BITS - slice); base += DEPTH) {
            workgroupBarrier();
            for (var i = local; i < 1024u; i += 256u) {
                let plane = slice + base + i / WIDTH;
                let channel = start + i % WIDTH;
                var w = 0.0;
                if plane < BITS && channel < HEAD_DIM {
                    w = planes[planes_at + plane * HEAD_DIM + channel];
                }
                right[right_at(i / WIDTH, i % WIDTH)] = w;
            }
            workgroupBarrier();
            add_products(row8, column, base);
        }
    }
    for (var i = 0u; i < 4u; i++) {
        let row = first + row8 * 4u + i;
        if row < rows {
            let token = row_token(row) * KV_HEADS * PER_HEAD + row_head(row, head);
            let at = p.out_at + row_sequence(row) * p.out_batch + token * HEAD_DIM + start + column;
#repeat c COLUMNS
            if start + column + $cu * 32u < HEAD_DIM {
                if (p.flags & 1u) == 1u {
                    dx[at + $cu * 32u] += sums[$c][i];
                } else {
                    dx[at + $cu * 32u] = sums[$c][i];
                }
            }
#end
        }
    }
}
