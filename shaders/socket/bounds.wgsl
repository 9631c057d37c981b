#import params
#import place
#import rows
#import order
#import find_bin
#import ranges
// Bounds between which a row's threshold lies: those of its bin, and as far around as scores may be off. One workgroup
// per score row. Rows that need no threshold get it here, and bounds that hold nothing.
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> tables: array<f32>;
@group(0) @binding(3) var<storage, read_write> scores: array<u32>;
@group(0) @binding(4) var<storage, read_write> histogram: array<u32>;

fn histogram_read(at: u32) -> u32 {
    return histogram[at];
}

@compute @workgroup_size(256)
fn main(place: Place) {
    let local = local_of(place);
    let index = group_index(place.group);
    if index >= p.groups {
        return;
    }
    let score_row = index;
    let row = rows[p.first_row + score_row / (KV_HEADS * SCORE_ROWS)];
    let histogram_at = score_row * HISTOGRAM_ROW;
    let found = find_bin(local, histogram_at, max(row.heavy, 1u));
    if local > 0u {
        return;
    }
    let bounds_at = histogram_at + BINS + 2u;
    if row.heavy == 0u || row.heavy >= row.visible || found.total <= row.heavy {
        scores[score_row * 2u] = select(0u, 0xffffffffu, row.heavy == 0u);
        scores[score_row * 2u + 1u] = select(0xffffffffu, 0u, row.heavy == 0u);
        histogram[bounds_at] = 0xffffffffu;
        histogram[bounds_at + 1u] = 0u;
        return;
    }
    let range = range_at((score_row / SCORE_ROWS * SCORING_HEADS + score_row % SCORE_ROWS) * TABLE_ROW);
    let width = 1.0 / range.inverse_width;
    let lowest = range.low + f32(found.bin) * width;
    let highest = lowest + width;
    // Keys may rank apart by twice the error of one.
    let magnitude = max(abs(range.low), abs(range.low + f32(BINS) * width));
    var margin = 8e-6 * magnitude;
#ifdef COARSE
    margin += 2.0 * range.error;
#ifdef PRODUCT
    let score = max(abs(lowest), abs(highest));
    // Both sums round once per table, at most.
    margin += (2.0 * RELATIVE_ERROR + f32(TABLES) * 2.4e-7) * score;
#endif
#endif
    // The bins at the ends hold all beyond them, and where every score is the same there is but one.
    let first = found.bin == 0u || range.inverse_width == 0.0;
    histogram[bounds_at] = select(order_key(lowest - margin), 0u, first);
    histogram[bounds_at + 1u] = select(order_key(highest + margin), 0xffffffffu, found.bin == BINS - 1u || range.inverse_width == 0.0);
}
