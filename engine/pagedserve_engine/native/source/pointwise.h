// What stands between a decoder's products: norms, rotary positions with the cache write, the gated activation.
#pragma once

#include <math.h>

#include "rows.h"

namespace {

using pagedserve::GatedCall;
using pagedserve::NormCall;
using pagedserve::RopeCall;

// RMS norm of row in place. An offset of 0 rounds to dtype before the weight, as Llama does; else (offset + weight)
// multiplies the unrounded numbers, as Gemma does.
inline void norm_row(float* row, float* weights, int64_t width, const void* weight, void* rounded, float eps,
                     float offset, int32_t dtype) {
    Vec squares = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) squares += load(row + i) * load(row + i);
    float sum = sum_lanes(squares);
    for (; i < width; i++) sum += row[i] * row[i];
    float factor = 1.0f / sqrtf(sum / width + eps);
    widen_from(weights, weight, 0, width, dtype);
    if (offset == 0.0f) {
        narrow_to(rounded, 0, row, width, dtype, factor);
        widen_from(row, rounded, 0, width, dtype);
        factor = 1.0f;
    }
    for (i = 0; i < width; i++) row[i] = row[i] * factor * (offset + weights[i]);
}

inline int64_t bytes(int32_t dtype) { return dtype == pagedserve::kFloat32 ? 4 : 2; }

void norm(const NormCall& call, int64_t token, float* scratch) {
    int64_t width = call.width, start = token * width;
    float *row = scratch, *other = scratch + width;
    widen_from(row, call.x, start, width, call.dtype);
    if (call.residual) {
        widen_from(other, call.residual, start, width, call.dtype);
        for (int64_t i = 0; i < width; i++) row[i] += other[i];
        narrow_to(call.residual, start, row, width, call.dtype);
        widen_from(row, call.residual, start, width, call.dtype);
    }
    char* out = (char*)call.out + start * bytes(call.dtype);
    norm_row(row, other, width, call.weight, out, call.eps, call.offset, call.dtype);
    narrow_to(out, 0, row, width, call.dtype);
}

inline void rotate(float* head, const float* cos, int64_t half) {
    const float* sin = cos + half;
    for (int64_t i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i] + a * sin[i];
    }
}

void rope(const RopeCall& call, int64_t token, float* scratch) {
    int64_t width = call.head_dim, page = call.write_indices[token] * call.kv_heads;
    const float* cos = call.cos_sin + call.positions[token] * call.rotary_dim;
    float *head = scratch, *weights = scratch + width, *rounded = scratch + 2 * width;
    for (int place = 0; place < call.heads + 2 * call.kv_heads; place++) {
        bool is_query = place < call.heads, is_value = place >= call.heads + call.kv_heads;
        widen_from(head, call.qkv, token * call.qkv_stride + place * width, width, call.dtype);
        const void* weight = is_query ? call.q_norm : is_value ? nullptr : call.k_norm;
        if (weight) {
            norm_row(head, weights, width, weight, rounded, call.eps, call.offset, call.dtype);
            narrow_to(rounded, 0, head, width, call.dtype);
            widen_from(head, rounded, 0, width, call.dtype);
        }
        if (!is_value) rotate(head, cos, call.rotary_dim / 2);
        if (is_query) {
            narrow_to(call.query, (token * call.heads + place) * width, head, width, call.dtype);
        } else if (page >= 0) {
            int kv_head = (place - call.heads) % call.kv_heads;
            void* pages = is_value ? call.values : call.keys;
            with_cache_type(call.cache_dtype, [&](auto type) {
                narrow_row(at(pages, (page + kv_head) * width, type), head, width, 1.0f);
            });
        }
    }
}

inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

inline Vec gelu_tanh(Vec x) {
    Vec inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanh(inner));
}

template <class T>
void gated_typed(const GatedCall& call, int64_t token, float* scratch, const T*) {
    const T *gate = (const T*)call.gate_up + token * 2 * call.width, *up = gate + call.width;
    T* out = (T*)call.out + token * call.width;
    bool is_silu = call.activation == 0;
    int64_t i = 0;
    for (; i + LANES <= call.width; i += LANES) {
        Vec x = load(gate + i);
        store(out + i, (is_silu ? silu(x) : gelu_tanh(x)) * load(up + i));
    }
    int64_t rest = call.width - i;
    if (rest == 0) return;
    memset(scratch, 0, sizeof(Vec));
    widen_row(scratch, gate + i, rest, 1.0f);
    Vec x = load(scratch);
    store(scratch, is_silu ? silu(x) : gelu_tanh(x));
    for (int64_t j = 0; j < rest; j++) narrow(out + i + j, scratch[j] * widen(up[i + j]));
}

void gated(const GatedCall& call, int64_t token, float* scratch) {
    with_type(call.dtype, [&](auto type) { gated_typed(call, token, scratch, type); });
}

}  // namespace
