#import params
#import quads
#import weights
#import matrices
#import panels
// [α, 1]ᵀ[v, 1] of the keys of a run of RUN chunks: one workgroup per (unit, run, tile of 64 buckets, block of channels).
// On the way the part of each chunk but the first is left, the sums of the run's chunks before it; FLAG 1 does without.
// With QUERIES it is what queries give to the gradient of the state that they read, over all heads of the group: `input`
// is grad_o, readings stand for α and 1, and chunks are taken from the last one on.
//
// The first block of channels also takes the column of masses, the first tile of buckets the row of sums.
@group(0) @binding(3) var<storage, read> t: array<f32>;
#ifdef QUADS
@group(0) @binding(4) var<storage, read_write> matrices: array<vec4<f32>>;
#else
@group(0) @binding(4) var<storage, read_write> matrices: array<f32>;
#endif
#import stored_matrix
#ifdef QUERIES
@group(0) @binding(5) var<storage, read> readings: array<f32>;
#import readings
#endif

const TILES: u32 = (BUCKETS + 63u) / 64u;

fn store_quad(at: u32, channel: u32, x: vec4<f32>) {
#ifdef QUADS
    if channel < VALUE_DIM {
        matrices[(at + channel) >> 2u] = x;
    }
#else
    for (var i = p.zero; i < 4u; i++) {
        if channel + i < VALUE_DIM {
            matrices[at + channel + i] = x[i];
        }
    }
#endif
}

fn store_mass(at: u32, x: f32) {
#ifdef QUADS
    matrices[(at + VALUE_DIM) >> 2u].x = x;
#else
    matrices[at + VALUE_DIM] = x;
#endif
}

// Rounds of a chunk.
#ifdef QUERIES
const ROUNDS: u32 = CHUNK / 16u * GROUP;
#else
const ROUNDS: u32 = CHUNK / 16u;
#endif

// The chunk of the run that comes after `done` ones.
fn chunk_of(done: u32, chunks: u32) -> u32 {
#ifdef QUERIES
    return chunks - 1u - done;
#else
    return done;
#endif
}

