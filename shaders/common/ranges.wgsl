#import header
// How far coarse scores of products may be off, beside the error in the header: half a unit in the last place of each
// digit's entry.
const RELATIVE_ERROR: f32 = f32(DIGITS) * 5e-4;

// The word of a header that holds `inverse_unit`: scoring reads it alone.
const INVERSE_UNIT: u32 = 5u;

// What is known of a query's scores.
struct Range {
    // Scores between `low` and where the bins end.
    low: f32,
    inverse_width: f32,
    shift: f32,
    // How far coarse scores may be off at most.
    error: f32,
    // One unit of coarse sums, and how many to 1.
    unit: f32,
    inverse_unit: f32,
}

fn range_at(at: u32) -> Range {
    return Range(tables[at], tables[at + 1u], tables[at + 2u], tables[at + 3u], tables[at + 4u], tables[at + INVERSE_UNIT]);
}
