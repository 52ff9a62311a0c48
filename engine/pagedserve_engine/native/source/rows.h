// Rows of numbers whose dtype is known at run time: widened to float32, and narrowed back.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace {

using pagedserve::Dtype;

template <class T>
inline void widen_row(float* to, const T* from, int64_t count, float factor) {
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) store(to + at, load(from + at) * factor);
    for (; at < count; at++) to[at] = widen(from[at]) * factor;
}

template <class T>
inline void narrow_row(T* to, const float* from, int64_t count, float factor) {
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) store(to + at, load(from + at) * factor);
    for (; at < count; at++) narrow(to + at, from[at] * factor);
}

// Calls work with a null pointer of the type that dtype names; 8 bits are for the cache alone.
template <class Work>
inline void with_type(int32_t dtype, const Work& work) {
    if (dtype == Dtype::kBFloat16) return work((const BFloat16*)nullptr);
    if (dtype == Dtype::kFloat16) return work((const Float16*)nullptr);
    return work((const float*)nullptr);
}

template <class Work>
inline void with_cache_type(int32_t dtype, const Work& work) {
    if (dtype == Dtype::kFloat8) return work((const Float8*)nullptr);
    with_type(dtype, work);
}

template <class T>
inline const T* at(const void* start, int64_t offset, const T*) {
    return (const T*)start + offset;
}

template <class T>
inline T* at(void* start, int64_t offset, const T*) {
    return (T*)start + offset;
}

// Widens count numbers that stand offset numbers after from.
inline void widen_from(
    float* to, const void* from, int64_t offset, int64_t count, int32_t dtype, float factor = 1.0f) {
    with_type(dtype, [&](auto type) { widen_row(to, at(from, offset, type), count, factor); });
}

inline void narrow_to(
    void* to, int64_t offset, const float* from, int64_t count, int32_t dtype, float factor = 1.0f) {
    with_type(dtype, [&](auto type) { narrow_row(at(to, offset, type), from, count, factor); });
}

}  // namespace
