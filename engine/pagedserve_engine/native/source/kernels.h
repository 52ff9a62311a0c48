// What one instruction set offers, and the plain data that calls carry. No kernel allocates or starts threads.
#pragma once

#include <stdint.h>

namespace pagedserve {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat8 = 3 };  // 8 bits: e4m3, in the cache alone

constexpr int kKeyTile = 64;        // keys whose scores are held at once
constexpr int kTileQueries = 64;    // folded queries (tokens x heads of a group) of a prefill task
constexpr int kDirectQueries = 7;   // up to so many folded queries read keys by dot products, without a copy
constexpr int kRunBytes = 1024;     // of a page's heads side by side that a decoding task reads, so that it streams
constexpr int kAlign = 16;          // floats to which scratch rows are padded: the widest vector

// One layer's attention; mirrored field by field in library.py. Strides count numbers, not bytes.
struct AttentionCall {
    const void* query;  // [T, heads, head_dim]
    const void* keys;   // [blocks, block_size, kv_heads, head_dim]
    const void* values;
    void* out;  // [T, heads, head_dim], dense
    const int32_t* table;  // [rows, columns]
    const int32_t* query_starts;  // [rows + 1]
    const int32_t* seq_lens;  // [rows]
    int64_t query_stride, head_stride, table_stride;
    int32_t rows, heads, kv_heads, head_dim, block_size;
    int32_t window;  // 0: all
    int32_t dtype, cache_dtype;
    float scaling, softcap;  // softcap 0: none
    int32_t threads, variant;
};

// Queries [first, first + count) of a row against keys [begin, end) of heads [kv_head, kv_head + kv_heads).
struct AttentionTask {
    int32_t row, first, count, kv_head, kv_heads, begin, end;
    int32_t splits, split;  // this task is one of so many that attend for these queries
    int64_t partial;  // where [splits][queries * (head_dim + 2)] begins among the call's partial results;
                      // queries: of all its heads
};

struct ProductCall {
    const float* x;  // [T, K]
    const void* weight;  // packed
    const float* bias;  // null: none
    void* out;  // [T, N]
    int64_t tokens, in_features, out_features;
    int32_t dtype, weight_dtype;
};

struct NormCall {
    const void* x;
    void* residual;  // null: none
    const void* weight;
    void* out;
    int64_t tokens, width;
    float eps, offset;
    int32_t dtype;
};

struct RopeCall {
    const void* qkv;  // [T, (heads + 2 kv_heads) * head_dim]
    const void* q_norm;  // null: none
    const void* k_norm;
    const float* cos_sin;  // [max_position, rotary_dim]
    const int64_t* positions;
    const int64_t* write_indices;  // -1: nowhere
    void* keys;
    void* values;
    void* query;  // [T, heads, head_dim]
    int64_t tokens, qkv_stride;
    int32_t heads, kv_heads, head_dim, rotary_dim;
    float eps, offset;
    int32_t dtype, cache_dtype;
};

struct GatedCall {
    const void* gate_up;  // [T, 2 * width]
    void* out;
    int64_t tokens, width;
    int32_t activation;  // 0: silu, 1: gelu with tanh
    int32_t dtype;
};

struct Kernels {
    int lanes;
    int64_t (*attend_scratch)(const AttentionCall&);  // floats that a task needs
    // Fetches the next task's first keys on the way; null: none.
    void (*attend)(
        const AttentionCall&, const AttentionTask&, const AttentionTask* next, float* scratch, float* partial);
    void (*merge)(const AttentionCall&, const AttentionTask&, float* partial);
    int64_t (*panel)(void);  // columns that are packed side by side
    void (*pack)(const void* weight, void* packed, int64_t in_features, int64_t out_features, int32_t dtype);
    void (*multiply)(const ProductCall&, int64_t first_token, int64_t tokens, int64_t first_panel, int64_t panels);
    void (*widen)(float* to, const void* from, int32_t dtype, int64_t count);
    void (*norm)(const NormCall&, int64_t token, float* scratch);  // scratch: 2 * width
    void (*rope)(const RopeCall&, int64_t token, float* scratch);  // scratch: 3 * head_dim
    void (*gated)(const GatedCall&, int64_t token, float* scratch);  // scratch: kAlign
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace pagedserve
