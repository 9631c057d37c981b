#import params
#import double
#import hash
#import segments
// Replaces the sum of each segment by the sum before it, the state included, and moves the state on: one workgroup per
// (unit, WIDTH columns). With REVERSE it is the sum after each segment, and the state is a gradient.
//
// | | state s → matrix row s | last row | back |
// |---|---|---|---|
// | forward | R·x_s − c·m | m = Σ x / L | (c·m + M_s) / R |
// | reverse | (x_s − c·m / R) / R, m = Σ x / L | c·Σ x / R | R·M_s + (M_S − c·Σ M) / L |
//
// FLAG 1 writes the sum of everything as the one matrix of the unit; FLAG 2 leaves the state as it is.
@group(0) @binding(2) var<storage, read_write> state: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> matrices: array<f32>;
@group(0) @binding(4) var<storage, read_write> segments: array<vec2<f32>>;

const COLUMNS: u32 = VALUE_DIM + 1u;
const COLUMN_BLOCKS: u32 = (COLUMNS + WIDTH - 1u) / WIDTH;
const STRIDE: u32 = 256u / WIDTH;
const INVERSE: f32 = 1.0 / SIZE;
var<workgroup> parts: array<vec2<f32>, 256>;
#ifdef REVERSE
var<workgroup> last_rows: array<vec2<f32>, WIDTH>;
#endif

// Sum over the invocations of a column, in a fixed order.
fn column_sum(local: u32, value: vec2<f32>) -> vec2<f32> {
    workgroupBarrier();
    parts[local] = value;
    workgroupBarrier();
    for (var step = 128u; step >= WIDTH; step = step >> 1u) {
        if local < step {
            parts[local] = double_add(parts[local], parts[local + step]);
        }
        workgroupBarrier();
    }
    return parts[local % WIDTH];
}

// The s-th matrix row of a state whose last row is known.
fn entry(at: u32, s: u32, centre: f32, last: vec2<f32>) -> vec2<f32> {
    if s == BUCKETS {
        return last;
    }
#ifdef REVERSE
    // Rows of the sums that it is a gradient of add up to zero where c is 1: a constant off all of them changes nothing,
    // and leaves small what keys take from them.
    return double_add(state[at] * INVERSE, vec2<f32>(-last.x / f32(BUCKETS), 0.0));
#else
    return double_add(state[at] * SIZE, -centre * last);
#endif
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let unit = index / COLUMN_BLOCKS;
    let b = unit / p.heads;
    let kv_head = p.head + unit % p.heads;
    let centre = centre_of(kv_head);
    let count = (chunks_of(b) + SEGMENT - 1u) / SEGMENT;
    let column = index % COLUMN_BLOCKS * WIDTH + local % WIDTH;
    let inside = column < COLUMNS;
    let first_row = local / WIDTH;
    let state_at = p.state_at + (b * KV_HEADS + kv_head) * ENSEMBLES * BUCKETS * COLUMNS + column;
    let segment_at = unit * segment_count() * MATRIX + column;

    var total = vec2<f32>();
    if inside {
        for (var s = first_row; s < BUCKETS; s += STRIDE) {
            total = double_add(total, state[state_at + s * COLUMNS]);
        }
    }
    total = column_sum(local, total);
#ifdef REVERSE
    let last = total * (centre * INVERSE);
    var sum = vec2<f32>();
#else
    let last = double_over(total, TABLES);
    // The last row at the end, for the way back.
    var added = vec2<f32>();
    if inside {
        for (var i = first_row; i < count; i += STRIDE) {
            added = double_add(added, segments[segment_at + i * MATRIX + BUCKETS * MATRIX_ROW]);
        }
    }
    // Nobody overwrites that row before all have read it.
    storageBarrier();
    let last_after = double_add(last, column_sum(local, added));
#endif
    if inside {
        for (var s = first_row; s <= BUCKETS; s += STRIDE) {
            var value = entry(state_at + s * COLUMNS, s, centre, last);
            let row_at = segment_at + s * MATRIX_ROW;
            for (var base = 0u; base < count; base += 8u) {
                // All loads first.
#repeat i 8
                let at$i = row_at + min(base + $iu, count - 1u) * MATRIX;
                let x$i = segments[at$i];
#end
#repeat i 8
                if base + $iu < count {
                    segments[at$i] = value;
                    value = double_add(value, x$i);
                }
#end
            }
            if (p.flags & 1u) != 0u {
                matrices[unit * p.slots * MATRIX + s * MATRIX_ROW + column] = value.x;
            }
#ifdef REVERSE
            if s == BUCKETS {
                last_rows[local % WIDTH] = value;
            }
#endif
            if s < BUCKETS && count > 0u && (p.flags & 2u) == 0u {
#ifdef REVERSE
                sum = double_add(sum, value);
                state[state_at + s * COLUMNS] = value * SIZE;
#else
                state[state_at + s * COLUMNS] = double_add(centre * last_after, value) * INVERSE;
#endif
            }
        }
    }
#ifdef REVERSE
    if count > 0u && (p.flags & 2u) == 0u {
        let of_buckets = column_sum(local, sum);
        let rest = double_over(double_add(last_rows[local % WIDTH], -centre * of_buckets), TABLES);
        if inside {
            for (var s = first_row; s < BUCKETS; s += STRIDE) {
                state[state_at + s * COLUMNS] = double_add(state[state_at + s * COLUMNS], rest);
            }
        }
    }
#endif
}
