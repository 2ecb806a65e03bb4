// Vectors of 16 numbers, made of one, two or four of the processor's own. They give the same bits on every processor:
// only `fma` fuses a product and a sum (compile with -ffp-contract=off), and sums of a vector have one order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define INLINED __attribute__((always_inline)) // a vector in memory, for a call, would cost more than the call does
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("nounroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#define NO_UNROLL _Pragma("GCC unroll 1")
#endif

namespace {

#if defined(__AVX512BW__)
constexpr int LANES = 16, ACCUMULATORS = 24; // 32-bit numbers in a register; registers for the sums of a product
#elif defined(__AVX2__)
constexpr int LANES = 8, ACCUMULATORS = 12;
#else
constexpr int LANES = 4, ACCUMULATORS = 24;
#endif
constexpr int PARTS = 16 / LANES;

typedef float f32_lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t i32_lanes __attribute__((vector_size(4 * LANES)));

template <class V> struct Sixteen {
    V part[PARTS];
    INLINED auto operator[](int i) const { return part[i / LANES][i % LANES]; }
};
using f32x16 = Sixteen<f32_lanes>;
using i32x16 = Sixteen<i32_lanes>;

// For each part of a vector.
#define EACH_PART UNROLL for (int p = 0; p < PARTS; p++)

template <class V> INLINED inline V load(const void *at) { // a vector by parts: copied whole it would be kept in memory
    V v;
    if constexpr (std::is_same<V, f32x16>::value || std::is_same<V, i32x16>::value)
        EACH_PART std::memcpy(&v.part[p], (const char *)at + p * sizeof v.part[p], sizeof v.part[p]);
    else std::memcpy(&v, at, sizeof v);
    return v;
}
template <class V> INLINED inline void store(void *at, Sixteen<V> v) {
    EACH_PART std::memcpy((char *)at + p * sizeof v.part[p], &v.part[p], sizeof v.part[p]);
}

#define OPERATOR(op)                                                                                                  \
    template <class V> INLINED inline auto operator op(Sixteen<V> a, Sixteen<V> b) {                                  \
        Sixteen<decltype(V() op V())> c;                                                                              \
        EACH_PART c.part[p] = a.part[p] op b.part[p];                                                                 \
        return c;                                                                                                     \
    }                                                                                                                 \
    template <class V> INLINED inline auto operator op(Sixteen<V> a, number_of<V> b) { return a op splat<V>(b); }     \
    template <class V> INLINED inline auto operator op(number_of<V> a, Sixteen<V> b) { return splat<V>(a) op b; }
template <class V> using number_of = std::conditional_t<std::is_same<V, f32_lanes>::value, float, int32_t>;
template <class V> INLINED inline Sixteen<V> splat(number_of<V> x) {
    Sixteen<V> v;
    EACH_PART v.part[p] = x - V{}; // 0 + x would have to be computed: it turns -0 into 0
    return v;
}
OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(/) OPERATOR(&) OPERATOR(|) OPERATOR(>) OPERATOR(<) OPERATOR(>=)
OPERATOR(<=) OPERATOR(==)
#undef OPERATOR

INLINED inline f32x16 splat(float x) { return splat<f32_lanes>(x); }
INLINED inline f32x16 operator-(f32x16 v) {
    EACH_PART v.part[p] = -v.part[p];
    return v;
}
INLINED inline i32x16 operator<<(i32x16 v, int bits) {
    EACH_PART v.part[p] = v.part[p] << bits;
    return v;
}
INLINED inline i32x16 operator>>(i32x16 v, int bits) {
    EACH_PART v.part[p] = v.part[p] >> bits;
    return v;
}
typedef int16_t i16_lanes __attribute__((vector_size(2 * LANES)));
INLINED inline void store_i16(int16_t *at, i32x16 v) { // the low halves
    EACH_PART {
        i16_lanes low = __builtin_convertvector(v.part[p], i16_lanes);
        std::memcpy(at + p * LANES, &low, sizeof low);
    }
}
template <class V, class T> INLINED inline void operator+=(Sixteen<V> &a, T b) { a = a + b; }
template <class V, class T> INLINED inline void operator*=(Sixteen<V> &a, T b) { a = a * b; }

INLINED inline i32x16 bits_of(f32x16 v) {
    i32x16 result;
    EACH_PART result.part[p] = (i32_lanes)v.part[p];
    return result;
}
INLINED inline f32x16 from_bits(i32x16 v) {
    f32x16 result;
    EACH_PART result.part[p] = (f32_lanes)v.part[p];
    return result;
}
INLINED inline i32x16 to_int(f32x16 v) { // towards zero
    i32x16 result;
    EACH_PART result.part[p] = __builtin_convertvector(v.part[p], i32_lanes);
    return result;
}
INLINED inline f32x16 to_float(i32x16 v) {
    f32x16 result;
    EACH_PART result.part[p] = __builtin_convertvector(v.part[p], f32_lanes);
    return result;
}

template <class V> INLINED inline Sixteen<V> choose(i32x16 where, Sixteen<V> a, Sixteen<V> b) {
    EACH_PART a.part[p] = where.part[p] ? a.part[p] : b.part[p];
    return a;
}
// b, if one is NaN
template <class V> INLINED inline Sixteen<V> larger(Sixteen<V> a, Sixteen<V> b) {
    EACH_PART a.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p];
    return a;
}
// b, if one is NaN
template <class V> INLINED inline Sixteen<V> smaller(Sixteen<V> a, Sixteen<V> b) {
    EACH_PART a.part[p] = a.part[p] < b.part[p] ? a.part[p] : b.part[p];
    return a;
}

// The first `count` of 16 numbers, and zeros.
INLINED inline f32x16 load_some(const float *at, int count) {
    if (count >= 16) return load<f32x16>(at);
    float padded[16] = {}; // not the vector itself, which would be kept in memory
    std::memcpy(padded, at, count * sizeof(float));
    return load<f32x16>(padded);
}
INLINED inline void store_some(float *at, f32x16 v, int count) {
    if (count >= 16) return store(at, v);
    float padded[16];
    store(padded, v);
    std::memcpy(at, padded, count * sizeof(float));
}

// Picks numbers of a, then b, by constant indices.
template <class V, int... I> INLINED inline V pick(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, i32_lanes{I...});
#endif
}

