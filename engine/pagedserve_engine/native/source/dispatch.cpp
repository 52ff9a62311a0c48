// The C interface: chooses the instruction set, cuts calls into tasks, and runs them on the threads of OpenMP's pool.
//
// The pool is torch's own, handed in as GOMP_parallel: a second one would take the processors from the first. Which
// task a thread gets is decided as it asks, and no result depends on it.
#include <stdlib.h>

#include <new>
#include <vector>

#include "kernels.h"

using namespace pagedserve;

namespace {

using Launch = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
Launch launcher = nullptr;

constexpr int64_t kSmallestShare = 100000;  // multiplications that are worth another thread
constexpr int kSplitKeys = 256;             // keys of a range at least, where a row's keys are split
constexpr int kRowTasks = 64;               // tasks of a row at most that splitting makes

enum Status { kDone = 0, kNoVariant = 1, kNoMemory = 2 };

const Kernels* kernels_of(int variant) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (variant == 2 && avx512) return &kAvx512;
    if (variant == 1 && avx2) return &kAvx2;
#endif
    return variant == 0 ? &kPortable : nullptr;
}

template <class Work>
struct Shared {
    const Work& work;
    int64_t tasks;
    int64_t next_task;
    int next_worker;

    static void run(void* data) {
        Shared& self = *(Shared*)data;
        int worker = __atomic_fetch_add(&self.next_worker, 1, __ATOMIC_RELAXED);
        // One task is taken ahead, so that work can fetch its memory while it finishes the one before.
        for (int64_t task = self.take(), next; task < self.tasks; task = next) {
            next = self.take();
            self.work(task, next, worker);
        }
    }

    int64_t take() { return __atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED); }
};

// work(task, next, worker) for every task below tasks; next is the same worker's next one, or none where it is not
// below tasks; workers are numbered from 0.
template <class Work>
void run(int64_t tasks, int threads, const Work& work) {
    Shared<Work> shared{work, tasks, 0, 0};
    if (threads > 1 && tasks > 1 && launcher) {
        launcher(Shared<Work>::run, &shared, (unsigned)threads, 0);
    } else {
        Shared<Work>::run(&shared);
    }
}

int useful_threads(int threads, int64_t multiplications) {
    int64_t useful = multiplications / kSmallestShare + 1;
    return useful < threads ? (int)useful : threads;
}

// Memory of the calling thread that stays for its next call.
struct Arena {
    float* start = nullptr;
    size_t size = 0;

    ~Arena() { free(start); }
    float* take(size_t floats) {
        if (floats > size) {
            free(start);
            size = 0;
            start = (float*)aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
            if (!start) throw std::bad_alloc();
            size = floats;
        }
        return start;
    }
};
thread_local Arena arena;

struct Plan {
    std::vector<AttentionTask> tasks;
    std::vector<AttentionTask> merges;
    int64_t partial = 0, multiplications = 0;
};

// A task's queries, keys and splits follow from its own row alone: what is batched beside it changes no sum.
void plan_queries(const AttentionCall& call, Plan& plan, AttentionTask task, int tiles) {
    int group = call.heads / call.kv_heads, length = task.end - task.begin;
    int most = kRowTasks / (tiles * call.kv_heads);
    int share = most > 1 ? (length + most - 1) / most : length;
    share = (share + kKeyTile - 1) / kKeyTile * kKeyTile;
    if (share < kSplitKeys) share = kSplitKeys;
    int begin = task.begin, end = task.end;
    task.splits = (length + share - 1) / share;
    int64_t size = task.splits > 1 ? (int64_t)task.splits * task.count * group * (call.head_dim + 2) : 0;
    // Decoding reads a page's heads together where there are rows enough to go round; no sum depends on it.
    int number = call.cache_dtype == kFloat32 ? 4 : call.cache_dtype == kFloat8 ? 1 : 2;
    int heads = kRunBytes / (call.head_dim * number);
    bool is_alone = task.count * group > kDirectQueries || call.rows * task.splits < 4 * call.threads;
    if (is_alone || heads < 1) heads = 1;
    plan.multiplications += 2ll * length * task.count * call.heads * call.head_dim;
    for (task.kv_head = 0; task.kv_head < call.kv_heads; task.kv_head += heads) {
        task.kv_heads = call.kv_heads - task.kv_head < heads ? call.kv_heads - task.kv_head : heads;
        task.partial = plan.partial;
        for (task.split = 0; task.split < task.splits; task.split++) {
            task.begin = begin + task.split * share;
            task.end = task.begin + share < end ? task.begin + share : end;
            plan.tasks.push_back(task);
        }
        if (task.splits > 1) plan.merges.push_back(task);
        plan.partial += size * task.kv_heads;
    }
}

void plan_row(const AttentionCall& call, Plan& plan, int row) {
    int queries = call.query_starts[row + 1] - call.query_starts[row], group = call.heads / call.kv_heads;
    int size = group >= kTileQueries ? 1 : kTileQueries / group, context = call.seq_lens[row] - queries;
    int tiles = (queries + size - 1) / size;
    for (int first = 0; first < queries; first += size) {
        AttentionTask task = {};
        task.row = row, task.first = first;
        task.count = queries - first < size ? queries - first : size;
        task.end = context + first + task.count;
        task.begin = call.window && context + first >= call.window ? context + first - call.window + 1 : 0;
        plan_queries(call, plan, task, tiles);
    }
}

