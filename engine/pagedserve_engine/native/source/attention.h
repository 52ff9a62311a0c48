// Paged attention of one task: folded queries of a row that share a key head, against a range of keys.
//
// Scores of a tile of keys lie key by key, the folded queries side by side. Few queries (decoding) take them by dot
// products straight from the cache; many (prefill) as a matrix product with the queries transposed once for the task,
// so that no key is ever transposed. From the scores on, both go the same way: softmax over the keys so far, then the
// values, widened in registers, are added up under the scores' weights.
#pragma once

#include "attention_direct.h"
#include "attention_tile.h"

namespace {

// Which token and head a task's folded query is: heads of a group lie side by side, tokens and key heads apart.
struct FoldedQuery {
    int64_t token;
    int head;

    FoldedQuery(const AttentionCall& call, const AttentionTask& task, int query) {
        int group = call.heads / call.kv_heads, queries = task.count * group;
        token = call.query_starts[task.row] + task.first + query % queries / group;
        head = (task.kv_head + query / queries) * group + query % group;
    }
};

inline int folded_queries(const AttentionCall& call, const AttentionTask& task) {
    return task.kv_heads * task.count * (call.heads / call.kv_heads);
}

inline void store_row(const AttentionCall& call, const FoldedQuery& query, float* row, float sum) {
    int64_t offset = (query.token * call.heads + query.head) * call.head_dim;
    for (int64_t d = 0; d < call.head_dim; d += LANES) store(row + d, load(row + d) / sum);
    narrow_to(call.out, offset, row, call.head_dim, call.dtype);
}

inline void load_queries(const AttentionCall& call, const AttentionTask& task, const Scratch& s, bool direct) {
    int queries = folded_queries(call, task), head_dim = call.head_dim;
    int64_t width = (queries + LANES - 1) / LANES * LANES;
    float* row = direct ? s.query : s.keys;  // the keys' place is free until the first tile
    if (!direct) memset(s.query, 0, sizeof(float) * width * head_dim);
    int32_t first_token = call.query_starts[task.row];
    int32_t context = call.seq_lens[task.row] - (call.query_starts[task.row + 1] - first_token);
    // Places beyond the last query, up to a whole vector, hold numbers too; nobody reads what comes of them.
    for (int query = 0; query < padded(queries); query++) {
        s.max[query] = kUnseen, s.sum[query] = 0.0f, s.first_key[query] = s.last_key[query] = 0;
    }
    for (int query = 0; query < queries; query++) {
        FoldedQuery at(call, task, query);
        s.last_key[query] = context + (int32_t)at.token - first_token;
        s.first_key[query] = call.window ? s.last_key[query] - call.window + 1 : 0;
        int64_t offset = at.token * call.query_stride + at.head * call.head_stride;
        widen_from(direct ? row + query * head_dim : row, call.query, offset, head_dim, call.dtype, call.scaling);
        if (direct) continue;
        for (int d = 0; d < head_dim; d++) s.query[d * width + query] = row[d];
    }
    memset(s.out, 0, sizeof(float) * queries * head_dim);
}

inline void store_outputs(const AttentionCall& call, const AttentionTask& task, const Scratch& s, float* partials) {
    int queries = folded_queries(call, task);
    int64_t head_dim = call.head_dim;
    if (task.splits > 1) {
        float* partial = partials + task.partial + (int64_t)task.split * queries * (head_dim + 2);
        memcpy(partial, s.out, sizeof(float) * queries * head_dim);
        memcpy(partial + queries * head_dim, s.max, sizeof(float) * queries);
        memcpy(partial + queries * (head_dim + 1), s.sum, sizeof(float) * queries);
        return;
    }
    for (int query = 0; query < queries; query++) {
        store_row(call, FoldedQuery(call, task, query), s.out + query * head_dim, s.sum[query]);
    }
}

template <class T>
void attend_typed(
    const AttentionCall& call, const AttentionTask& task, const AttentionTask* next_task, float* scratch,
    float* partials, const T*) {
    int queries = folded_queries(call, task);
    bool direct = task.count * (call.heads / call.kv_heads) <= kDirectQueries;
    Scratch s(scratch, queries, call.head_dim);
    load_queries(call, task, s, direct);
    KeyTile<T> tiles[2];
    tiles[0].find(call, task, task.begin);
    for (int at = 0, begin = task.begin; begin < task.end; at ^= 1) {
        KeyTile<T>&tile = tiles[at], &next = tiles[at ^ 1];
        begin += tile.count;
        bool is_last = begin >= task.end;
        if (!is_last) next.find(call, task, begin);
        if (is_last && next_task) next.find(call, *next_task, next_task->begin);
        if (direct) {
            attend_all_directly(call, task, s, tile, is_last && !next_task ? nullptr : &next);
        } else {
            attend_tile(call, s, tile, queries);
        }
    }
    store_outputs(call, task, s, partials);
}

void attend(
    const AttentionCall& call, const AttentionTask& task, const AttentionTask* next, float* scratch, float* partials) {
    with_cache_type(call.cache_dtype, [&](auto type) { attend_typed(call, task, next, scratch, partials, type); });
}

void merge(const AttentionCall& call, const AttentionTask& task, float* partials) {
    int queries = folded_queries(call, task);
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
        store_row(call, FoldedQuery(call, task, query), merged, sum);
    }
}

}  // namespace