// The first token of a round, in the run.
fn token_of(round: u32, chunks: u32) -> u32 {
    return chunk_of(round / ROUNDS, chunks) * CHUNK + round % (CHUNK / 16u) * 16u;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let block = index % CHANNEL_BLOCKS;
    let tile = index / CHANNEL_BLOCKS % TILES;
    let run = index / (CHANNEL_BLOCKS * TILES) % p.slots;
    let unit = index / (CHANNEL_BLOCKS * TILES) / p.slots;
    let b = unit / p.heads;
    let head = unit % p.heads;
    let beta = beta_of(p.head + head);
    let centre = centre_of(p.head + head);
    let first = run * RUN * CHUNK;
    let length = length_of(b);
    if first >= length {
        return;
    }
    let count = min(RUN * CHUNK, length - first);
    let chunks = (count + CHUNK - 1u) / CHUNK;

    // The filling invocation's token and its four buckets or channels, and the rows and columns of its sums.
    let step = row4_of(local);
    let four = column4_of(local);
    let bucket = tile * 64u + four * 4u;
    let channel = block * CHANNELS + four * 4u;
    // Sums of a chunk; f32 adds up 64 tokens well. Those of the run's chunks before it each invocation reads where it has
    // written them: registers for both would leave room for too few workgroups.
#repeat h PAIRS
    var sums$h = Block();
    var row$h = vec4<f32>();
#end
    var mass = vec4<f32>();
    var corner = 0.0;
    // Round by round 16 tokens of one head. What the next panels are made of is loaded while products of these are
    // summed; tokens past the last give none.
    let row_at = (b * p.tokens + first) * p.heads + head;
    var token = min(token_of(0u, chunks) + step, count - 1u);
#ifdef QUERIES
    var q_row = (row_at + token * p.heads) * GROUP;
    var q_head = (p.head + head) * GROUP;
    var reading = reading_weight(q_row);
    var of_sums = reading_of_sums(q_row, centre);
    var hashes = reading_at(q_row, bucket);
#else
    let q_head = p.head + head;
    var hashes = hashes_at(p.k_at + (row_at + token * p.heads) * BITS, bucket);
#endif
#repeat h PAIRS
    var x$h = input_quad(input_at(b, first + token, q_head), channel + $hu * 64u, VALUE_DIM);
#end
    for (var round = p.zero; round <= chunks * ROUNDS; round++) {
        if round > 0u && round % ROUNDS == 0u {
            let done = round / ROUNDS;
            let parts = (p.flags & 1u) == 0u;
            let of_run = (unit * p.slots + run) * MATRIX;
            var out = of_run;
            if parts && done < chunks {
                out = part_of(unit, run * RUN + chunk_of(done, chunks));
            }
            var before = of_run;
            if parts {
                before = part_of(unit, run * RUN + chunk_of(done - 1u, chunks));
            }
            let rows = (tile * 64u + step * 4u) * MATRIX_ROW;
#repeat h PAIRS
            if tile * 64u + step * 4u < BUCKETS {
                if done > 1u {
                    sums$h.a += stored_matrix_quad(before + rows, channel + $hu * 64u);
                }
                store_quad(out + rows, channel + $hu * 64u, sums$h.a);
            }
            if tile * 64u + step * 4u + 1u < BUCKETS {
                if done > 1u {
                    sums$h.b += stored_matrix_quad(before + rows + MATRIX_ROW, channel + $hu * 64u);
                }
                store_quad(out + rows + MATRIX_ROW, channel + $hu * 64u, sums$h.b);
            }
            if tile * 64u + step * 4u + 2u < BUCKETS {
                if done > 1u {
                    sums$h.c += stored_matrix_quad(before + rows + 2u * MATRIX_ROW, channel + $hu * 64u);
                }
                store_quad(out + rows + 2u * MATRIX_ROW, channel + $hu * 64u, sums$h.c);
            }
            if tile * 64u + step * 4u + 3u < BUCKETS {
                if done > 1u {
                    sums$h.d += stored_matrix_quad(before + rows + 3u * MATRIX_ROW, channel + $hu * 64u);
                }
                store_quad(out + rows + 3u * MATRIX_ROW, channel + $hu * 64u, sums$h.d);
            }
            sums$h = Block();
#end
            if parts || done == chunks {
                // Each invocation has summed its own tokens' part of the edges.
                workgroupBarrier();
                panels[panel_at(0u, step, four)] = mass;
#repeat h PAIRS
                panels[panel_at(1u + $hu, step, four)] = row$h;
#end
                panels[panel_at(3u, step, four)] = vec4<f32>(corner);
                workgroupBarrier();
                if step == 0u && block == 0u {
                    let sum = panel_sum(0u, four);
                    for (var i = p.zero; i < 4u; i++) {
                        if bucket + i < BUCKETS {
                            store_mass(out + (bucket + i) * MATRIX_ROW, sum[i]);
                        }
                    }
                }
                if step == 1u && tile == 0u {
#repeat h PAIRS
                    store_quad(out + BUCKETS * MATRIX_ROW, channel + $hu * 64u, panel_sum(1u + $hu, four));
#end
                }
                if step == 2u && four == 0u && tile == 0u && block == 0u {
                    store_mass(out + BUCKETS * MATRIX_ROW, panel_sum(3u, 0u).x);
                }
            }
        }
        if round < chunks * ROUNDS {
            workgroupBarrier();
            let sees = token_of(round, chunks) + step < count;
#ifdef QUERIES
            let weights = select(vec4<f32>(), reading_of(hashes, bucket, beta, centre), sees);
#else
            let weights = select(vec4<f32>(), alphas_of(hashes, bucket, beta, centre), sees);
#endif
            if sees {
#ifdef QUERIES
#repeat h PAIRS
                x$h *= reading.x;
                row$h += of_sums * x$h;
#end
#ifdef RATIO
                mass += reading.y * weights;
                corner += reading.y * of_sums;
#else
                if block == 0u {
                    mass += mass_of_four(q_row, bucket);
                }
                corner += mass_of_sums(q_row);
#endif
#else
#repeat h PAIRS
                row$h += x$h;
#end
                mass += weights;
                corner += 1.0;
#endif
            }
            panels[panel_at(0u, step, four)] = weights;
#repeat h PAIRS
            panels[panel_at(1u + $hu, step, four)] = x$h;
#end
            workgroupBarrier();
            if round + 1u < chunks * ROUNDS {
                token = min(token_of(round + 1u, chunks) + step, count - 1u);
#ifdef QUERIES
                let g = (round + 1u) / (CHUNK / 16u) % GROUP;
                q_row = (row_at + token * p.heads) * GROUP + g;
                q_head = (p.head + head) * GROUP + g;
                reading = reading_weight(q_row);
                of_sums = reading_of_sums(q_row, centre);
                hashes = reading_at(q_row, bucket);
#else
                hashes = hashes_at(p.k_at + (row_at + token * p.heads) * BITS, bucket);
#endif
#repeat h PAIRS
                x$h = input_quad(input_at(b, first + token, q_head), channel + $hu * 64u, VALUE_DIM);
#end
            }
            for (var k = 0u; k < 4u; k++) {
                let left_at = quad_at(0u, k, step);
                let right_at = quad_at(1u, k, four);
#repeat u 4
                let left$u = panels[left_at + $uu * FOUR_STEPS];
#repeat h PAIRS
                sums$h = add_product(sums$h, left$u, panels[right_at + $hu * PANEL + $uu * FOUR_STEPS]);
#end
#end
            }
        }
    }
}
