// Vectors of 16 numbers as GCC vector types, which it compiles to the processor's instructions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef int16_t i16x32 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef int8_t i8x32 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

template <class V> V load(const void *at) {
    V v;
    std::memcpy(&v, at, sizeof v);
    return v;
}
template <class V> void store(void *at, V v) { std::memcpy(at, &v, sizeof v); }
f32x16 splat(float x) { return x - f32x16{}; }
f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }

// GCC compiles these conversions to a dozen instructions; AVX-512 has one.
i32x16 widen(u16x16 v) {
#if defined(__AVX512F__)
    return (i32x16)_mm512_cvtepu16_epi32((__m256i)v);
#else
    return __builtin_convertvector(v, i32x16);
#endif
}
i32x16 widen(i8x16 v) {
#if defined(__AVX512F__)
    return (i32x16)_mm512_cvtepi8_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, i32x16);
#endif
}
i16x32 widen(i8x32 v) {
#if defined(__AVX512BW__)
    return (i16x32)_mm512_cvtepi8_epi16((__m256i)v);
#else
    return __builtin_convertvector(v, i16x32);
#endif
}

f32x16 half_to_float(u16x16 h) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps((__m256i)h);
#else
    i32x16 x = widen(h);
    return (f32x16)((i32x16)((f32x16)((x & 0x7fff) << 13) * 0x1p112f) | ((x & 0x8000) << 16));
#endif
}

f32x16 bfloat_to_float(u16x16 b) { return (f32x16)(widen(b) << 16); }

// acc + w.low * x.low + w.high * x.high, on pairs of 16-bit integers
i32x16 dot2(i32x16 acc, i32x16 w, i32x16 x) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
    return acc + (i32x16)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
    __m256i a[2], b[2];
    std::memcpy(a, &w, 64), std::memcpy(b, &x, 64);
    a[0] = _mm256_madd_epi16(a[0], b[0]), a[1] = _mm256_madd_epi16(a[1], b[1]);
    return acc + load<i32x16>(a);
#else
    return acc + ((w << 16) >> 16) * ((x << 16) >> 16) + (w >> 16) * (x >> 16);
#endif
}

// Replaces numbers from 0 to 15 by those of a table that has them twice.
i32x16 look_up(i16x32 table, i32x16 pairs) {
#if defined(__AVX512BW__)
    return (i32x16)_mm512_permutexvar_epi16((__m512i)pairs, (__m512i)table);
#else
    return (i32x16)__builtin_shuffle(table, (i16x32)pairs);
#endif
}

float sum(f32x16 v) {
    float total = 0;
    for (int i = 0; i < 16; i++) total += v[i];
    return total;
}

float largest(f32x16 v) {
    float max = v[0];
    for (int i = 1; i < 16; i++) max = std::max(max, v[i]);
    return max;
}

// Compares as integers, so that NaN is the largest.
float largest_magnitude(f32x16 a, f32x16 b) {
    i32x16 x = (i32x16)a & 0x7fffffff, y = (i32x16)b & 0x7fffffff;
    x = x > y ? x : y;
    int32_t max = 0;
    for (int i = 0; i < 16; i++) max = std::max(max, x[i]);
    float magnitude;
    std::memcpy(&magnitude, &max, sizeof magnitude);
    return magnitude;
}

// exp within about 2 ulp (the polynomial of Cephes); 0 below -87
f32x16 exp_of(f32x16 x) {
    f32x16 low = splat(-87.3f), high = splat(88.3f);
    i32x16 keep = x > low;
    x = x > low ? x : low;
    x = x < high ? x : high;
    f32x16 n = x * 1.44269504f;
    i32x16 whole = __builtin_convertvector(n + (n < 0 ? splat(-0.5f) : splat(0.5f)), i32x16);
    n = __builtin_convertvector(whole, f32x16);
    f32x16 r = x - n * 0.693359375f - n * -2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f, p = p * r * r + r + 1.0f;
    return (f32x16)((i32x16)(p * (f32x16)((whole + 127) << 23)) & keep);
}

f32x16 sigmoid_of(f32x16 x) {
    f32x16 y = 1.0f / (1.0f + exp_of(-x));
    return x == x ? y : x; // comparisons in exp_of lose NaN
}

// Transposes 16 rows of 16, in four rounds that swap blocks of 8, 4, 2 and 1.
template <int STEP> inline void swap_blocks(f32x16 m[16]) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const i32x16 low = (lane & STEP) != 0 ? lane + (16 - STEP) : lane, high = low + STEP;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (!(i & STEP)) {
            f32x16 a = m[i], b = m[i + STEP];
            m[i] = __builtin_shuffle(a, b, low), m[i + STEP] = __builtin_shuffle(a, b, high);
        }
}
void transpose(f32x16 m[16]) { swap_blocks<8>(m), swap_blocks<4>(m), swap_blocks<2>(m), swap_blocks<1>(m); }

} // namespace
