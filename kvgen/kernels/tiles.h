// Products of many rows with integer weights on AMX, which multiplies tiles of 16 rows. The sums of a group are exact
// integers and are scaled in the order of `multiply_half`, so the bits are those of the other variants.
#pragma once

#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "codes.h"

namespace {

#if defined(__AMX_INT8__)

constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA of Linux
const bool allowed = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;

// Whether products of `rows` rows use tiles. Fewer rows are faster with dot products, which a system that does not allow
// tiles uses too.
bool uses_tiles(int rows) { return allowed && rows >= 24; }

// Tiles; g++ wants literals.
#define SUM_HIGH 0
#define SUM_LOW 1
#define X_HIGH 2
#define X_LOW 3
#define W_CODES 4

// Sets up the tiles of a thread, for groups of `group` columns, until it is destroyed.
class Tiles {
  public:
    explicit Tiles(int group) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64};
            uint8_t rows[16] = {16, 16, 16, 16};
        } config;
        config.bytes[X_HIGH] = config.bytes[X_LOW] = group;
        config.bytes[W_CODES] = 64, config.rows[W_CODES] = group / 4;
        asm volatile("" ::"r"(&config) : "memory"); // g++ does not know that tiles read memory
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles &) = delete;
};

// Codes of a panel as signed bytes, [half][word][side][16 rows of 4].
template <class C> void unpack_codes(C codes, size_t words, int32_t *to) {
    for (int half = 0; half < 2; half++)
        for (size_t w = 0; w < words; w++)
            for (int side = 0; side < 2; side++, to += 16) {
                i32x16 quad = codes.quad(w, side, half);
                if (C::ZERO)
                    EACH_PART quad.part[p] ^= int32_t(0x80808080);
                store(to, quad);
            }
}

// Half a panel for 16 input rows: out is (16, PANEL).
template <bool PLANES, bool MINS>
void multiply_tile(const int32_t *codes, Scales scales, Scales mins, int half, int groups, int group, Rounded x,
                   float *out) {
    alignas(64) int32_t sums[2][PLANES ? 2 : 1][16][16];
    size_t length = group / (PLANES ? 2 : 4), stride = groups * length * 4;
    auto sum_group = [&](int g) INLINED {
        const int32_t *numbers = x.numbers + g * length;
        auto &to = sums[g % 2];
        _tile_loadd(W_CODES, codes + size_t(g) * group * 4, 64);
        _tile_zero(SUM_HIGH);
        _tile_loadd(X_HIGH, numbers, stride);
        _tile_dpbssd(SUM_HIGH, X_HIGH, W_CODES);
        _tile_stored(SUM_HIGH, to[0], 64);
        if (!PLANES) return;
        _tile_zero(SUM_LOW);
        _tile_loadd(X_LOW, numbers + group / 4, stride);
        _tile_dpbusd(SUM_LOW, X_LOW, W_CODES);
        _tile_stored(SUM_LOW, to[1], 64);
    };
    f32x16 acc[16] = {};
    sum_group(0);
    for (int g = 0; g < groups; g++) {
        if (g + 1 < groups) sum_group(g + 1); // while the sums of this one are scaled
        const int32_t *whole = sums[g % 2][0][0];
        const float *x_scales = x.scales + g * 16, *x_sums = x.sums + g * 16;
        asm("" : "+r"(whole), "+r"(x_scales), "+r"(x_sums)); // one register for the address of all rows
        f32x16 scale = scales.of(g, half), min = MINS ? mins.of(g, half) : f32x16{};
        UNROLL for (int n = 0; n < 16; n++) {
            i32x16 sum = load<i32x16>(whole + n * 16);
            if (PLANES) sum = (sum << 8) + load<i32x16>(whole + 256 + n * 16);
            acc[n] = fma(to_float(sum), scale * x_scales[n], acc[n]);
            if (MINS) acc[n] = fma(min, x_sums[n], acc[n]);
        }
    }
    UNROLL for (int n = 0; n < 16; n++) store(out + n * PANEL + half * 16, acc[n]);
}

// A panel for `count` input rows from `first`, a multiple of 16: out is (count, PANEL), with room for whole tiles.
template <bool PLANES, class C>
void multiply_tiles(const Weight &w, C codes, int panel, Shared &shared, int first, int count, float *out) {
    int groups = w.cols / w.group;
    Scales scales(w.scales, w, panel), mins(w.mins, w, panel);
    resize(panel_buffer, size_t(w.cols) * PANEL / 4);
    int32_t *bytes = (int32_t *)panel_buffer.data();
    unpack_codes(codes, w.cols / 8, bytes);
    Tiles tiles(w.group); // after `bytes` are written
    auto multiply = w.mins ? multiply_tile<PLANES, true> : multiply_tile<PLANES, false>;
    for (int t = 0; t < count; t += 16) {
        Rounded x = shared.rounded.row_of_tile(first + t, groups, w.group / (PLANES ? 2 : 4));
        for (int half = 0; half < 2; half++)
            multiply(bytes + half * w.cols * 4, scales, mins, half, groups, w.group, x, out + t * PANEL);
    }
}

#else

constexpr bool uses_tiles(int) { return false; }

template <bool PLANES, class C> void multiply_tiles(const Weight &, C, int, Shared &, int, int, float *) {}

#endif

} // namespace