void attend(const AttentionCall& call, const Kernels& kernels) {
    Plan plan;
    for (int row = 0; row < call.rows; row++) plan_row(call, plan, row);
    int64_t scratch = (kernels.attend_scratch(call) + kAlign - 1) / kAlign * kAlign;
    int threads = useful_threads(call.threads, plan.multiplications);
    float* memory = arena.take(plan.partial + scratch * threads);
    float* partial = memory + scratch * threads;
    // Prefill chunks, the largest tasks, stand last among the rows: they begin.
    int64_t count = plan.tasks.size();
    run(count, threads, [&](int64_t at, int64_t then, int worker) {
        const AttentionTask* last = &plan.tasks[count - 1];
        kernels.attend(call, last[-at], then < count ? last - then : nullptr, memory + scratch * worker, partial);
    });
    run(plan.merges.size(), threads, [&](int64_t at, int64_t, int) { kernels.merge(call, plan.merges[at], partial); });
}

template <class Work>
int guarded(int variant, const Work& work) {
    const Kernels* kernels = kernels_of(variant);
    if (!kernels) return kNoVariant;
    try {
        work(*kernels);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
    return kDone;
}

// One task for each of so many rows side by side.
template <class Work>
int by_rows(int variant, int threads, int64_t rows, int64_t width, int64_t scratch, const Work& work) {
    return guarded(variant, [&](const Kernels& kernels) {
        int used = useful_threads(threads, 4 * rows * width);
        int64_t share = (rows + 4 * used - 1) / (4 * used), size = (scratch + kAlign - 1) / kAlign * kAlign;
        float* memory = arena.take(size * used);
        run((rows + share - 1) / share, used, [&](int64_t at, int64_t, int worker) {
            for (int64_t row = at * share; row < rows && row < (at + 1) * share; row++) {
                work(kernels, row, memory + size * worker);
            }
        });
    });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* pagedserve_digest(void) { return DIGEST; }

EXPORT void pagedserve_use_launcher(void* launch) { launcher = (Launch)launch; }

// Lanes of a variant's vectors; 0 where this processor or build does not have it.
EXPORT int pagedserve_lanes(int variant) {
    const Kernels* kernels = kernels_of(variant);
    return kernels ? kernels->lanes : 0;
}

EXPORT int pagedserve_attend(const AttentionCall* call) {
    return guarded(call->variant, [&](const Kernels& kernels) { attend(*call, kernels); });
}

// Numbers that a packed weight takes.
EXPORT int64_t pagedserve_packed_size(int variant, int64_t in_features, int64_t out_features) {
    const Kernels* kernels = kernels_of(variant);
    if (!kernels) return -1;
    int64_t panel = kernels->panel();
    return (out_features + panel - 1) / panel * panel * in_features;
}

EXPORT int pagedserve_pack(
    int variant, const void* weight, void* packed, int64_t in_features, int64_t out_features, int dtype) {
    return guarded(variant, [&](const Kernels& kernels) {
        kernels.pack(weight, packed, in_features, out_features, dtype);
    });
}

EXPORT int pagedserve_linear(const ProductCall* given, const void* x, int variant, int threads) {
    return guarded(variant, [&](const Kernels& kernels) {
        ProductCall call = *given;
        int64_t numbers = call.tokens * call.in_features, panel = kernels.panel();
        int used = useful_threads(threads, numbers * call.out_features);
        if (call.dtype == kFloat32) {
            call.x = (const float*)x;
        } else {
            float* wide = arena.take(numbers);
            kernels.widen(wide, x, call.dtype, numbers);
            call.x = wide;
        }
        // Rows of x that stay in the second-level cache while the panels pass.
        int64_t tokens = 49152 / call.in_features / 6 * 6;
        if (tokens < 6) tokens = 6;
        int64_t blocks = (call.tokens + tokens - 1) / tokens, panels = (call.out_features + panel - 1) / panel;
        int64_t share = (panels * blocks + 8 * used - 1) / (8 * used);
        share = (share + 3) / 4 * 4;
        int64_t parts = (panels + share - 1) / share;
        run(blocks * parts, used, [&](int64_t at, int64_t, int) {
            int64_t first = at / parts * tokens, from = at % parts * share;
            int64_t count = call.tokens - first < tokens ? call.tokens - first : tokens;
            kernels.multiply(call, first, count, from, panels - from < share ? panels - from : share);
        });
    });
}

EXPORT int pagedserve_norm(const NormCall* call, int variant, int threads) {
    return by_rows(variant, threads, call->tokens, call->width, 2 * call->width,
                   [&](const Kernels& kernels, int64_t row, float* scratch) { kernels.norm(*call, row, scratch); });
}

EXPORT int pagedserve_rope(const RopeCall* call, int variant, int threads) {
    int64_t width = (call->heads + 2 * call->kv_heads) * call->head_dim;
    return by_rows(variant, threads, call->tokens, width, 3 * call->head_dim,
                   [&](const Kernels& kernels, int64_t row, float* scratch) { kernels.rope(*call, row, scratch); });
}

EXPORT int pagedserve_gated(const GatedCall* call, int variant, int threads) {
    return by_rows(variant, threads, call->tokens, 4 * call->width, kAlign,
                   [&](const Kernels& kernels, int64_t row, float* scratch) { kernels.gated(*call, row, scratch); });
}
