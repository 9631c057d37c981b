#import params
#import place
#import items
#import stored
#import key_scalars
#import reduce
// Sign bits and scalars of a few new keys: one workgroup per (item, token, kv head), one plane per invocation.
@group(0) @binding(1) var<storage, read> items: array<Item>;
@group(0) @binding(2) var<storage, read> pages: array<u32>;
@group(0) @binding(3) var<storage, read> k_pages: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> v_pages: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> planes: array<f32>;
@group(0) @binding(6) var<storage, read_write> seq_state: array<atomic<u32>>;
@group(0) @binding(7) var<storage, read_write> index_pages: array<u32>;

// Channels whose loads are under way together.
const AT_ONCE: u32 = 32u;
const CHANNELS: u32 = (HEAD_DIM + AT_ONCE - 1u) / AT_ONCE * AT_ONCE;
var<workgroup> key: array<f32, CHANNELS>;
var<workgroup> words: array<atomic<u32>, WORDS>;

@compute @workgroup_size(256)
fn main(place: Place) {
    let local = local_of(place);
    let index = group_index(place.group);
    if index >= p.groups {
        return;
    }
    let head = index % KV_HEADS;
    let item = items[index / KV_HEADS / p.max_count];
    let token = item.hash_start + index / KV_HEADS % p.max_count;
    if token >= item.hash_end {
        return;
    }
    let page = pages[item.pages_at + token / PAGE - item.first_page];
    if page >> 20u != p.slab {
        return;
    }
    let page_head = (page & 0xfffffu) * KV_HEADS + head;
    let row = page_head * PAGE + token % PAGE;
    let planes_at = select(0u, head, p.planes_stride > 0u) * p.planes_stride;
    var key_square = 0.0;
    for (var c = local; c < HEAD_DIM; c += 256u) {
        var x = stored_element(k_pages[row * K_PIECES + c / PIECE], c % PIECE);
#ifdef CENTER
        x -= bitcast<f32>(atomicLoad(&seq_state[item.slot * SLOT_WORDS + head * HEAD_DIM + c]));
#endif
        key[c] = x;
        key_square += x * x;
    }
    for (var c = HEAD_DIM + local; c < CHANNELS; c += 256u) {
        key[c] = 0.0;
    }
    for (var i = local; i < WORDS; i += 256u) {
        atomicStore(&words[i], 0u);
    }
    workgroupBarrier();
    var projection_sum = 0.0;
    for (var plane = local; plane < BITS; plane += 256u) {
        var u = 0.0;
        for (var c = 0u; c < HEAD_DIM; c += AT_ONCE) {
#repeat j 32
            let w$j = planes[planes_at + min(c + $ju, HEAD_DIM - 1u) * BITS + plane];
#end
#repeat j 32
            u += key[c + $ju] * w$j;
#end
        }
        projection_sum += abs(u);
        let table = plane / PLANES;
        let bit = table % TABLES_PER_WORD * PLANES + PLANES - 1u - plane % PLANES;
        if u >= 0.0 {
            atomicOr(&words[table / TABLES_PER_WORD], 1u << bit);
        }
    }
    workgroupBarrier();
    let at = token % PAGE;
    for (var i = local; i < WORDS; i += 256u) {
        index_pages[(page_head * INDEX_WORDS + i) * PAGE + at] = atomicLoad(&words[i]);
    }
#ifdef SCALARS
    var square = 0.0;
#ifdef VALUE_NORM
    for (var c = local; c < VALUE_DIM; c += 256u) {
        let x = stored_element(v_pages[row * V_PIECES + c / PIECE], c % PIECE);
        square += x * x;
    }
#endif
    let value_norm = sqrt(reduce_sum(local, square));
    let key_total = reduce_sum(local, key_square);
    let projections = reduce_sum(local, projection_sum);
    if local == 0u {
        let gain = key_gain(value_norm, key_total, projections);
        index_pages[(page_head * INDEX_WORDS + WORDS) * PAGE + at] = bitcast<u32>(gain);
        atomicMax(&seq_state[item.slot * SLOT_WORDS + KV_HEADS * HEAD_DIM + head], bitcast<u32>(gain));
#ifdef BIAS
        index_pages[(page_head * INDEX_WORDS + WORDS + 1u) * PAGE + at] = bitcast<u32>(key_bias(value_norm));
#endif
    }
#endif
}
