// Few folded queries (decoding): dot products with keys where they lie, all heads of a page part side by side.
#pragma once

#include "attention_parts.h"

namespace {

// Walks over the next tile in the order of memory while this one is computed.
template <class T>
struct Prefetch {
    const KeyTile<T>* tile;  // null: none
    int64_t bytes;           // that a task reads of each page
    int key = 0;
    int64_t byte = 0;

    void lines(int64_t count) {
        if (!tile) return;
        for (; count > 0 && key < tile->count; count--) {
            __builtin_prefetch((const char*)tile->keys[key] + byte, 0, 2);
            __builtin_prefetch((const char*)tile->values[key] + byte, 0, 2);
            byte += 64;
            if (byte >= bytes) byte = 0, key++;
        }
    }
};

// Scores of Q queries, C numbers apart for each key; a vector holds LANES / C keys.
template <int Q, class T>
inline void direct_scores(
    const float* query, const KeyTile<T>& tile, int64_t head, int64_t head_dim, float* scores, Prefetch<T>& prefetch) {
    constexpr int C = Q > 2 ? 4 : Q;
    constexpr int kKeys = LANES / C;
    int64_t lines = (kKeys * head_dim * sizeof(T) + 63) / 64;
    for (int first = 0; first < tile.count; first += kKeys) {
        Vec acc[LANES] = {};
        prefetch.lines(lines);
        for (int64_t d = 0; d < head_dim; d += LANES) {
            for (int key = 0; key < kKeys; key++) {
                Vec numbers = load(tile.keys[first + key] + head + d);
                for (int q = 0; q < Q; q++) acc[key * C + q] += numbers * load(query + q * head_dim + d);
            }
        }
        store(scores + first * C, sum_each(acc));
    }
}

inline void direct_mask(const Scratch& s, int stride, int first, int queries, int begin, int keys) {
    for (int query = 0; query < queries; query++) {
        for (int key = 0; key < keys; key++) {
            bool seen = begin + key <= s.last_key[first + query] && begin + key >= s.first_key[first + query];
            if (!seen) s.scores[key * stride + query] = kMasked;
        }
    }
}

// Turns scores of C queries a key into weights; keeps the largest score, the sum, and by how much they shrank.
template <int C>
inline void direct_softmax(float* scores, int keys, float* max, float* sum, float* decay) {
    int count = keys * C, vectors = (count + LANES - 1) / LANES;
    for (int at = count; at < vectors * LANES; at++) scores[at] = kMasked;
    Vec highest = load(scores);
    for (int v = 1; v < vectors; v++) highest = larger(load(scores + v * LANES), highest);
    float old[C];
    for (int q = 0; q < C; q++) {
        old[q] = max[q];
        for (int lane = q; lane < LANES; lane += C) max[q] = highest[lane] > max[q] ? highest[lane] : max[q];
    }
    Vec limits, shrunk, total = {};
    for (int lane = 0; lane < LANES; lane++) limits[lane] = max[lane % C], shrunk[lane] = old[lane % C];
    shrunk = exp(shrunk - limits);
    for (int v = 0; v < vectors; v++) {
        Vec weights = exp(load(scores + v * LANES) - limits);
        store(scores + v * LANES, weights);
        total += weights;
    }
    for (int q = 0; q < C; q++) {
        decay[q] = shrunk[q], sum[q] *= shrunk[q];
        for (int lane = q; lane < LANES; lane += C) sum[q] += total[lane];
    }
}

template <int Q, class T>
inline void attend_directly(
    const AttentionCall& call, const Scratch& s, const KeyTile<T>& tile, int64_t head, int first,
    Prefetch<T>& prefetch) {
    constexpr int C = Q > 2 ? 4 : Q;
    int64_t head_dim = call.head_dim;
    direct_scores<Q>(s.query + first * head_dim, tile, head, head_dim, s.scores, prefetch);
    if (call.softcap > 0.0f) {
        for (int at = 0; at < tile.count * C; at += LANES) {
            store(s.scores + at, cap(load(s.scores + at), call.softcap));
        }
    }
    if (!all_seen(s, tile.begin, tile.begin + tile.count, first, Q)) {
        direct_mask(s, C, first, Q, tile.begin, tile.count);
    }
    // Sums of the C - Q queries that aren't there land in a place of their own.
    float max[4], sum[4];
    for (int q = 0; q < C; q++) max[q] = q < Q ? s.max[first + q] : 0.0f, sum[q] = q < Q ? s.sum[first + q] : 0.0f;
    direct_softmax<C>(s.scores, tile.count, max, sum, s.decay);
    for (int q = 0; q < Q; q++) s.max[first + q] = max[q], s.sum[first + q] = sum[q];
    add_values<Q>(s.scores, C, tile, head, head_dim, s.out + first * head_dim, s.decay);
}

template <class T>
inline void attend_all_directly(
    const AttentionCall& call, const AttentionTask& task, const Scratch& s, const KeyTile<T>& tile,
    const KeyTile<T>* next) {
    int queries = task.count * (call.heads / call.kv_heads);
    Prefetch<T> prefetch{next, task.kv_heads * call.head_dim * (int64_t)sizeof(T)}, none{nullptr, 0};
    for (int at = 0; at < task.kv_heads; at++) {
        int first = at * queries, last = first + queries;
        int64_t head = (int64_t)at * call.head_dim;
        if (queries >= 4) attend_directly<4>(call, s, tile, head, first, prefetch);
        Prefetch<T>& rest = queries >= 4 ? none : prefetch;
        if (queries % 4 == 3) attend_directly<3>(call, s, tile, head, last - 3, rest);
        if (queries % 4 == 2) attend_directly<2>(call, s, tile, head, last - 2, rest);
        if (queries % 4 == 1) attend_directly<1>(call, s, tile, head, last - 1, rest);
    }
}

}  // namespace
