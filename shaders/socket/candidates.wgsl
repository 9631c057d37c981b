#import params
#import rows
#import order
#import find_bin
// Collects the keys of the bin in which a row's threshold lies: one workgroup per (row, score row, span of tokens).
// Scratch space counts score rows from the first of the block.
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> tables: array<f32>;
@group(0) @binding(3) var<storage, read> scores: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> histogram: array<atomic<u32>>;
@group(0) @binding(5) var<storage, read_write> candidates: array<u32>;

const TABLE_ROW: u32 = 4u + ENTRIES;

fn histogram_read(at: u32) -> u32 {
    return atomicLoad(&histogram[at]);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let spans = p.max_count;
    let score_row = index / spans;
    let span = index % spans;
    let head = score_row % (KV_HEADS * SCORE_ROWS);
    let row = rows[p.first_row + score_row / (KV_HEADS * SCORE_ROWS)];
    let first = span * SPAN;
    // Rows that keep every key need no threshold.
    if first >= row.visible || row.heavy >= row.visible || row.heavy == 0u {
        return;
    }
    let scores_at = p.header + row.score_base + head * score_stride(row.visible);
    let last = min(row.visible, first + SPAN);
    // All scores are on their way while the bin is found: four tokens a load.
#repeat i QUADS
    let token$i = first + ($iu * 256u + local) * 4u;
    var keys$i = vec4<u32>();
    if token$i < last {
        keys$i = scores[(scores_at + token$i) / 4u];
    }
#end
    let histogram_at = score_row * HISTOGRAM_ROW;
    let found = find_bin(local, histogram_at, row.heavy);
    if found.total <= row.heavy {
        return;
    }
    let header = (score_row / SCORE_ROWS * SCORING_HEADS + score_row % SCORE_ROWS) * TABLE_ROW;
    let low = tables[header];
    let inverse_width = tables[header + 1u];
#repeat i QUADS
#repeat c 4
    {
        let token = token$i + $cu;
        let key = keys$i[$c];
#ifdef DISJOINT
        let contested = token < last && !in_base(row, token);
#else
        let contested = token < last;
#endif
        if contested && order_bin(key, low, inverse_width) == found.bin {
            let at = atomicAdd(&histogram[histogram_at + BINS], 1u);
            // A row with more candidates than the list holds is searched whole by the next kernel.
            if at < CANDIDATES {
                candidates[(score_row * CANDIDATES + at) * 2u] = key;
                candidates[(score_row * CANDIDATES + at) * 2u + 1u] = token;
            }
        }
    }
#end
#end
}
