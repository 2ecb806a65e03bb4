// Products with integer weights: exact sums in each group of columns, of activations that are rounded to integers too.
#pragma once

#include "structs.h"

namespace {

// How a group of rounded activations is kept: as pairs of 16 bits; as bytes; or for tiles, 16 bits in two planes, of high
// bytes (signed) and low bytes (unsigned). Activations of 8 bits may be kept as 16: the same exact sums.
enum Form { PAIRS, BYTES, PLANES };
Form form_of(const Run &run, const Weight &w, bool tiles) {
    if (run.activation_bits == 8 && (HAS_DOT4 || w.kind == INT4)) return BYTES;
    return tiles ? PLANES : PAIRS;
}

// Codes of a panel. A word w of a group stands for its columns c, 4 w to 4 w + 3 (side 0), and those half a group
// further, d (side 1). `quad` has a byte for each of the four, for 16 of the rows. Word w counts from the first group.
// Activations of a word are pairs of 16 bits, (c0, c2), (d0, d2), (c1, c3), (d1, d3), or the bytes c0 to c3, d0 to d3.
struct Codes4 { // [word][row]: bytes whose halves are the sides
    static constexpr int ZERO = 0; // the code of 0
    const int32_t *at;
    INLINED i32x16 quad(size_t w, int side, int half) const {
        return load<i32x16>(at + w * PANEL + half * 16) >> 4 * side & 0x0f0f0f0f;
    }
    INLINED void fetch(size_t w) const { fetch_ahead(at + w * PANEL), fetch_ahead(at + w * PANEL + 16); }
};
struct Coded4 { // as Codes4, of a table
    static constexpr int ZERO = 128;
    Codes4 codes;
    const uint8_t *table;
    INLINED i32x16 quad(size_t w, int side, int half) const { return look_up(table, codes.quad(w, side, half)); }
    INLINED void fetch(size_t w) const { codes.fetch(w); }
};
struct Codes8 { // [word][side][row]
    static constexpr int ZERO = 128;
    const int32_t *at;
    INLINED i32x16 quad(size_t w, int side, int half) const {
        return load<i32x16>(at + (w * 2 + side) * PANEL + half * 16);
    }
    INLINED void fetch(size_t w) const {
        UNROLL for (int i = 0; i < 2 * PANEL; i += 16) fetch_ahead(at + w * 2 * PANEL + i);
    }
};

// Pair i of a word, in the order of the activations.
template <class C> INLINED inline i32x16 pairs_of(C codes, size_t w, int i, int half) {
    i32x16 quad = codes.quad(w, i % 2, half);
    return i / 2 ? high_bytes(quad) : low_bytes(quad);
}
struct Pairs { // [word][pair][16 rows] of half a panel: the numbers that codes stand for
    static constexpr int ZERO = 0;
    const int32_t *at;
    INLINED void fetch(size_t) const {}
};
INLINED inline i32x16 pairs_of(Pairs codes, size_t w, int i, int) { return load<i32x16>(codes.at + (w * 4 + i) * 16); }

// Writes the codes of a panel of INT5 as those of INT8. A group has the words of INT4, and one more: bit 4 s + w of its
// byte b is the highest bit of column b of word w and side s.
void widen_codes(const Weight &w, const int32_t *from, int32_t *to) {
    int32_t zero = int32_t(w.values[0] * 0x01010101u);
    for (int g = 0; g < w.cols / 32; g++, from += 5 * PANEL, to += 8 * PANEL)
        for (int at = 0; at < PANEL; at += 16) {
            i32x16 high = load<i32x16>(from + 4 * PANEL + at);
            UNROLL for (int word = 0; word < 5; word++) fetch_ahead(from + word * PANEL + at);
            UNROLL for (int bit = 0; bit < 8; bit++) {
                int word = bit % 4, side = bit / 4;
                i32x16 low = load<i32x16>(from + word * PANEL + at) >> 4 * side & 0x0f0f0f0f;
                i32x16 sixteens = (bit < 4 ? high << (4 - bit) : high >> (bit - 4)) & 0x10101010;
                store(to + (word * 2 + side) * PANEL + at, (low | sixteens) + zero);
            }
        }
}

struct Scales { // [group][row]
    const char *at;
    bool wide;
    Scales(const void *base, const Weight &w, int panel) : wide(w.wide) {
        size_t number = size_t(panel) * (w.cols / w.group) * PANEL;
        at = base ? (const char *)base + number * (wide ? 4 : 2) : nullptr;
    }
    INLINED f32x16 of(int g, int half) const {
        size_t number = size_t(g) * PANEL + half * 16;
        return wide ? load<f32x16>(at + number * 4) : load_half((const uint16_t *)at + number);
    }
};

// The exact sums of words [begin, end) of `all` words, for N input rows and HALVES halves of a panel.
template <int N, int HALVES, bool BYTES, class C>
INLINED inline void sum_words(C codes, size_t begin, size_t end, size_t all, int first_half, const int32_t *numbers,
                              i32x16 (&whole)[N][HALVES]) {
    constexpr int NUMBERS = BYTES ? 2 : 4; // of a word
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int h = 0; h < HALVES; h++) whole[n][h] = i32x16{};
    NO_UNROLL for (size_t first = begin; first < end; first += 2) {
        if (HALVES == 2) codes.fetch(first), codes.fetch(first + 1);
        UNROLL for (int i = 0; i < 2 * NUMBERS; i++) {
            size_t w = first + i / NUMBERS;
            i32x16 w_codes[HALVES];
            UNROLL for (int h = 0; h < HALVES; h++) {
                if constexpr (BYTES) w_codes[h] = codes.quad(w, i % 2, first_half + h);
                else w_codes[h] = pairs_of(codes, w, i % 4, first_half + h);
            }
            UNROLL for (int n = 0; n < N; n++) {
                int32_t number = numbers[(n * all + first) * NUMBERS + i];
                UNROLL for (int h = 0; h < HALVES; h++)
                    EACH_PART {
                        i32_lanes &sum = whole[n][h].part[p], c = w_codes[h].part[p];
                        sum = BYTES ? dot4(sum, c, number - i32_lanes{}) : dot2(sum, c, number - i32_lanes{});
                    }
            }
        }
    }
    if (BYTES)
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int h = 0; h < HALVES; h++)
                EACH_PART whole[n][h].part[p] = dot4_total(whole[n][h].part[p]);
}

