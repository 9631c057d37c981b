#import params
#import place
#import rows
#import order
#import scan
// Lists what a row selected, ascending, with scores: one workgroup per score row.
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> scores: array<u32>;
@group(0) @binding(3) var<storage, read_write> indices: array<i32>;
@group(0) @binding(4) var<storage, read_write> values: array<f32>;

@compute @workgroup_size(256)
fn main(place: Place) {
    let local = local_of(place);
    let index = group_index(place.group);
    if index >= p.groups {
        return;
    }
    let score_row = index;
    let row = rows[p.first_row + score_row / (KV_HEADS * SCORE_ROWS)];
    let head = score_row % (KV_HEADS * SCORE_ROWS);
    let scores_at = p.header + row.score_base + head * score_stride(row.visible);
    let threshold = scores[score_row * 2u];
    let last_token = scores[score_row * 2u + 1u];
    let results_at = (p.first_row * KV_HEADS * SCORE_ROWS + score_row) * p.width;
    var filled = 0u;
    for (var first = 0u; first < row.visible; first += 256u) {
        let token = first + local;
        var taken = false;
        var key = 0u;
        if token < row.visible {
            key = scores[scores_at + token];
            taken = in_base(row, token) || key > threshold || (key == threshold && token <= last_token);
        }
        let upto = inclusive_scan(local, select(0u, 1u, taken));
        let at = filled + upto - 1u;
        if taken && at < p.width {
            indices[results_at + at] = i32(token);
            values[results_at + at] = select(order_score(key), 0.0, row.unindexed == 1u);
        }
        filled += scan_total();
        workgroupBarrier();
    }
    for (var i = filled + local; i < p.width; i += 256u) {
        indices[results_at + i] = -1;
        values[results_at + i] = 0.0;
    }
}
