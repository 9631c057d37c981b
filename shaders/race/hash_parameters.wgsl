#import params
#import input
#import hash
#import sums
#import hash_rows
// Gradient of hyperplanes, dW = Σ du·xᵀ, and in a last column Σ t·s, that of β: one workgroup per (block of WIDTH
// channels, 32 planes, kv head, share of the rows), `[share, kv head of the block, BITS, HEAD_DIM + 1]`. `input` is q or
// k; `chunks` is the number of rows of a share, a multiple of 32.
@group(0) @binding(3) var<storage, read> t: array<f32>;
@group(0) @binding(4) var<storage, read> s: array<f32>;
@group(0) @binding(5) var<storage, read_write> shares: array<f32>;

const ROW: u32 = HEAD_DIM + 1u;
const BLOCKS: u32 = (HEAD_DIM + WIDTH - 1u) / WIDTH;
const TILES: u32 = (BITS + 31u) / 32u;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let start = index % BLOCKS * WIDTH;
    let tile = index / BLOCKS % TILES * 32u;
    let head = index / (BLOCKS * TILES) % p.heads;
    let share = index / (BLOCKS * TILES) / p.heads;
    let end = min((share + 1u) * p.chunks, p.batch * p.tokens * PER_HEAD);
    let beta = beta_of(p.head + head);

    let column = local % 32u;
    let row8 = local / 32u;
    // The filling invocation's row and four planes.
    let step = local / 8u;
    let plane = tile + local % 8u * 4u;
    clear_sums();
    var of_beta = vec4<f32>();
    for (var first = share * p.chunks; first < end; first += 32u) {
        workgroupBarrier();
        var x = vec4<f32>();
        if first + step < end {
            let place = row_place(first + step, head);
            for (var i = 0u; i < 4u; i++) {
                if plane + i < BITS {
                    x[i] = projection_gradient(place, plane + i, beta);
                    of_beta[i] += t[p.k_at + place * BITS + plane + i] * s[place * S_STRIDE + plane + i];
                }
            }
        }
        left[left_at(step, local % 8u)] = x;
        for (var base = 0u; base < 32u; base += DEPTH) {
            workgroupBarrier();
            for (var i = local; i < 1024u; i += 256u) {
                let row = first + base + i / WIDTH;
                let channel = start + i % WIDTH;
                var x = 0.0;
                if row < end && channel < HEAD_DIM {
                    x = input_element(input_at(row_sequence(row), row_token(row), row_head(row, head)) + channel);
                }
                right[right_at(i / WIDTH, i % WIDTH)] = x;
            }
            workgroupBarrier();
            add_products(row8, column, base);
        }
    }
    let at = (share * p.heads + head) * BITS * ROW;
#repeat c COLUMNS
    if start + column + $cu * 32u < HEAD_DIM {
        for (var i = 0u; i < 4u; i++) {
            if tile + row8 * 4u + i < BITS {
                shares[at + (tile + row8 * 4u + i) * ROW + start + column + $cu * 32u] = sums[$c][i];
            }
        }
    }
#end
    if start != 0u {
        return;
    }
    workgroupBarrier();
    left[left_at(step, local % 8u)] = of_beta;
    workgroupBarrier();
    if column == 0u {
        var sum = vec4<f32>();
        for (var k = p.zero; k < 32u; k++) {
            sum += left[left_at(k, row8)];
        }
        for (var i = 0u; i < 4u; i++) {
            if tile + row8 * 4u + i < BITS {
                shares[at + (tile + row8 * 4u + i) * ROW + HEAD_DIM] = sum[i];
            }
        }
    }
}
