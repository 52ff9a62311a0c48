// Products with weights that are packed once, at load: panels of 2 * LANES output columns, k by k.
//
// 16-bit weights stay 16-bit in memory and are widened in registers; sums are float32, in the order of k whatever is
// batched beside a row, so that a row's result does not depend on its batch.
#pragma once

#include "rows.h"

namespace {

using pagedserve::ProductCall;

constexpr int kPanel = 2 * LANES;

int64_t panel(void) { return kPanel; }

template <class T>
void pack_typed(const T* weight, T* packed, int64_t in_features, int64_t out_features) {
    for (int64_t first = 0; first < out_features; first += kPanel) {
        for (int64_t k = 0; k < in_features; k++) {
            for (int64_t column = first; column < first + kPanel; column++) {
                *packed++ = column < out_features ? weight[column * in_features + k] : T{};
            }
        }
    }
}

void pack(const void* weight, void* packed, int64_t in_features, int64_t out_features, int32_t dtype) {
    with_type(dtype, [&](auto type) {
        pack_typed(at(weight, 0, type), at(packed, 0, type), in_features, out_features);
    });
}

inline void store_panel(const ProductCall& call, int64_t token, int64_t column, const Vec* sums, int vectors) {
    float row[8 * LANES];
    int64_t count = call.out_features - column;
    if (count > vectors * LANES) count = vectors * LANES;
    for (int v = 0; v < vectors; v++) store(row + v * LANES, sums[v]);
    if (call.bias) {
        for (int64_t i = 0; i < count; i++) row[i] += call.bias[column + i];
    }
    narrow_to(call.out, token * call.out_features + column, row, count, call.dtype);
}

template <int R, int PANELS, class T>
inline void multiply_panels(const ProductCall& call, int64_t token, int64_t first_panel, const T*) {
    int64_t in_features = call.in_features;
    const float* x = call.x + token * in_features;
    const T* packed = (const T*)call.weight + first_panel * in_features * kPanel;
    Vec acc[R][2 * PANELS] = {};
    multiply<R, 2 * PANELS>(
        in_features, [&](int r, int64_t k) { return x[r * in_features + k]; },
        [&](int64_t k, int v) { return packed + (v / 2 * in_features + k) * kPanel + v % 2 * LANES; }, acc);
    for (int r = 0; r < R; r++) store_panel(call, token + r, first_panel * kPanel, acc[r], 2 * PANELS);
}

// As many panels at once as keep the sums in registers and enough of them in flight.
template <int R, class T>
inline void multiply_rows(const ProductCall& call, int64_t token, int64_t first_panel, int64_t panels, const T* type) {
    constexpr int kAtOnce = R == 1 ? 4 : R <= 3 ? 2 : 1;
    int64_t last = first_panel + panels, at = first_panel;
    for (; at + kAtOnce <= last; at += kAtOnce) multiply_panels<R, kAtOnce>(call, token, at, type);
    for (; at < last; at++) multiply_panels<R, 1>(call, token, at, type);
}

template <class T>
void multiply_typed(
    const ProductCall& call, int64_t first_token, int64_t tokens, int64_t first_panel, int64_t panels, const T* type) {
    // Few panels at a time stay in the nearest cache while all rows pass.
    for (int64_t at = first_panel; at < first_panel + panels; at += 4) {
        int64_t count = first_panel + panels - at < 4 ? first_panel + panels - at : 4;
        in_blocks(tokens, [&](auto rows, int64_t token) {
            multiply_rows<decltype(rows)::count>(call, first_token + token, at, count, type);
        });
    }
}

void multiply_some(
    const ProductCall& call, int64_t first_token, int64_t tokens, int64_t first_panel, int64_t panels) {
    with_type(call.weight_dtype, [&](auto type) {
        multiply_typed(call, first_token, tokens, first_panel, panels, type);
    });
}

void widen_some(float* to, const void* from, int32_t dtype, int64_t count) { widen_from(to, from, 0, count, dtype); }

}  // namespace
