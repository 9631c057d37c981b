#import params
#import place
#import rows
#import query
#import reduce
#import tanh
#import header
// Look-up tables of one query: one workgroup per (row, kv head, scoring head). Also clears the row's histogram.
// A code is scored in digits of four bits; a table entry is what one value of one digit contributes.
@group(0) @binding(2) var<storage, read> planes: array<f32>;
@group(0) @binding(3) var<storage, read> seq_state: array<u32>;
@group(0) @binding(4) var<storage, read> rows: array<Row>;
@group(0) @binding(5) var<storage, read_write> tables: array<f32>;
@group(0) @binding(6) var<storage, read_write> histogram: array<u32>;

// Channels whose loads are under way together.
const AT_ONCE: u32 = 64u;
const CHANNELS: u32 = (HEAD_DIM + AT_ONCE - 1u) / AT_ONCE * AT_ONCE;
var<workgroup> x: array<f32, CHANNELS>;
#ifdef SOFT_COLLISION
// How likely each plane's bit is 1, and 0.
var<workgroup> ones: array<f32, BLOCK_BITS>;
var<workgroup> zeros: array<f32, BLOCK_BITS>;
#else
var<workgroup> u: array<f32, BLOCK_BITS>;
#endif

fn logistic(t: f32) -> f32 {
    return 1.0 / (1.0 + exp(-t));
}

fn load_head(local: u32, batch: u32, token: u32, head: u32, weight: f32, add: bool) {
    var norm = 1.0;
#ifdef NORMALIZE
    var square = 0.0;
    for (var c = local; c < HEAD_DIM; c += 256u) {
        let value = query_element(batch, token, head, c);
        square += value * value;
    }
    let total = reduce_sum(local, square);
    norm = select(0.0, inverseSqrt(total), total > 0.0);
#endif
    for (var c = local; c < HEAD_DIM; c += 256u) {
        let value = query_element(batch, token, head, c) * (norm * weight);
        if add {
            x[c] = x[c] + value;
        } else {
            x[c] = value;
        }
    }
}

