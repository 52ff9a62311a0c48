// Paged attention of one task: folded queries of a row that share a key head, against a range of keys.
//
// Scores of a tile of keys lie key by key, the folded queries side by side. Few queries (decoding) take them by dot
// products straight from the cache; many (prefill) as a matrix product with the queries transposed once for the task,
// so that no key is ever transposed. From the scores on, both go the same way: softmax over the keys so far, then the
// values, widened in registers, are added up under the scores' weights.
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
    return Scratch(nullptr, group > kTileQueries ? group : kTileQueries, call.head_dim).size;
}

inline bool all_seen(const Scratch& s, int begin, int end, int first_query, int queries) {
    return end - 1 <= s.last_key[first_query] && begin >= s.first_key[first_query + queries - 1];
}

template <class T>
struct KeyTile {
    const T* keys[kKeyTile + LANES];
    const T* values[kKeyTile + LANES];
    int begin, count;

    KeyTile(const AttentionCall& call, const AttentionTask& task, int from, int end) : begin(from), count(end - from) {
        const int32_t* blocks = call.table + task.row * call.table_stride;
        int64_t page_size = (int64_t)call.kv_heads * call.head_dim, offset = (int64_t)task.kv_head * call.head_dim;
        for (int at = 0; at < count; at++) {
            int key = from + at;
            int64_t page = (int64_t)blocks[key / call.block_size] * call.block_size + key % call.block_size;
            keys[at] = (const T*)call.keys + page * page_size + offset;
            values[at] = (const T*)call.values + page * page_size + offset;
        }
        for (int at = count; at < count + LANES; at++) keys[at] = keys[count - 1], values[at] = values[count - 1];
    }
};

// Scores of Q queries, C numbers apart for each key; a vector holds LANES / C keys.
template <int Q, class T>
inline void direct_scores(
    const float* query, const KeyTile<T>& tile, const KeyTile<T>& next, int64_t head_dim, float* scores) {
    constexpr int C = Q > 2 ? 4 : Q;
    constexpr int kKeys = LANES / C;
    for (int first = 0; first < tile.count; first += kKeys) {
        Vec acc[LANES] = {};
        for (int key = 0; key < kKeys; key++) {
            for (int64_t at = 0; at < head_dim; at += 64 / sizeof(T)) {
                __builtin_prefetch(next.keys[first + key] + at, 0, 3);
                __builtin_prefetch(next.values[first + key] + at, 0, 3);
            }
        }
        for (int64_t d = 0; d < head_dim; d += LANES) {
            for (int key = 0; key < kKeys; key++) {
                Vec numbers = load(tile.keys[first + key] + d);
                for (int q = 0; q < Q; q++) acc[key * C + q] += numbers * load(query + q * head_dim + d);
            }
        }
        store(scores + first * C, sum_each(acc));
    }
}

inline Vec cap(Vec scores, float softcap) { return tanh(scores / softcap) * softcap; }

inline void direct_mask(const Scratch& s, int stride, int first, int queries, int begin, int keys) {
    for (int query = 0; query < queries; query++) {
        for (int key = 0; key < keys; key++) {
            bool seen = begin + key <= s.last_key[first + query] && begin + key >= s.first_key[first + query];
            if (!seen) s.scores[key * stride + query] = kMasked;
        }
    }
}

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

template <int R, int N, class T>
inline void add_columns(
    const float* weights, int stride, const KeyTile<T>& tile, int64_t column, int64_t head_dim, float* out,
    const float* decay) {
    Vec acc[R][N] = {};
    multiply<R, N>(
        tile.count, [&](int r, int64_t k) { return weights[k * stride + r]; },
        [&](int64_t k, int v) { return tile.values[k] + column + v * LANES; }, acc);
    for (int r = 0; r < R; r++) {
        float* row = out + r * head_dim + column;
        for (int v = 0; v < N; v++) store(row + v * LANES, load(row + v * LANES) * decay[r] + acc[r][v]);
    }
}

