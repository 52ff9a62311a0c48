// A vector of floats as wide as the instruction set that the including file is compiled for, and what the kernels
// do with it: loads that widen, stores that round to nearest even, exp, tanh, and sums over lanes.
//
// Everything here has internal linkage: the same source is compiled once for each instruction set, and the linker must
// not merge the copies.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

namespace {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
struct Float8 {  // 4 bits of exponent, 3 of mantissa, a NaN but no infinity
    uint8_t bits;
};

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t WordVec __attribute__((vector_size(LANES * 4)));
typedef uint8_t ByteVec __attribute__((vector_size(LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(LANES * 2)));

// Subtracting zero changes no number, so that only the broadcast is left; adding it would make 0 of -0.
inline Vec all(float x) { return x - Vec{}; }

inline Vec load(const float* from) {
    Vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline Vec load(const BFloat16* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(__AVX2__)
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
    HalfVec halves;
    memcpy(&halves, from, sizeof halves);
    return (Vec)(__builtin_convertvector(halves, WordVec) << 16);
#endif
}

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) {
    uint32_t word = (uint32_t)x.bits << 16;
    float out;
    memcpy(&out, &word, 4);
    return out;
}

inline float widen(Float16 x) {
    // Exponents of subnormal numbers, and of infinity and NaN, don't shift into float32's: scaling and a test repair them.
    uint32_t magnitude = (uint32_t)(x.bits & 0x7fff) << 13;
    float scaled;
    memcpy(&scaled, &magnitude, 4);
    scaled *= 0x1p112f;
    uint32_t word;
    memcpy(&word, &scaled, 4);
    if (magnitude >= 0x0f800000u) word = magnitude | 0x7f800000u;
    word |= (uint32_t)(x.bits & 0x8000) << 16;
    memcpy(&scaled, &word, 4);
    return scaled;
}

inline Vec load(const Float16* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    Vec x;
    for (int lane = 0; lane < LANES; lane++) x[lane] = widen(from[lane]);
    return x;
#endif
}

inline Vec load(const Float8* from) {
    ByteVec bytes;
    memcpy(&bytes, from, sizeof bytes);
#if defined(__AVX512F__)
    WordVec words = (WordVec)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
    uint64_t low;
    memcpy(&low, &bytes, 8);
    WordVec words = (WordVec)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(low));
#else
    WordVec words = __builtin_convertvector(bytes, WordVec);
#endif
    WordVec magnitude = words & 0x7f;
    WordVec number = (WordVec)((Vec)(magnitude << 20) * 0x1p120f) | ((words & 0x80) << 24);
    return (Vec)(magnitude == 0x7f ? number | 0x7fc00000u : number);
}

inline float widen(Float8 x) {
    uint32_t word = (uint32_t)(x.bits & 0x7f) << 20;
    float magnitude;
    memcpy(&magnitude, &word, 4);
    magnitude *= 0x1p120f;
    if ((x.bits & 0x7f) == 0x7f) magnitude = __builtin_nanf("");
    return x.bits & 0x80 ? -magnitude : magnitude;
}

inline void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }

inline uint16_t to_bfloat16(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    if (x != x) return (uint16_t)((word >> 16) | 0x40);
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

inline uint16_t to_float16(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    uint32_t sign = (word >> 16) & 0x8000, magnitude = word & 0x7fffffff;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000u) {
        // Below the smallest normal number: adding a half lets the addition itself round at the last bit kept.
        float value;
        memcpy(&value, &magnitude, 4);
        value += 0.5f;
        memcpy(&magnitude, &value, 4);
        return (uint16_t)(sign | (magnitude - 0x3f000000u));
    }
    magnitude += 0xfff + ((magnitude >> 13) & 1);
    return (uint16_t)(sign | ((magnitude - 0x38000000u) >> 13));
}

// What lies beyond 448, the largest number, becomes 448.
inline uint8_t to_float8(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    uint8_t sign = (uint8_t)((word >> 24) & 0x80);
    float value = x < 0.0f ? -x : x;
    if (value != value) return sign | 0x7f;
    if (value >= 448.0f) return sign | 0x7e;
    if (value < 0x1p-6f) {
        value += 0x1p14f;  // its last bit is the last one kept
        memcpy(&word, &value, 4);
        return sign | (uint8_t)(word - 0x46800000u);
    }
    word &= 0x7fffffff;
    word += 0x7ffff + ((word >> 20) & 1);
    uint32_t bits = (word - 0x3c000000u) >> 20;
    return sign | (uint8_t)(bits > 0x7e ? 0x7e : bits);
}