@compute @workgroup_size(256)
fn main(place: Place) {
    let local = local_of(place);
    let index = group_index(place.group);
    if index >= p.groups {
        return;
    }
    let scoring_head = index % SCORING_HEADS;
    let kv_head = index / SCORING_HEADS % KV_HEADS;
    let row_index = p.first_row + index / (SCORING_HEADS * KV_HEADS);
    let row = rows[row_index];
    let batch = row_index / p.tq;
    let token = row_index % p.tq;

    for (var i = local; i < HISTOGRAM_ROW; i += 256u) {
        // One histogram per score row; the first workgroups clear them all.
        if index < p.groups / SCORING_HEADS * SCORE_ROWS {
            histogram[index * HISTOGRAM_ROW + i] = 0u;
        }
    }
#ifdef MEAN_QUERY
    for (var g = 0u; g < GROUP; g++) {
        load_head(local, batch, token, kv_head * GROUP + g, 1.0 / f32(GROUP), g > 0u);
    }
#else
    load_head(local, batch, token, kv_head * GROUP + scoring_head, 1.0, false);
#endif
    for (var c = HEAD_DIM + local; c < CHANNELS; c += 256u) {
        x[c] = 0.0;
    }
    workgroupBarrier();

    let at = index * TABLE_ROW;
    let planes_at = select(0u, kv_head, p.planes_stride > 0u) * p.planes_stride;
    var low = 0.0;
    var high = 0.0;
    // Digits whose smallest entry is not a normal number in 16 bits.
    var small = 0.0;
    for (var block = 0u; block < BITS; block += BLOCK_BITS) {
        for (var i = local; i < BLOCK_BITS; i += 256u) {
            var sum = 0.0;
            if block + i < BITS {
                let plane_at = planes_at + block + i;
                for (var c = 0u; c < HEAD_DIM; c += AT_ONCE) {
#repeat j 64
                    let w$j = planes[plane_at + min(c + $ju, HEAD_DIM - 1u) * BITS];
#end
#repeat j 64
                    sum += x[c + $ju] * w$j;
#end
                }
            }
#ifdef SOFT_COLLISION
            let t = 2.0 * p.beta * bounded_tanh(sum);
            ones[i] = logistic(t);
            zeros[i] = logistic(-t);
#else
            u[i] = sum;
#endif
        }
        workgroupBarrier();
        for (var i = local; i < BLOCK_BITS / PLANES * DIGITS * 16u; i += 256u) {
            let value = i % 16u;
            let digit = i / 16u % DIGITS;
            let table = i / (16u * DIGITS);
            if block / PLANES + table < TABLES {
                let bits = min(4u, PLANES - digit * 4u);
#ifdef SOFT_COLLISION
                var entry = 1.0;
#endif
#ifdef SIGN_PROJECTION
                var entry = 0.0;
#endif
#ifdef HARD_COLLISION
                var entry = 1.0;
#endif
#ifdef HAMMING
                var entry = 0.0;
#endif
                for (var b = 0u; b < bits; b++) {
                    // Bit b of digit d is bit 4d + b of the code, whose most significant bit is plane 0.
                    let plane = table * PLANES + PLANES - 1u - digit * 4u - b;
                    let is_one = ((value >> b) & 1u) == 1u;
#ifdef SOFT_COLLISION
                    entry *= select(zeros[plane], ones[plane], is_one);
#else
                    let projection = u[plane];
#endif
#ifdef SIGN_PROJECTION
                    entry += select(-projection, projection, is_one) * p.scale;
#endif
#ifdef HARD_COLLISION
                    entry = select(0.0, entry, is_one == (projection >= 0.0));
#endif
#ifdef HAMMING
                    entry += select(0.0, 1.0, is_one == (projection >= 0.0));
#endif
                }
                tables[at + TABLE_HEADER + block / PLANES * DIGITS * 16u + i] = entry;
            }
        }
        // The largest and smallest sum any key could have, for the histogram's bounds.
        for (var i = local; i < BLOCK_BITS / PLANES; i += 256u) {
            if block / PLANES + i < TABLES {
#ifdef SOFT_COLLISION
                var best = 1.0;
                for (var plane = 0u; plane < PLANES; plane++) {
                    best *= max(ones[i * PLANES + plane], zeros[i * PLANES + plane]);
                }
                high += best;
                for (var digit = 0u; digit < DIGITS; digit++) {
                    var least = 1.0;
                    for (var plane = digit * 4u; plane < min(PLANES, digit * 4u + 4u); plane++) {
                        let at_plane = i * PLANES + PLANES - 1u - plane;
                        least *= min(ones[at_plane], zeros[at_plane]);
                    }
                    small += select(0.0, 1.0, least < 6.2e-5);
                }
#endif
#ifdef SIGN_PROJECTION
                for (var plane = 0u; plane < PLANES; plane++) {
                    high += abs(u[i * PLANES + plane]) * abs(p.scale);
                }
#endif
#ifdef HARD_COLLISION
                high += 1.0;
#endif
#ifdef HAMMING
                high += f32(PLANES);
#endif
            }
        }
        workgroupBarrier();
    }
    high = reduce_sum(local, high);
#ifdef PRODUCT
    small = reduce_sum(local, small);
    // Such entries may get lost whole.
    var error = select(0.0, f32(TABLES * DIGITS) * 6.6e-5, small > 0.0);
    let unit = 0.0;
#else
    // Sums of 16 bits never overflow; each entry is off by half a unit.
    // Never so small that its inverse is not finite.
    let unit = max(high, 1e-30) * (1.0 / 32000.0);
    var error = unit * (0.51 * f32(TABLES * DIGITS));
#endif
    var shift = 0.0;
#ifdef SIGN_PROJECTION
#ifdef CENTER
    for (var c = local; c < HEAD_DIM; c += 256u) {
        shift += x[c] * bitcast<f32>(seq_state[row.slot * SLOT_WORDS + kv_head * HEAD_DIM + c]);
    }
    shift = reduce_sum(local, shift) * p.scale;
#endif
    low = -1.0;
#endif
    if local == 0u {
#ifdef SCALARS
        let gain = bitcast<f32>(seq_state[row.slot * SLOT_WORDS + KV_HEADS * HEAD_DIM + kv_head]);
        high *= gain;
        error *= gain;
#endif
        low = low * high + shift;
        high += shift;
        tables[at] = low;
        tables[at + 1u] = select(0.0, f32(BINS) / (high - low), high > low);
        tables[at + 2u] = shift;
        tables[at + 3u] = error;
        tables[at + 4u] = unit;
        #ifdef PRODUCT
        tables[at + 5u] = 0.0;
#else
        tables[at + 5u] = 1.0 / unit;
#endif
    }
}
