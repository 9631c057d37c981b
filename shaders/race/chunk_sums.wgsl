#import params
#import input
#import features
#import matrices
// [α, 1]ᵀ[v, 1] of the keys of a chunk: one workgroup per (unit, chunk, tile of 32 buckets, block of channels).
@group(0) @binding(3) var<storage, read> t: array<f32>;
@group(0) @binding(4) var<storage, read_write> matrices: array<f32>;

// α of a token for buckets 4i to 4i + 3 of the tile, at `token * 9 + i`.
var<workgroup> alphas: array<vec4<f32>, 288>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let block = index % CHANNEL_BLOCKS;
    let tile = index / CHANNEL_BLOCKS % TILES;
    let chunk = index / (CHANNEL_BLOCKS * TILES) % p.chunks;
    let unit = index / (CHANNEL_BLOCKS * TILES * p.chunks);
    let b = unit / p.heads;
    let kv_head = p.head + unit % p.heads;
    let first = chunk * CHUNK;
    let length = length_of(b);
    if first >= length {
        return;
    }
    let count = min(CHUNK, length - first);
    let beta = beta_of(kv_head);
    let centre = centre_of(kv_head);

    // Invocation (i, lane): buckets 4i to 4i + 3 of the tile, and its channels.
    let lane = local % 32u;
    let row8 = local / 32u;
    let v_at = input_at(b, first, kv_head);
#repeat i PAIRS
    let channel$i = block * CHANNELS + $iu * 64u + lane;
    // Loads stay inside the row, and what they bring is not stored.
    let near$i = min(channel$i, VALUE_DIM - 1u);
    let far$i = min(channel$i + 32u, VALUE_DIM - 1u);
    var low$i = vec4<f32>();
    var high$i = vec4<f32>();
#end
    var mass = vec4<f32>();
    for (var first_token = 0u; first_token < count; first_token += 32u) {
        let tokens = min(32u, count - first_token);
        let t_at = p.k_at + ((b * p.tokens + first + first_token) * p.heads + unit % p.heads) * BITS;
        workgroupBarrier();
        fill_odds(local, t_at, p.heads * BITS, tokens, tile * 32u, beta);
        workgroupBarrier();
        alphas[lane * 9u + row8] = vec4<f32>(
            alpha_of(tile * 32u, row8 * 4u, lane, centre),
            alpha_of(tile * 32u, row8 * 4u + 1u, lane, centre),
            alpha_of(tile * 32u, row8 * 4u + 2u, lane, centre),
            alpha_of(tile * 32u, row8 * 4u + 3u, lane, centre));
        workgroupBarrier();
        for (var j = 0u; j < tokens; j++) {
            let alpha = alphas[j * 9u + row8];
            let at = v_at + (first_token + j) * p.in_token;
            mass += alpha;
#repeat i PAIRS
            low$i += alpha * input_element(at + near$i);
            high$i += alpha * input_element(at + far$i);
#end
        }
    }

    let out = (unit * p.slots + chunk) * MATRIX;
#repeat r 4
    let bucket$r = tile * 32u + row8 * 4u + $ru;
    if bucket$r < BUCKETS {
#repeat i PAIRS
        if channel$i < VALUE_DIM {
            matrices[out + bucket$r * COLUMNS + channel$i] = low$i[$r];
        }
        if channel$i + 32u < VALUE_DIM {
            matrices[out + bucket$r * COLUMNS + channel$i + 32u] = high$i[$r];
        }
#end
        if block == 0u && lane == 0u {
            matrices[out + bucket$r * COLUMNS + VALUE_DIM] = mass[$r];
        }
    }
#end
    if tile > 0u {
        return;
    }
    // The last row: sums of v, each invocation's over every eighth token first.
#repeat i PAIRS
    var near_sum$i = 0.0;
    var far_sum$i = 0.0;
#end
    for (var j = row8; j < count; j += 8u) {
        let at = v_at + j * p.in_token;
#repeat i PAIRS
        near_sum$i += input_element(at + near$i);
        far_sum$i += input_element(at + far$i);
#end
    }
#repeat i PAIRS
    workgroupBarrier();
    alphas[local] = vec4<f32>(near_sum$i, far_sum$i, 0.0, 0.0);
    workgroupBarrier();
    if row8 == 0u {
        var sum = vec4<f32>();
        for (var r = 0u; r < 8u; r++) {
            sum += alphas[r * 32u + lane];
        }
        if channel$i < VALUE_DIM {
            matrices[out + BUCKETS * COLUMNS + channel$i] = sum.x;
        }
        if channel$i + 32u < VALUE_DIM {
            matrices[out + BUCKETS * COLUMNS + channel$i + 32u] = sum.y;
        }
    }
#end
    if block == 0u && local == 0u {
        matrices[out + BUCKETS * COLUMNS + VALUE_DIM] = f32(count);
    }
}
