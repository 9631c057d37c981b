// Chunks of the list of pages, by number: UNITS of each page.
const UNITS: u32 = PAGE / CHUNK;

fn first_token(unit: u32) -> u32 {
    return entries[p.first_entry + unit / UNITS].logical * PAGE + unit % UNITS * CHUNK;
}

fn sequence_of(unit: u32) -> u32 {
    return entries[p.first_entry + unit / UNITS].sequence;
}

// The end of the chunks from `unit` on, and before `end`, that are of its sequence.
fn end_of_run(unit: u32, end: u32) -> u32 {
    let sequence = sequence_of(unit);
    var after = unit + 1u;
    while after < end && sequence_of(after) == sequence {
        after++;
    }
    return after;
}
