#import params
#import items
#import stored
// Adds up the keys of one slab among the first `max_count` of a sequence, per channel, in pairs of (sum, rest) so that
// a long sum keeps its low bits. The state's mean holds the running sum until the last slab divides it.
@group(0) @binding(1) var<storage, read> items: array<Item>;
@group(0) @binding(2) var<storage, read> pages: array<u32>;
@group(0) @binding(3) var<storage, read> k_pages: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> seq_state: array<u32>;

var<workgroup> sums: array<f32, 256>;

// One workgroup per (item, kv head, channel).
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let channel = index % HEAD_DIM;
    let head = index / HEAD_DIM % KV_HEADS;
    let item = items[index / (HEAD_DIM * KV_HEADS)];
    var sum = 0.0;
    var rest = 0.0;
    for (var token = local; token < p.max_count; token += 256u) {
        let page = pages[item.pages_at + token / PAGE - item.first_page];
        if page >> 20u == p.slab {
            let row = ((page & 0xfffffu) * KV_HEADS + head) * PAGE + token % PAGE;
            let x = stored_element(k_pages[row * K_PIECES + channel / PIECE], channel % PIECE);
            let total = sum + x;
            rest += select((x - total) + sum, (sum - total) + x, abs(sum) >= abs(x));
            sum = total;
        }
    }
    sums[local] = sum + rest;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step = step >> 1u) {
        if local < step {
            sums[local] = sums[local] + sums[local + step];
        }
        workgroupBarrier();
    }
    if local == 0u {
        let at = item.slot * SLOT_WORDS + head * HEAD_DIM + channel;
        var mean = sums[0] * (1.0 / f32(p.max_count));
        if p.entries > 0u {
            mean += bitcast<f32>(seq_state[at]);
        }
        seq_state[at] = bitcast<u32>(mean);
    }
}
