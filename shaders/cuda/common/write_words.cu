// Writes its arguments to memory: small data of a step, without host memory that a captured graph would come back to.
struct WriteParams {
    unsigned words[WORDS];
    unsigned count;
};

extern "C" __global__ void write_words(const __grid_constant__ WriteParams p, unsigned* out) {
    for (unsigned i = threadIdx.x; i < p.count; i += blockDim.x) {
        out[i] = p.words[i];
    }
}
