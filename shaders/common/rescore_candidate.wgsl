#import exact_key
// Gives a listed key its exact score where it has a coarse one: clamped to the bounds of the threshold, where it cannot
// change places with keys that are certainly above or below it. `at` is the list's entry, `scores_at` the row's scores.
fn rescore_candidate(at: u32, scores_at: u32, table_at: u32, low: u32, high: u32) {
    let token = candidates[at * 2u + 1u];
    if (token & COARSE_TOKEN) == 0u {
        return;
    }
    let key = clamp(exact_key(candidates[at * 2u], table_at), low, high);
    candidates[at * 2u] = key;
    candidates[at * 2u + 1u] = token & ~COARSE_TOKEN;
    scores[scores_at + (token & ~COARSE_TOKEN)] = key;
}