// out[r] = decay[r] * out[r] + the sum over keys of weights[key * stride + r] * value.
template <int R, class T>
inline void add_values(
    const float* weights, int stride, const KeyTile<T>& tile, int64_t head_dim, float* out, const float* decay) {
    constexpr int N = R == 1 ? 8 : R == 2 ? 4 : 2;
    int64_t column = 0;
    for (; column + N * LANES <= head_dim; column += N * LANES) {
        add_columns<R, N>(weights, stride, tile, column, head_dim, out, decay);
    }
    for (; column < head_dim; column += LANES) {
        add_columns<R, 1>(weights, stride, tile, column, head_dim, out, decay);
    }
}

template <int Q, class T>
inline void attend_directly(
    const AttentionCall& call, const Scratch& s, const KeyTile<T>& tile, const KeyTile<T>& next, int first) {
    constexpr int C = Q > 2 ? 4 : Q;
    int64_t head_dim = call.head_dim;
    direct_scores<Q>(s.query + first * head_dim, tile, next, head_dim, s.scores);
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
    add_values<Q>(s.scores, C, tile, head_dim, s.out + first * head_dim, s.decay);
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

template <class T>
inline void attend_tile(
    const AttentionCall& call, const Scratch& s, const KeyTile<T>& tile, int queries) {
    int64_t head_dim = call.head_dim, width = (queries + LANES - 1) / LANES * LANES;
    for (int key = 0; key < tile.count; key++) widen_row(s.keys + key * head_dim, tile.keys[key], head_dim, 1.0f);
    for (int64_t lane = 0; lane < width;) {
        bool two = lane + 2 * LANES <= width;
        int key = 0;
        for (; key + 6 <= tile.count; key += 6) {
            auto scores = two ? tile_scores<6, 2> : tile_scores<6, 1>;
            scores(s.keys + key * head_dim, s.query + lane, width, head_dim, s.scores + key * width + lane);
        }
        for (; key < tile.count; key++) {
            auto scores = two ? tile_scores<1, 2> : tile_scores<1, 1>;
            scores(s.keys + key * head_dim, s.query + lane, width, head_dim, s.scores + key * width + lane);
        }
        lane += two ? 2 * LANES : LANES;
    }
    if (call.softcap > 0.0f) {
        for (int64_t at = 0; at < tile.count * width; at += LANES) {
            store(s.scores + at, cap(load(s.scores + at), call.softcap));
        }
    }
    if (!all_seen(s, tile.begin, tile.begin + tile.count, 0, queries)) {
        tile_mask(s, width, tile.begin, tile.count);
    }
    tile_softmax(tile.count, width, s);
    int query = 0;
    for (; query + 6 <= queries; query += 6) {
        add_values<6>(s.scores + query, width, tile, head_dim, s.out + query * head_dim, s.decay + query);
    }
    for (; query < queries; query++) {
        add_values<1>(s.scores + query, width, tile, head_dim, s.out + query * head_dim, s.decay + query);
    }
}

inline int64_t out_offset(const AttentionCall& call, const AttentionTask& task, int query) {
    int group = call.heads / call.kv_heads;
    int64_t token = call.query_starts[task.row] + task.first + query / group;
    return (token * call.heads + task.kv_head * group + query % group) * call.head_dim;
}

inline void load_queries(const AttentionCall& call, const AttentionTask& task, const Scratch& s, bool direct) {
    int group = call.heads / call.kv_heads, queries = task.count * group, head_dim = call.head_dim;
    int64_t width = (queries + LANES - 1) / LANES * LANES;
    float* row = direct ? s.query : s.keys;  // the keys' place is free until the first tile
    if (!direct) memset(s.query, 0, sizeof(float) * width * head_dim);
    for (int query = 0; query < queries; query++) {
        int64_t token = call.query_starts[task.row] + task.first + query / group;
        int64_t offset = token * call.query_stride + (task.kv_head * group + query % group) * call.head_stride;
        widen_from(direct ? row + query * head_dim : row, call.query, offset, head_dim, call.dtype, call.scaling);
        if (direct) continue;
        for (int d = 0; d < head_dim; d++) s.query[d * width + query] = row[d];
    }
    int32_t first_token = call.query_starts[task.row], row_queries = call.query_starts[task.row + 1] - first_token;
    int32_t position = call.seq_lens[task.row] - row_queries + task.first;
    for (int query = 0; query < padded(queries); query++) {
        s.max[query] = kUnseen, s.sum[query] = 0.0f;
        s.last_key[query] = position + query / group;
        s.first_key[query] = call.window ? s.last_key[query] - call.window + 1 : 0;
    }
    memset(s.out, 0, sizeof(float) * queries * head_dim);
}

inline void store_outputs(const AttentionCall& call, const AttentionTask& task, const Scratch& s, float* partials) {
    int queries = task.count * (call.heads / call.kv_heads);
    int64_t head_dim = call.head_dim;
    if (task.splits > 1) {
        float* partial = partials + task.partial + (int64_t)task.split * queries * (head_dim + 2);
        memcpy(partial, s.out, sizeof(float) * queries * head_dim);
        memcpy(partial + queries * head_dim, s.max, sizeof(float) * queries);
        memcpy(partial + queries * (head_dim + 1), s.sum, sizeof(float) * queries);
        return;
    }
    for (int query = 0; query < queries; query++) {
        const float* row = s.out + query * head_dim;
        narrow_to(call.out, out_offset(call, task, query), row, head_dim, call.dtype, 1.0f / s.sum[query]);
    }
}

template <class T>
void attend_typed(const AttentionCall& call, const AttentionTask& task, float* scratch, float* partials, const T*) {
    int queries = task.count * (call.heads / call.kv_heads);
    bool direct = queries <= kDirectQueries;
    Scratch s(scratch, queries, call.head_dim);
    load_queries(call, task, s, direct);
    // Tiles end at multiples of their size wherever the range begins.
    for (int begin = task.begin, end; begin < task.end; begin = end) {
        end = (begin / kKeyTile + 1) * kKeyTile;
        if (end > task.end) end = task.end;
        KeyTile<T> tile(call, task, begin, end);
        KeyTile<T> next(call, task, end<task.end?end:begin, end<task.end?(end+64<task.end?end+64:task.end):end);
        for (int i=next.count;i<64;i++) next.keys[i]=next.keys[0],next.values[i]=next.values[0];
        if (!direct) {
            attend_tile(call, s, tile, queries);
            continue;
        }
        int first = 0;
        for (; first + 4 <= queries; first += 4) attend_directly<4>(call, s, tile, next, first);
        if (queries - first == 3) attend_directly<3>(call, s, tile, next, first);
        if (queries - first == 2) attend_directly<2>(call, s, tile, next, first);
        if (queries - first == 1) attend_directly<1>(call, s, tile, next, first);
    }
    store_outputs(call, task, s, partials);
}

void attend(const AttentionCall& call, const AttentionTask& task, float* scratch, float* partials) {
    with_cache_type(call.cache_dtype, [&](auto type) { attend_typed(call, task, scratch, partials, type); });
}

void merge(const AttentionCall& call, const AttentionTask& task, float* partials) {
    int queries = task.count * (call.heads / call.kv_heads);
    int64_t head_dim = call.head_dim, size = queries * (head_dim + 2);
    for (int query = 0; query < queries; query++) {
        float max = kUnseen, sum = 0.0f;
        float* merged = partials + task.partial + query * head_dim;
        const float* maxima = partials + task.partial + queries * head_dim + query;
        const float* sums = maxima + queries;
        for (int split = 0; split < task.splits; split++) {
            if (!(maxima[split * size] <= max)) max = maxima[split * size];
        }
        for (int split = 0; split < task.splits; split++) {
            float weight = exp(all(maxima[split * size] - max))[0];
            const float* row = merged + split * size;
            sum += weight * sums[split * size];
            for (int64_t d = 0; d < head_dim; d += LANES) {
                Vec before = split ? load(merged + d) : Vec{};
                store(merged + d, before + load(row + d) * weight);
            }
        }
        narrow_to(call.out, out_offset(call, task, query), merged, head_dim, call.dtype, 1.0f / sum);
    }
}

}  // namespace