using Lanes = std::make_integer_sequence<int, LANES>;

template <int STEP, class V, int... I> INLINED inline V rotate(V v, std::integer_sequence<int, I...>) {
    return pick(v, v, std::integer_sequence<int, (I + STEP) % LANES...>());
}
template <int STEP, class V, class F> INLINED inline V fold_lanes(V v, F f) {
    if constexpr (STEP == 0) return v;
    else return fold_lanes<STEP / 2>(f(v, rotate<STEP>(v, Lanes())), f);
}
// Combines all numbers, in one order: those 8 apart, then 4, 2 and 1.
template <class V, class F> INLINED inline auto fold(Sixteen<V> v, F f) {
    if constexpr (PARTS == 4) v.part[0] = f(v.part[0], v.part[2]), v.part[1] = f(v.part[1], v.part[3]);
    if constexpr (PARTS >= 2) v.part[0] = f(v.part[0], v.part[1]);
    return fold_lanes<LANES / 2>(v.part[0], f)[0];
}
template <class V> INLINED inline auto sum(Sixteen<V> v) {
    return fold(v, [](V a, V b) INLINED { return a + b; });
}
template <class V> INLINED inline auto largest(Sixteen<V> v) {
    return fold(v, [](V a, V b) INLINED { return a > b ? a : b; });
}

// Compares as integers, so that NaN is the largest.
INLINED inline float largest_magnitude(f32x16 a, f32x16 b) {
    int32_t max = largest(larger(bits_of(a) & 0x7fffffff, bits_of(b) & 0x7fffffff));
    return load<float>(&max);
}

// Interleaves the low (0) or high (1) numbers of each block of four of two vectors.
template <int HIGH, int... I> INLINED inline i32x16 interleave(i32x16 a, i32x16 b, std::integer_sequence<int, I...>) {
    using Indices = std::integer_sequence<int, (I & ~3) + 2 * HIGH + (I & 3) / 2 + (I & 1) * LANES...>;
    EACH_PART a.part[p] = pick(a.part[p], b.part[p], Indices());
    return a;
}
template <int HIGH> INLINED inline i32x16 interleave(i32x16 a, i32x16 b) {
    return interleave<HIGH>(a, b, Lanes());
}

// Swaps blocks of STEP numbers off the diagonal of a square.
template <int STEP, int... I> INLINED inline void swap_blocks(f32_lanes *m, std::integer_sequence<int, I...> all) {
    using Low = std::integer_sequence<int, (I & STEP ? I + LANES - STEP : I)...>;
    using High = std::integer_sequence<int, (I & STEP ? I + LANES : I + STEP)...>;
    UNROLL for (int i = 0; i < LANES; i++)
        if (!(i & STEP)) {
            f32_lanes a = m[i], b = m[i + STEP];
            m[i] = pick(a, b, Low()), m[i + STEP] = pick(a, b, High());
        }
    if constexpr (STEP > 1) swap_blocks<STEP / 2>(m, all);
}

// Transposes 16 rows of 16: squares of LANES rows, each to the other side of the diagonal.
INLINED inline void transpose(f32x16 m[16]) {
    f32_lanes squares[PARTS][PARTS][LANES];
    UNROLL for (int row = 0; row < PARTS; row++)
        EACH_PART {
            UNROLL for (int i = 0; i < LANES; i++) squares[p][row][i] = m[row * LANES + i].part[p];
            swap_blocks<LANES / 2>(squares[p][row], Lanes());
        }
    UNROLL for (int row = 0; row < PARTS; row++)
        EACH_PART UNROLL for (int i = 0; i < LANES; i++) m[row * LANES + i].part[p] = squares[row][p][i];
}

} // namespace
