// The host's version of shaders/cuda/common/numbers.cuh.
#pragma once
static inline float finite_or_zero(float x) { return std::isfinite(x) ? x : 0.0f; }
template <int TYPE> static float load_raw(const void *data, unsigned long long at) {
    if (TYPE == 0) return ((const float *)data)[at];
    unsigned short x = ((const unsigned short *)data)[at];
    return TYPE == 2 ? bf16_float(x) : f16_floats(x).x;
}
template <int TYPE> static float load(const void *data, unsigned long long at) { return finite_or_zero(load_raw<TYPE>(data, at)); }
template <int TYPE> static void store(void *data, unsigned long long at, float x) {
    if (TYPE == 0) ((float *)data)[at] = x;
    else ((unsigned short *)data)[at] = TYPE == 2 ? bf16_pair(x, 0) : f16_pair(x, 0);
}