template <int N, int HALVES, bool BYTES, class C>
void multiply_half(C codes, Scales scales, Scales mins, int first_half, size_t groups, int words, Rounded x,
                   float *out) {
    f32x16 acc[N][HALVES] = {};
    for (size_t g = 0; g < groups; g++) {
        i32x16 whole[N][HALVES];
        sum_words<N, HALVES, BYTES>(codes, g * words, (g + 1) * words, groups * words, first_half, x.numbers, whole);
        UNROLL for (int h = 0; h < HALVES; h++) {
            f32x16 scale = scales.of(g, first_half + h), min = mins.at ? mins.of(g, first_half + h) : f32x16{};
            UNROLL for (int n = 0; n < N; n++) {
                size_t at = n * groups + g;
                i32x16 sum = C::ZERO ? whole[n][h] - C::ZERO * x.totals[at] : whole[n][h];
                acc[n][h] = fma(to_float(sum), scale * x.scales[at], acc[n][h]);
                if (mins.at) acc[n][h] = fma(min, x.sums[at], acc[n][h]);
            }
        }
    }
    for (int n = 0; n < N; n++)
        for (int h = 0; h < HALVES; h++) store(out + n * PANEL + (first_half + h) * 16, acc[n][h]);
}

// Writes half a panel as `Pairs`.
template <class C> void unpack_pairs(C codes, size_t words, int half, int32_t *to) {
    for (size_t w = 0; w < words; w++) {
        codes.fetch(w);
        UNROLL for (int i = 0; i < 4; i++, to += 16) {
            i32x16 pairs = pairs_of(codes, w, i, half);
            EACH_PART pairs.part[p] = (i32_lanes)((i16_pairs)pairs.part[p] - int16_t(C::ZERO));
            store(to, pairs);
        }
    }
}

