#import params
#import place
#import rows
#import scan
#ifdef RESCORE
#import order
#import ranges
#import rescore_candidate
#endif
// The exact threshold of a row, as (key, last token): a key is selected if it is larger, or equal at or before that
// token. One workgroup per score row; eight bits at a time over (key, then lower token first).
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read_write> scores: array<u32>;
@group(0) @binding(3) var<storage, read> histogram: array<u32>;
#ifdef RESCORE
@group(0) @binding(4) var<storage, read_write> candidates: array<u32>;
@group(0) @binding(5) var<storage, read> index_pages: array<u32>;
@group(0) @binding(6) var<storage, read> tables: array<f32>;
#else
@group(0) @binding(4) var<storage, read> candidates: array<u32>;
#endif

// Candidates that each invocation keeps.
const KEPT: u32 = 8u;
var<workgroup> digits: array<atomic<u32>, 256>;
// The digit that the row's last selected key has, how many keys have a larger one, and how many have this one.
var<workgroup> chosen: vec3<u32>;

// What the rounds look for: four of them in the key, then four in the token, the lower one first.
struct Round {
    in_key: bool,
    shift: u32,
    mask: u32,
    key_prefix: u32,
    token_prefix: u32,
}

fn tally(round: Round, key: u32, token: u32) {
    if round.in_key {
        if (key & round.mask) == (round.key_prefix & round.mask) {
            atomicAdd(&digits[(key >> round.shift) & 255u], 1u);
        }
    } else if key == round.key_prefix && (~token & round.mask) == (round.token_prefix & round.mask) {
        atomicAdd(&digits[(~token >> round.shift) & 255u], 1u);
    }
}

@compute @workgroup_size(256)
fn main(place: Place) {
    let local = local_of(place);
    let index = group_index(place.group);
    if index >= p.groups {
        return;
    }
    let score_row = index;
    let head = score_row % (KV_HEADS * SCORE_ROWS);
    let row = rows[p.first_row + score_row / (KV_HEADS * SCORE_ROWS)];
    let histogram_at = score_row * HISTOGRAM_ROW;
    // How many are in the list, and above it; the bounds of what is.
    let listed = histogram[histogram_at + BINS];
    let above = histogram[histogram_at + BINS + 1u];
    let low = histogram[histogram_at + BINS + 2u];
    let high = histogram[histogram_at + BINS + 3u];
    // Rows that need no threshold have one already.
    if low > high {
        return;
    }
    let scores_at = p.header + row.score_base + head * score_stride(row.visible);
    let whole = listed > CANDIDATES;
    let count = select(listed, row.visible, whole);
    var wanted = row.heavy - above;
#ifdef RESCORE
    // Short lists of few rows get their exact scores here.
    for (var i = local; i < min(listed, CANDIDATES); i += 256u) {
        rescore_candidate(score_row * CANDIDATES + i, scores_at, score_row * TABLE_ROW, low, high);
    }
    storageBarrier();
#endif

    // Keys count from the lowest that there may be, shifted so that the highest fills all bits: the first digit then
    // tells keys apart.
    let lead = min(countLeadingZeros(high - low), 31u);

    // Lists of the usual length stay in registers.
    let kept = !whole && count <= 256u * KEPT;
#repeat c 8
    var key$c = 0u;
    var token$c = 0u;
    if kept && local + $cu * 256u < count {
        key$c = (candidates[(score_row * CANDIDATES + local + $cu * 256u) * 2u] - low) << lead;
        token$c = candidates[(score_row * CANDIDATES + local + $cu * 256u) * 2u + 1u];
    }
#end
    var key_prefix = 0u;
    var token_prefix = 0u;
    for (var i = 0u; i < 8u; i++) {
        let shift = 24u - (i & 3u) * 8u;
        // Digits that are zero in all keys.
        if i < 4u && shift + 8u <= lead {
            continue;
        }
        // Bits above the current digit; none in the first round of each half.
        let mask = select(0xffffffffu << (shift + 8u), 0u, (i & 3u) == 0u);
        let round = Round(i < 4u, shift, mask, key_prefix, token_prefix);
        workgroupBarrier();
        atomicStore(&digits[local], 0u);
        workgroupBarrier();
        if kept {
#repeat c 8
            if local + $cu * 256u < count {
                tally(round, key$c, token$c);
            }
#end
        } else {
            for (var at = local; at < count; at += 256u) {
                if whole {
                    let key = scores[scores_at + at];
                    var valid = key >= low && key <= high;
#ifdef DISJOINT
                    valid = valid && !in_base(row, at);
#endif
                    if valid {
                        tally(round, (key - low) << lead, at);
                    }
                } else {
                    let candidate = (score_row * CANDIDATES + at) * 2u;
                    tally(round, (candidates[candidate] - low) << lead, candidates[candidate + 1u]);
                }
            }
        }
        workgroupBarrier();
        // Invocation 0 owns the largest digit.
        let own = atomicLoad(&digits[255u - local]);
        let upto = inclusive_scan(local, own);
        if upto >= wanted && upto - own < wanted {
            chosen = vec3<u32>(255u - local, upto - own, own);
        }
        // The same to all invocations, so that all leave the loop at once: barriers in it ask for that.
        let digit = workgroupUniformLoad(&chosen);
        wanted -= digit.y;
        if i < 4u {
            key_prefix |= digit.x << shift;
        } else {
            token_prefix |= digit.x << shift;
        }
        // All that share these digits are selected: the rest of them may be zero, or the least of the list.
        if digit.z == wanted {
            break;
        }
    }
    if local == 0u {
        scores[score_row * 2u] = low + (key_prefix >> lead);
        scores[score_row * 2u + 1u] = ~token_prefix;
    }
}
