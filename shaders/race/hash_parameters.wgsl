#import params
#import quads
#import hash
#import hash_rows
// Gradient of hyperplanes, dW = Σ du·xᵀ, and in a last column Σ t·s, that of β: one workgroup per (block of 128
// channels, 16 planes, kv head, share of the rows), `[share, kv head of the block, BITS, HEAD_DIM + 1]`. `input` is q or
// k; `chunks` is the number of rows of a share.
@group(0) @binding(3) var<storage, read> t: array<f32>;
@group(0) @binding(4) var<storage, read> s: array<f32>;
@group(0) @binding(5) var<storage, read_write> shares: array<f32>;

const ROW: u32 = HEAD_DIM + 1u;
const BLOCKS: u32 = (HEAD_DIM + 127u) / 128u;
const TILES: u32 = (BITS + 15u) / 16u;
// du of 64 rows by 16 planes, four to a vector; sums of half of the rows at the end.
var<workgroup> gradients: array<vec4<f32>, 512>;

// Where the numbers of four planes from a multiple of four on stand; past the last plane, others of the row. Of whole
// fours the first alone is held back, so that compilers see them side by side; of four planes in all that would be a place
// known to the compiler, which then loads under the condition (backward of 1M tokens 52 ms, 49 so).
fn place_of_plane(plane: u32, i: u32) -> u32 {
    return select(min(plane + i, BITS - 1u), min(plane, max(BITS, 4u) - 4u) + i, BITS % 4u == 0u && BITS > 4u);
}

// Four planes' t, and what gradients of hashes say of them; zero past the last plane. Loads without a condition, so that
// they are under way together.
fn planes_of(at: u32, plane: u32) -> vec4<f32> {
#repeat i 4
    let x$i = t[at + place_of_plane(plane, $iu)];
#end
    let x = vec4<f32>(x0, x1, x2, x3);
    return select(vec4<f32>(), x, vec4<u32>(plane) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(BITS));
}

fn gradient_planes_of(place: u32, plane: u32) -> vec4<f32> {
#repeat i 4
    let x$i = s[place * S_STRIDE + place_of_plane(plane, $iu)];
#end
    let x = vec4<f32>(x0, x1, x2, x3);
    return select(vec4<f32>(), x, vec4<u32>(plane) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(BITS));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let block = index % BLOCKS * 128u;
    let tile = index / BLOCKS % TILES * 16u;
    let head = index / (BLOCKS * TILES) % p.heads;
    let share = index / (BLOCKS * TILES) / p.heads;
    let end = min((share + 1u) * p.chunks, p.batch * p.tokens * PER_HEAD);
    let beta = beta_of(p.head + head);

    // The filling invocation's row and four planes.
    let step = local / 4u;
    let plane = tile + local % 4u * 4u;
    // The summing invocation's four channels, four planes, and half of the rows.
    let channel = block + local % 32u * 4u;
    let four = local / 32u % 4u;
    let half = local / 128u;
    var of_beta = vec4<f32>();
#repeat i 4
    var sum$i = vec4<f32>();
#end
    // The next rows' numbers are loaded while this panel's products are summed; rows past the last stand for none.
    let begin = share * p.chunks;
    var place = row_place(min(begin + step, end - 1u), head);
    var hashes = planes_of(p.k_at + place * BITS, plane);
    var gradient = gradient_planes_of(place, plane);
    for (var first = begin; first < end; first += 64u) {
        workgroupBarrier();
        let sees = first + step < end;
        gradients[local] = select(vec4<f32>(), beta * gradient * (1.0 - hashes * hashes), sees);
        of_beta += select(vec4<f32>(), hashes * gradient, sees);
        workgroupBarrier();
        if first + 64u < end {
            place = row_place(min(first + 64u + step, end - 1u), head);
            hashes = planes_of(p.k_at + place * BITS, plane);
            gradient = gradient_planes_of(place, plane);
        }
        let rows = min(64u, end - first);
        let origin = vec2<u32>(row_sequence(first), row_token(first));
        // As a rule the panel's rows are of one sequence: no search for each.
        let whole = origin.y + 64u / PER_HEAD < p.tokens;
        for (var k = half; k < rows; k += 16u) {
            // All loads first.
#repeat u 8
            let row$u = first + min(k + $uu * 2u, rows - 1u);
            var near$u = vec2<u32>(origin.x, origin.y + row$u / PER_HEAD - first / PER_HEAD);
            if !whole {
                near$u = vec2<u32>(row_sequence(row$u), row_token(row$u));
            }
            let at$u = input_at(near$u.x, near$u.y, row_head(row$u, head));
            let x$u = input_quad(at$u, channel, HEAD_DIM);
#end
#repeat u 8
            // Past the last row gradients are zero.
            let du$u = gradients[(k + $uu * 2u) * 4u + four];
            sum0 += du$u.x * x$u;
            sum1 += du$u.y * x$u;
            sum2 += du$u.z * x$u;
            sum3 += du$u.w * x$u;
#end
        }
    }
    workgroupBarrier();
    if half == 1u {
#repeat i 4
        gradients[$iu * 128u + local % 128u] = sum$i;
#end
    }
    workgroupBarrier();
    let at = (share * p.heads + head) * BITS * ROW;
    if half == 0u {
#repeat i 4
        sum$i += gradients[$iu * 128u + local];
        let bit$i = tile + four * 4u + $iu;
        for (var c = p.zero; c < 4u; c++) {
            if bit$i < BITS && channel + c < HEAD_DIM {
                shares[at + bit$i * ROW + channel + c] = sum$i[c];
            }
        }
#end
    }
    if block != 0u {
        return;
    }
    workgroupBarrier();
    gradients[local] = of_beta;
    workgroupBarrier();
    if local < 4u {
        var sum = vec4<f32>();
        for (var k = p.zero; k < 64u; k++) {
            sum += gradients[k * 4u + local];
        }
        for (var i = 0u; i < 4u; i++) {
            if plane + i < BITS {
                shares[at + (plane + i) * ROW + HEAD_DIM] = sum[i];
            }
        }
    }
}