// Codes are unpacked once for many tiles where a tile has few rows. With 16 numbers in a register it has twice as many,
// and reading unpacked codes takes longer than unpacking them.
constexpr bool UNPACKS = LANES == 8;

template <class C>
void multiply_unpacked(const Weight &w, C codes, Scales scales, Scales mins, Shared &shared, int first, int count,
                       float *out) {
    int groups = w.cols / w.group, words = w.group / 8;
    resize(panel_buffer, size_t(w.cols) * 8);
    int32_t *pairs = (int32_t *)panel_buffer.data();
    for (int half = 0; half < 2; half++) { // half a panel at once: more of it stays in the first cache
        unpack_pairs(codes, w.cols / 8, half, pairs);
        each_tile(count, [&](int t, auto n) {
            Rounded x = shared.rounded.row(first + t, groups, 4 * words);
            multiply_half<n, 1, false>(Pairs{pairs}, scales, mins, half, groups, words, x, out + t * PANEL);
        });
    }
}

// A panel for `count` input rows from `first`: out is (count, PANEL).
template <bool BYTES, class C>
void multiply_codes(const Weight &w, C codes, int panel, Shared &shared, int first, int count, float *out) {
    int groups = w.cols / w.group, words = w.group / 8;
    Scales scales(w.scales, w, panel), mins(w.mins, w, panel);
    if constexpr (UNPACKS && !BYTES)
        if (count >= 4 * TILE) return multiply_unpacked(w, codes, scales, mins, shared, first, count, out);
    each_tile(count, [&](int t, auto n) {
        constexpr int HALVES = halves_of(n);
        Rounded x = shared.rounded.row(first + t, groups, BYTES ? 2 * words : 4 * words);
        for (int half = 0; half < 2; half += HALVES)
            multiply_half<n, HALVES, BYTES>(codes, scales, mins, half, groups, words, x, out + t * PANEL);
    });
}

constexpr uint64_t LOW_BYTES = 0x00ff00ff00ff00ff;

// Rounds a row to integers of at most `limit`.
void round_row(const float *x, int group, int groups, int limit, Form form, Rounded to) {
    int words = group / 8, length = form == BYTES ? 2 * words : 4 * words;
    for (int g = 0; g < groups; g++, x += group) {
        f32x16 a = load<f32x16>(x), b = group == 32 ? load<f32x16>(x + 16) : f32x16{};
        float max = largest_magnitude(a, b), inverse = max > 0 ? limit / max : 0;
        // Adding 1.5 * 2^23 rounds to an integer.
        i32x16 c = to_int(a * inverse + 12582912.0f - 12582912.0f), d = to_int(b * inverse + 12582912.0f - 12582912.0f);
        float scale = max / limit;
        to.totals[g] = sum(c + d), to.scales[g * to.step] = scale, to.sums[g * to.step] = float(to.totals[g]) * scale;
        if (group == 16) { // the second side is in the second half of the only vector
            int32_t sides[2][16] = {};
            store(sides[0], c), std::memcpy(sides[1], sides[0] + 8, 32);
            c = load<i32x16>(sides[0]), d = load<i32x16>(sides[1]);
        }
        uint64_t pairs[8], bytes[8]; // two pairs of a word: (c0, c2), (d0, d2) and (c1, c3), (d1, d3)
        store(pairs, (interleave<0>(c, d) & 0xffff) | interleave<1>(c, d) << 16);
        for (int w = 0; w < words && form != PAIRS; w++) {
            uint64_t even = pairs[2 * w], odd = pairs[2 * w + 1];
            bytes[form == BYTES ? w : words + w] = (even & LOW_BYTES) | (odd & LOW_BYTES) << 8;
            if (form == PLANES) bytes[w] = (even >> 8 & LOW_BYTES) | (odd & ~LOW_BYTES);
        }
        std::memcpy(to.numbers + g * length, form == PAIRS ? pairs : bytes, length * sizeof(int32_t));
    }
}

} // namespace