inline void narrow(float* to, float x) { *to = x; }
inline void narrow(BFloat16* to, float x) { to->bits = to_bfloat16(x); }
inline void narrow(Float16* to, float x) { to->bits = to_float16(x); }
inline void narrow(Float8* to, float x) { to->bits = to_float8(x); }

inline void store(BFloat16* to, Vec x) {
    WordVec words = (WordVec)x;
    WordVec rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
    WordVec quiet = (words >> 16) | 0x40;
    HalfVec halves = __builtin_convertvector((WordVec)(x != x ? quiet : rounded), HalfVec);
    memcpy(to, &halves, sizeof halves);
}

inline void store(Float16* to, Vec x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int lane = 0; lane < LANES; lane++) narrow(to + lane, x[lane]);
#endif
}

inline void store(Float8* to, Vec x) {
    for (int lane = 0; lane < LANES; lane++) narrow(to + lane, x[lane]);
}

// Where one is NaN, the second: a NaN among scores must reach the output.
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Relative error below 2e-7; 0 below -87.3, infinity above 88.4, NaN of NaN.
inline Vec exp(Vec x) {
    x = larger(all(-88.0f), x);
    x = x > 89.0f ? all(89.0f) : x;
    // Adding 1.5 * 2^23 leaves the nearest whole number in the low bits.
    Vec shifted = x * 1.44269504088896341f + 12582912.0f;
    Vec whole = shifted - 12582912.0f;
    Vec rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec sum = all(1.9875691500e-4f);
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    return sum * (Vec)(((IntVec)shifted << 23) + 0x3f800000);
}

// Relative error below 1e-6: near zero, where 1 - 2 / (exp(2x) + 1) would cancel, an odd polynomial.
inline Vec tanh(Vec x) {
    Vec square = x * x;
    Vec sum = all(-5.70498872745e-3f);
    sum = sum * square + 2.06390887954e-2f;
    sum = sum * square - 5.37397155531e-2f;
    sum = sum * square + 1.33314422036e-1f;
    sum = sum * square - 3.33332819422e-1f;
    Vec near = sum * square * x + x;
    Vec far = 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
    return square < 0.39f ? near : far;
}

#if defined(__AVX2__)
inline __m256 sum_each_of_8(const __m256* x) {
    __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
#endif

// Lane i of the result is the sum over the lanes of x[i].
inline Vec sum_each(const Vec (&x)[LANES]) {
#if defined(__AVX512F__)
    __m256 halves[16];
    for (int i = 0; i < 16; i++) {
        __m512d wide = _mm512_castps_pd((__m512)x[i]);
        __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(wide, 1));
        halves[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)x[i]), high);
    }
    __m512d low = _mm512_castpd256_pd512(_mm256_castps_pd(sum_each_of_8(halves)));
    return (Vec)_mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(sum_each_of_8(halves + 8)), 1));
#elif defined(__AVX2__)
    return (Vec)sum_each_of_8((const __m256*)x);
#else
    Vec sums;
    for (int i = 0; i < LANES; i++) sums[i] = (x[i][0] + x[i][1]) + (x[i][2] + x[i][3]);
    return sums;
#endif
}

inline float sum_lanes(Vec x) {
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

// acc[r][v] += sum over k < n of a(r, k) * b(k, v)[0 ... LANES]; always in the order of k, whatever R and N are.
template <int R, int N, class A, class B>
inline __attribute__((always_inline)) void multiply(int64_t n, const A& a, const B& b, Vec (&acc)[R][N]) {
    for (int64_t k = 0; k < n; k++) {
        Vec columns[N];
        for (int v = 0; v < N; v++) columns[v] = load(b(k, v));
        for (int r = 0; r < R; r++) {
            Vec factor = all(a(r, k));
            for (int v = 0; v < N; v++) acc[r][v] += factor * columns[v];
        }
    }
}

template <int R>
struct Rows {
    static constexpr int count = R;
};

// Calls work(Rows<R>, first) for rows [0, count) in blocks of 6, as many as keep their sums in registers, and a rest.
template <class Work>
inline void in_blocks(int64_t count, const Work& work) {
    int64_t first = 0;
    for (; first + 6 <= count; first += 6) work(Rows<6>{}, first);
    if (count - first == 5) work(Rows<5>{}, first);
    if (count - first == 4) work(Rows<4>{}, first);
    if (count - first == 3) work(Rows<3>{}, first);
    if (count - first == 2) work(Rows<2>{}, first);
    if (count - first == 1) work(Rows<1>{}, first);
}

}  // namespace
