#import params
#import hash
#import hash_rows
#import panels
#import store_quads
// Gradient of q or k, dx = Wᵀ·du: one workgroup per (block of channels, kv head, 64 rows of that head). Ensembles after
// the first add (`flags` = 1).
@group(0) @binding(2) var<storage, read> t: array<f32>;
@group(0) @binding(3) var<storage, read> s: array<f32>;
@group(0) @binding(4) var<storage, read> planes: array<f32>;

const CHANNELS: u32 = 64u * HEAD_PAIRS;
const BLOCKS: u32 = (HEAD_DIM + CHANNELS - 1u) / CHANNELS;

fn store_row(origin: vec2<u32>, first: u32, row: u32, rows: u32, head: u32, channel: u32, x: vec4<f32>) {
    if row < rows {
        let place = token_after(origin, row / PER_HEAD - first / PER_HEAD);
        let at = p.out_at + place.x * p.out_batch + (place.y * KV_HEADS * PER_HEAD + row_head(row, head)) * HEAD_DIM;
        var sum = x;
        if (p.flags & 1u) == 1u {
            sum += stored_quad(at, channel, HEAD_DIM);
        }
        store_quad(at, channel, HEAD_DIM, sum);
    }
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let head = index / BLOCKS % p.heads;
    let first = index / (BLOCKS * p.heads) * 64u;
    let rows = p.batch * p.tokens * PER_HEAD;
    let planes_at = p.planes_at + (p.head + head) * p.planes_stride;
    let beta = beta_of(p.head + head);

    let row4 = row4_of(local);
    let column4 = column4_of(local);
    let channel = index % BLOCKS * CHANNELS + column4 * 4u;
    // The row that it fills, and a quarter of the steps.
    let own_row = local / 4u;
    let quad = local % 4u;
#repeat h HEAD_PAIRS
    var sums$h = Block();
#end
    for (var start = 0u; start < BITS; start += 16u) {
        workgroupBarrier();
        for (var i = 0u; i < 4u; i++) {
            let plane = start + quad * 4u + i;
            var x = 0.0;
            if first + own_row < rows && plane < BITS {
                x = projection_gradient(row_place(first + own_row, head), plane, beta);
            }
            set_panel(0u, quad * 4u + i, own_row, x);
        }
#repeat h HEAD_PAIRS
        var w$h = vec4<f32>();
        for (var i = 0u; i < 4u; i++) {
            if start + row4 < BITS && channel + $hu * 64u + i < HEAD_DIM {
                w$h[i] = planes[planes_at + (start + row4) * HEAD_DIM + channel + $hu * 64u + i];
            }
        }
        panels[panel_at(1u + $hu, row4, column4)] = w$h;
#end
        workgroupBarrier();
        for (var k = 0u; k < 4u; k++) {
            let left_at = quad_at(0u, k, row4);
            let right_at = quad_at(1u, k, column4);
#repeat u 4
            let left$u = panels[left_at + $uu * FOUR_STEPS];
#repeat h HEAD_PAIRS
            sums$h = add_product(sums$h, left$u, panels[right_at + $hu * PANEL + $uu * FOUR_STEPS]);
#end
#end
        }
    }
    let origin = vec2<u32>(row_sequence(first), row_token(first));
#repeat h HEAD_PAIRS
    store_row(origin, first, first + row4 * 4u, rows, head, channel + $hu * 64u, sums$h.a);
    store_row(origin, first, first + row4 * 4u + 1u, rows, head, channel + $hu * 64u, sums$h.b);
    store_row(origin, first, first + row4 * 4u + 2u, rows, head, channel + $hu * 64u, sums$h.c);
    store_row(origin, first, first + row4 * 4u + 3u, rows, head, channel + $hu * 64u, sums$h.d);
#end
}
