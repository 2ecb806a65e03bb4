// What each processor has its own instructions for.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "the kernels need AVX2 or NEON"
#endif

#include "vectors.h"

namespace {

// Asks for what a step reads next, to have it in the second cache in time. Processors do so on their own, but only to
// the end of a page of 4 KB, so that they wait at the start of each.
constexpr int AHEAD = 8192; // bytes
INLINED inline void fetch_ahead(const void *at) { __builtin_prefetch((const char *)at + AHEAD, 0, 2); }

// a * b + c, rounded once
INLINED inline f32_lanes fma(f32_lanes a, f32_lanes b, f32_lanes c) {
#if defined(__AVX512BW__)
    return (f32_lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (f32_lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return (f32_lanes)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}
INLINED inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
    EACH_PART c.part[p] = fma(a.part[p], b.part[p], c.part[p]);
    return c;
}
INLINED inline f32x16 fma(f32x16 a, float b, f32x16 c) { return fma(a, splat(b), c); }
INLINED inline f32x16 fma(f32x16 a, f32x16 b, float c) { return fma(a, b, splat(c)); }

// Reads 16 numbers of a smaller type.
INLINED inline i32x16 load_u16(const uint16_t *at) {
    i32x16 v;
    EACH_PART {
        const uint16_t *from = at + p * LANES;
#if defined(__AVX512BW__)
        v.part[p] = (i32_lanes)_mm512_cvtepu16_epi32(load<__m256i>(from));
#elif defined(__AVX2__)
        v.part[p] = (i32_lanes)_mm256_cvtepu16_epi32(load<__m128i>(from));
#else
        v.part[p] = (i32_lanes)vmovl_u16(vld1_u16(from));
#endif
    }
    return v;
}
INLINED inline i32x16 load_i8(const int8_t *at) {
    i32x16 v;
    EACH_PART {
        const int8_t *from = at + p * LANES;
#if defined(__AVX512BW__)
        v.part[p] = (i32_lanes)_mm512_cvtepi8_epi32(load<__m128i>(from));
#elif defined(__AVX2__)
        v.part[p] = (i32_lanes)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
        v.part[p] = (i32_lanes)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(load<uint32_t>(from)))));
#endif
    }
    return v;
}
INLINED inline f32x16 load_half(const uint16_t *at) {
    f32x16 v;
    EACH_PART {
        const uint16_t *from = at + p * LANES;
#if defined(__AVX512BW__)
        v.part[p] = (f32_lanes)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__AVX2__)
        v.part[p] = (f32_lanes)_mm256_cvtph_ps(load<__m128i>(from));
#else
        v.part[p] = (f32_lanes)vcvt_f32_f16(load<float16x4_t>(from));
#endif
    }
    return v;
}
INLINED inline f32x16 load_bfloat(const uint16_t *at) { return from_bits(load_u16(at) << 16); }

// The low and the high byte of each pair, as 16-bit integers.
typedef uint16_t u16_lanes __attribute__((vector_size(4 * LANES)));
typedef int16_t i16_pairs __attribute__((vector_size(4 * LANES)));
INLINED inline i32x16 low_bytes(i32x16 v) { return v & 0x00ff00ff; }
INLINED inline i32x16 high_bytes(i32x16 v) {
    EACH_PART v.part[p] = (i32_lanes)((u16_lanes)v.part[p] >> 8);
    return v;
}

// Keeps compilers from reordering integer sums: they would need more registers than there are.
INLINED inline i32_lanes in_order(i32_lanes sum) {
#if defined(__x86_64__)
    asm("" : "+v"(sum));
#else
    asm("" : "+w"(sum));
#endif
    return sum;
}

// acc + w.low * x.low + w.high * x.high, on pairs of 16-bit integers
INLINED inline i32_lanes dot2(i32_lanes acc, i32_lanes w, i32_lanes x) {
#if defined(__AVX512VNNI__)
    return (i32_lanes)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
    return in_order(acc + (i32_lanes)_mm512_madd_epi16((__m512i)w, (__m512i)x));
#elif defined(__AVXVNNI__)
    return (i32_lanes)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#elif defined(__AVX2__)
    return in_order(acc + (i32_lanes)_mm256_madd_epi16((__m256i)w, (__m256i)x));
#else
    int16x8_t a = (int16x8_t)w, b = (int16x8_t)x;
    int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b)), high = vmull_high_s16(a, b);
    return in_order(acc + (i32_lanes)vpaddq_s32(low, high));
#endif
}

// Sums of products of bytes: w has four bytes from 0 to 255 in each number, x four from -127 to 127. Without
// instructions for it, w is at most 15, and the sums of pairs are kept in 16 bits: they hold 16 products.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool HAS_DOT4 = true;
#else
constexpr bool HAS_DOT4 = false;
#endif
INLINED inline i32_lanes dot4(i32_lanes acc, i32_lanes w, i32_lanes x) {
#if defined(__AVX512VNNI__)
    return (i32_lanes)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
    return in_order((i32_lanes)_mm512_add_epi16((__m512i)acc, _mm512_maddubs_epi16((__m512i)w, (__m512i)x)));
#elif defined(__AVXVNNI__)
    return (i32_lanes)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#elif defined(__AVX2__)
    return in_order((i32_lanes)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)w, (__m256i)x)));
#else // the instruction knows only signed bytes: w - 128, and 128 x
    int8x16_t wide = vdupq_n_s8(64), shifted = veorq_s8((int8x16_t)w, vdupq_n_s8(-128));
    int32x4_t twice = vdotq_s32(vdotq_s32((int32x4_t)acc, wide, (int8x16_t)x), wide, (int8x16_t)x);
    return (i32_lanes)vdotq_s32(twice, shifted, (int8x16_t)x);
#endif
}
// The whole sums of what dot4 gave.
INLINED inline i32_lanes dot4_total(i32_lanes acc) {
#if defined(__AVX512BW__) && !defined(__AVX512VNNI__)
    return (i32_lanes)_mm512_madd_epi16((__m512i)acc, _mm512_set1_epi16(1));
#elif defined(__AVX2__) && !defined(__AVX512BW__) && !defined(__AVXVNNI__)
    return (i32_lanes)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1));
#else
    return acc;
#endif
}

// Replaces bytes from 0 to 15 by those of a table.
INLINED inline i32x16 look_up(const uint8_t *table, i32x16 codes) {
#if defined(__AVX512BW__)
    __m512i bytes = _mm512_broadcast_i32x4(load<__m128i>(table));
    EACH_PART codes.part[p] = (i32_lanes)_mm512_shuffle_epi8(bytes, (__m512i)codes.part[p]);
#elif defined(__AVX2__)
    __m256i bytes = _mm256_broadcastsi128_si256(load<__m128i>(table));
    EACH_PART codes.part[p] = (i32_lanes)_mm256_shuffle_epi8(bytes, (__m256i)codes.part[p]);
#else
    uint8x16_t bytes = vld1q_u8(table);
    EACH_PART codes.part[p] = (i32_lanes)vqtbl1q_u8(bytes, (uint8x16_t)codes.part[p]);
#endif
    return codes;
}

} // namespace
