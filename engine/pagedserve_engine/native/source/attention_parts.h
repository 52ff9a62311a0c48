// What decoding and prefill share: a task's scratch memory, where its keys stand, and the sum over values.
#pragma once

#include <float.h>

#include "rows.h"

namespace {

using pagedserve::AttentionCall;
using pagedserve::AttentionTask;
using pagedserve::kAlign;
using pagedserve::kDirectQueries;
using pagedserve::kKeyTile;
using pagedserve::kTileQueries;

// Less than any score, and still far above the score of a key that a query does not see: exp(masked - unseen) is 0.
constexpr float kUnseen = -1e38f;
constexpr float kMasked = -FLT_MAX;

inline int64_t padded(int64_t count) { return (count + kAlign - 1) / kAlign * kAlign; }

struct Scratch {
    float* query;   // direct: [queries, head_dim]; else [head_dim, width], scaled
    float* keys;    // [kKeyTile, head_dim] widened
    float* scores;  // [kKeyTile, width]
    float* out;     // [queries, head_dim], not yet divided by the sum
    float *max, *sum, *decay;  // [width]
    int32_t *first_key, *last_key;  // [width] which keys each query sees
    int64_t size;

    Scratch(float* start, int64_t queries, int64_t head_dim) {
        int64_t width = padded(queries);
        float* next = start;
        auto take = [&](int64_t count) {
            float* taken = next;
            next += padded(count);
            return taken;
        };
        query = take(width * head_dim);
        keys = take(kKeyTile * head_dim);
        scores = take((kKeyTile + 1) * width);
        out = take(queries * head_dim);
        max = take(width), sum = take(width), decay = take(width);
        first_key = (int32_t*)take(width), last_key = (int32_t*)take(width);
        size = next - start;
    }
};

int64_t attend_scratch(const AttentionCall& call) {
    int64_t group = call.heads / call.kv_heads;
    int64_t most = group > kTileQueries ? group : kTileQueries, direct = (int64_t)kDirectQueries * call.kv_heads;
    return Scratch(nullptr, direct > most ? direct : most, call.head_dim).size;
}

inline bool all_seen(const Scratch& s, int begin, int end, int first_query, int queries) {
    return end - 1 <= s.last_key[first_query] && begin >= s.first_key[first_query + queries - 1];
}

// Where the numbers of up to kKeyTile keys stand. Places beyond the last key repeat it, for loops over whole vectors.
template <class T>
struct KeyTile {
    const T* keys[kKeyTile + LANES];
    const T* values[kKeyTile + LANES];
    int begin, count;

    void find(const AttentionCall& call, const AttentionTask& task, int from) {
        int end = (from / kKeyTile + 1) * kKeyTile;
        begin = from, count = (end < task.end ? end : task.end) - from;
        const int32_t* block = call.table + task.row * call.table_stride + from / call.block_size;
        int64_t page_size = (int64_t)call.kv_heads * call.head_dim, head = (int64_t)task.kv_head * call.head_dim;
        int page = from % call.block_size;
        for (int at = 0; at < count; block++, page = 0) {
            int64_t offset = ((int64_t)*block * call.block_size + page) * page_size + head;
            for (; page < call.block_size && at < count; page++, at++, offset += page_size) {
                keys[at] = (const T*)call.keys + offset;
                values[at] = (const T*)call.values + offset;
            }
        }
        for (int at = count; at < kKeyTile + LANES; at++) keys[at] = keys[count - 1], values[at] = values[count - 1];
    }
};

inline Vec cap(Vec scores, float softcap) { return tanh(scores / softcap) * softcap; }

template <int R, int N, class T>
inline void add_columns(
    const float* weights, int stride, const KeyTile<T>& tile, int64_t head, int64_t column, int64_t head_dim,
    float* out, const float* decay) {
    Vec acc[R][N] = {};
    multiply<R, N>(
        tile.count, [&](int r, int64_t k) { return weights[k * stride + r]; },
        [&](int64_t k, int v) { return tile.values[k] + head + column + v * LANES; }, acc);
    for (int r = 0; r < R; r++) {
        float* row = out + r * head_dim + column;
        for (int v = 0; v < N; v++) store(row + v * LANES, load(row + v * LANES) * decay[r] + acc[r][v]);
    }
}

// out[r] = decay[r] * out[r] + the sum over keys of weights[key * stride + r] * value.
template <int R, class T>
inline void add_values(
    const float* weights, int stride, const KeyTile<T>& tile, int64_t head, int64_t head_dim, float* out,
    const float* decay) {
    constexpr int N = R == 1 ? 8 : R == 2 ? 4 : 2;
    int64_t column = 0;
    for (; column + N * LANES <= head_dim; column += N * LANES) {
        add_columns<R, N>(weights, stride, tile, head, column, head_dim, out, decay);
    }
    for (; column < head_dim; column += LANES) {
        add_columns<R, 1>(weights, stride, tile, head, column, head_dim, out, decay);
    }
}

}  // namespace
