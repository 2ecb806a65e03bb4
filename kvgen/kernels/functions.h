// Elementary functions, of our own because those of C libraries differ in their last bits. NaN stays NaN. Polynomials
// are minimax fits.
#pragma once

#include "instructions.h"

namespace {

template <class... C> INLINED inline f32x16 polynomial(f32x16 x, float first, C... rest) { // highest power first
    f32x16 p = splat(first);
    ((p = fma(p, x, rest)), ...);
    return p;
}

// exp(x) = (1 + fraction) * scale, for x from -87.3 to 88.3; x beyond them is taken for the nearer
struct Exponential {
    f32x16 scale, fraction;
    INLINED explicit Exponential(f32x16 x) {
        x = smaller(splat(88.3f), larger(splat(-87.3f), x));
        i32x16 n = to_int(fma(x, splat(1.44269504f), choose(x < 0, splat(-0.5f), splat(0.5f))));
        f32x16 whole = to_float(n);
        f32x16 r = fma(whole, splat(2.12194440e-4f), fma(whole, splat(-0.693359375f), x)); // ln 2, as in Cephes
        f32x16 p = polynomial(r, 1.99178265e-4f, 1.3946084e-3f, 8.33326542e-3f, 4.16662697e-2f, 0.166666669f, 0.5f);
        scale = from_bits((n + 127) << 23), fraction = fma(p, r * r, r);
    }
};

// exp within about 1 ulp; 0 below -87.3
INLINED inline f32x16 exp_of(f32x16 x) {
    Exponential e(x);
    return choose(x < -87.3f, f32x16{}, fma(e.fraction, e.scale, e.scale));
}

// 2^x within about 2 ulp, for x up to 127; 0 below -126
INLINED inline f32x16 exp2_of(f32x16 x) {
    f32x16 bounded = larger(splat(-126.0f), x);
    f32x16 rounded = bounded + 12582912.0f; // 1.5 * 2^23: the low bits are those of the integer
    f32x16 p = polynomial(bounded - (rounded - 12582912.0f), 1.32647273e-3f, 9.67151299e-3f, 5.55073358e-2f,
                          0.240222424f, 0.693147004f, 1.0f);
    return choose(x < -126.0f, f32x16{}, from_bits(bits_of(p) + (bits_of(rounded) << 23)));
}

// 2^n of an integer up to 127; 0 below -126
inline float power_of_two(float n) {
    int32_t bits = n < -126 ? 0 : (127 + int32_t(n)) << 23;
    return load<float>(&bits);
}

// exp(x) - 1
INLINED inline f32x16 expm1_of(f32x16 x) {
    Exponential e(x);
    return fma(e.fraction, e.scale, e.scale - 1.0f);
}

// log(1 + x) for x from 0 to 1: 2 atanh(x / (2 + x))
INLINED inline f32x16 log1p_of(f32x16 x) {
    f32x16 s = x / (x + 2.0f), square = s * s;
    f32x16 p = polynomial(square, 0.121504527f, 0.107138331f, 0.14308442f, 0.199994389f, 0.333333378f);
    return 2.0f * fma(p * square, s, s);
}

INLINED inline f32x16 softplus_of(f32x16 x) {
    f32x16 magnitude = from_bits(bits_of(x) & 0x7fffffff);
    return larger(f32x16{}, x) + log1p_of(exp_of(-magnitude));
}

INLINED inline f32x16 sigmoid_of(f32x16 x) { return 1.0f / (1.0f + exp_of(-x)); }

INLINED inline f32x16 with_sign_of(f32x16 x, f32x16 magnitude) {
    return from_bits((bits_of(x) & int32_t(0x80000000)) | bits_of(magnitude));
}

INLINED inline f32x16 tanh_of(f32x16 x) {
    f32x16 magnitude = from_bits(bits_of(x) & 0x7fffffff), square = x * x;
    f32x16 large = 1.0f - 2.0f / (exp_of(magnitude * 2.0f) + 1.0f);
    f32x16 p = polynomial(square, -0.00570499041f, 0.0206390907f, -0.0537397163f, 0.133314422f, -0.333332819f);
    f32x16 small = fma(p * square, magnitude, magnitude);
    return with_sign_of(x, choose(magnitude < 0.625f, small, large));
}

// For magnitudes from 1: 1 - exp(-p), where p is a polynomial.
INLINED inline f32x16 erf_of(f32x16 x) {
    f32x16 magnitude = from_bits(bits_of(x) & 0x7fffffff), square = x * x, t = smaller(splat(4.0f), magnitude);
    f32x16 p = polynomial(t, 2.16977145e-5f, -4.4147384e-4f, 4.20529063e-3f, -2.52103555e-2f, 0.108422124f,
                          0.633216374f, 1.12958032f, -1.88470197e-4f);
    f32x16 large = 1.0f - exp_of(-p);
    f32x16 q = polynomial(square, 7.85400892e-5f, -8.01024195e-4f, 5.18833378e-3f, -2.68538156e-2f, 0.112835853f,
                          -0.376126258f, 0.128379166f);
    f32x16 small = fma(q, magnitude, magnitude);
    return with_sign_of(x, choose(magnitude < 1.0f, small, large));
}

} // namespace
