// A key's exact score, as an integer: what coarse scores give way to near the threshold.
const CODE_MASK: u32 = (1u << PLANES) - 1u;

fn add_word(before: f32, word: u32, first_table: u32, table_at: u32) -> f32 {
    var sum = before;
    var codes = word;
    for (var t = 0u; t < TABLES_PER_WORD; t++) {
        if first_table + t < TABLES {
            let code = codes & CODE_MASK;
            codes = codes >> PLANES;
            let at = table_at + TABLE_HEADER + (first_table + t) * DIGITS * 16u;
#ifdef PRODUCT
            var value = tables[at + (code & 15u)];
            for (var d = 1u; d < DIGITS; d++) {
                value *= tables[at + d * 16u + ((code >> (d * 4u)) & 15u)];
            }
            sum += value;
#else
            for (var d = 0u; d < DIGITS; d++) {
                sum += tables[at + d * 16u + ((code >> (d * 4u)) & 15u)];
            }
#endif
        }
    }
    return sum;
}

fn exact_key(key_at: u32, table_at: u32) -> u32 {
    // All of the key is on its way before the first look-up.
    var gain = 1.0;
    var bias = 0.0;
#ifdef SCALARS
    gain = bitcast<f32>(index_pages[key_at + WORDS * PAGE]);
#endif
#ifdef BIAS
    bias = bitcast<f32>(index_pages[key_at + (WORDS + 1u) * PAGE]);
#endif
#repeat w WORDS
    let codes$w = index_pages[key_at + $wu * PAGE];
#end
    var sum = 0.0;
#repeat w WORDS
    sum = add_word(sum, codes$w, $wu * TABLES_PER_WORD, table_at);
#end
    return order_key(gain * sum + (bias + range_at(table_at).shift));
}

// Marks the token of a listed key that has no exact score yet.
const COARSE_TOKEN: u32 = 0x80000000u;
