#import params
#import rows
#import order
#import ranges
#import rescore_candidate
// Exact scores for the listed keys of many rows, or of long lists: SLICES workgroups per score row share its list.
@group(0) @binding(1) var<storage, read> index_pages: array<u32>;
@group(0) @binding(2) var<storage, read> rows: array<Row>;
@group(0) @binding(3) var<storage, read> tables: array<f32>;
@group(0) @binding(4) var<storage, read_write> scores: array<u32>;
@group(0) @binding(5) var<storage, read> histogram: array<u32>;
@group(0) @binding(6) var<storage, read_write> candidates: array<u32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let score_row = index / SLICES;
    let row = rows[p.first_row + score_row / (KV_HEADS * SCORE_ROWS)];
    let head = score_row % (KV_HEADS * SCORE_ROWS);
    let histogram_at = score_row * HISTOGRAM_ROW + BINS;
    let low = histogram[histogram_at + 2u];
    let high = histogram[histogram_at + 3u];
    // Rows that need no threshold have no list.
    if low > high {
        return;
    }
    let listed = min(histogram[histogram_at], CANDIDATES);
    let scores_at = p.header + row.score_base + head * score_stride(row.visible);
    for (var i = index % SLICES * 256u + local; i < listed; i += SLICES * 256u) {
        rescore_candidate(score_row * CANDIDATES + i, scores_at, score_row * TABLE_ROW, low, high);
    }
}
