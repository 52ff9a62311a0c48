// Many folded queries (prefill): scores by matrix products with the queries transposed once for the task.
#pragma once

#include "attention_parts.h"

namespace {

inline void tile_mask(const Scratch& s, int64_t width, int begin, int keys) {
    for (int64_t lane = 0; lane < width; lane += LANES) {
        IntVec first, last;
        memcpy(&first, s.first_key + lane, sizeof first);
        memcpy(&last, s.last_key + lane, sizeof last);
        for (int key = 0; key < keys; key++) {
            IntVec at = IntVec{} + (begin + key);
            float* scores = s.scores + key * width + lane;
            store(scores, (at <= last) & (at >= first) ? load(scores) : all(kMasked));
        }
    }
}

template <int R, int N>
inline void tile_scores(const float* keys, const float* query, int64_t width, int64_t head_dim, float* scores) {
    Vec acc[R][N] = {};
    multiply<R, N>(
        head_dim, [&](int r, int64_t k) { return keys[r * head_dim + k]; },
        [&](int64_t k, int v) { return query + k * width + v * LANES; }, acc);
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < N; v++) store(scores + r * width + v * LANES, acc[r][v]);
    }
}

inline void tile_softmax(int keys, int64_t width, const Scratch& s) {
    float* scores = s.scores;
    for (int64_t lane = 0; lane < width; lane += LANES) {
        Vec old = load(s.max + lane), highest = old, total = {};
        for (int key = 0; key < keys; key++) highest = larger(load(scores + key * width + lane), highest);
        Vec shrunk = exp(old - highest);
        for (int key = 0; key < keys; key++) {
            Vec weights = exp(load(scores + key * width + lane) - highest);
            store(scores + key * width + lane, weights);
            total += weights;
        }
        store(s.max + lane, highest);
        store(s.decay + lane, shrunk);
        store(s.sum + lane, load(s.sum + lane) * shrunk + total);
    }
}

// Scores of every key for N vectors of queries, and their values: R rows of the left factor at a time, while the part
// of the right one that they share stays in the nearest cache.
template <int N>
inline void tile_scores_of(const Scratch& s, int keys, int64_t lane, int64_t width, int64_t head_dim) {
    in_blocks(keys, [&](auto rows, int64_t key) {
        float* scores = s.scores + key * width + lane;
        tile_scores<decltype(rows)::count, N>(s.keys + key * head_dim, s.query + lane, width, head_dim, scores);
    });
}

template <int N, class T>
inline void tile_values(
    const Scratch& s, const KeyTile<T>& tile, int queries, int64_t column, int64_t width, int64_t head_dim) {
    in_blocks(queries, [&](auto rows, int64_t query) {
        float* out = s.out + query * head_dim;
        add_columns<decltype(rows)::count, N>(
            s.scores + query, width, tile, 0, column, head_dim, out, s.decay + query);
    });
}

template <class T>
inline void attend_tile(const AttentionCall& call, const Scratch& s, const KeyTile<T>& tile, int queries) {
    int64_t head_dim = call.head_dim, width = (queries + LANES - 1) / LANES * LANES;
    for (int key = 0; key < tile.count; key++) widen_row(s.keys + key * head_dim, tile.keys[key], head_dim, 1.0f);
    int64_t lane = 0, column = 0;
    for (; lane + 2 * LANES <= width; lane += 2 * LANES) tile_scores_of<2>(s, tile.count, lane, width, head_dim);
    if (lane < width) tile_scores_of<1>(s, tile.count, lane, width, head_dim);
    if (call.softcap > 0.0f) {
        for (int64_t at = 0; at < tile.count * width; at += LANES) {
            store(s.scores + at, cap(load(s.scores + at), call.softcap));
        }
    }
    if (!all_seen(s, tile.begin, tile.begin + tile.count, 0, queries)) {
        tile_mask(s, width, tile.begin, tile.count);
    }
    tile_softmax(tile.count, width, s);
    for (; column + 2 * LANES <= head_dim; column += 2 * LANES) {
        tile_values<2>(s, tile, queries, column, width, head_dim);
    }
    if (column < head_dim) tile_values<1>(s, tile, queries, column, width, head_dim);
}

}  // namespace
