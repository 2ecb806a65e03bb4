// Products with weights, which keep the checkpoint's types.
#pragma once

#include <type_traits>

#include "structs.h"

namespace {

// out[n][0..31] = sum over k of x[n][k] * panel[k * stride + 0..31]
template <int N> void multiply(const float *const *x, const float *panel, int stride, int cols, float *const *out) {
    f32x16 acc[N][2] = {};
    for (int k = 0; k < cols; k++) {
        f32x16 a = load<f32x16>(panel + k * stride), b = load<f32x16>(panel + k * stride + 16);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) acc[n][0] += a * x[n][k], acc[n][1] += b * x[n][k];
    }
    for (int n = 0; n < N; n++) store(out[n], acc[n][0]), store(out[n] + 16, acc[n][1]);
}

// Calls f with n, 1 to TILE, as a compile-time constant.
template <class F> void with_constant(int n, F f) {
    switch (n) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    default: return f(std::integral_constant<int, TILE>());
    }
}

void multiply_rows(int n, const float *const *x, const float *panel, int stride, int cols, float *const *out) {
    with_constant(n, [=](auto N) { multiply<N>(x, panel, stride, cols, out); });
}

// Activations as 16-bit integers: per group the pairs, in the order of the weight's codes, the scale, and the sum.
struct Rounded {
    int32_t *pairs;
    float *scales, *sums;
};

// Layouts of a panel's codes. `pair(g, p, half)`: pair p of group g, for 16 of the rows.
template <int PAIRS> struct Codes4 { // [group][word][row], 8 columns in a word
    const uint32_t *at;
    i32x16 pair(int g, int p, int half) const {
        i32x16 word = load<i32x16>(at + (size_t(g) * (PAIRS / 4) + p / 4) * PANEL + half * 16);
        return (word >> (4 * (p % 4))) & 0x000f000f;
    }
};
template <int PAIRS> struct Coded4 { // as Codes4, of a table
    Codes4<PAIRS> codes;
    i16x32 table;
    i32x16 pair(int g, int p, int half) const { return look_up(table, codes.pair(g, p, half)); }
};
template <int PAIRS> struct Codes8 { // [group][pair][row][2]
    const int8_t *at;
    i32x16 pair(int g, int p, int half) const {
        i8x32 bytes = load<i8x32>(at + ((size_t(g) * PAIRS + p) * PANEL + half * 16) * 2);
        return (i32x16)widen(bytes);
    }
};

struct Scales { // [group][row]
    const char *at;
    bool wide;
    Scales(const void *base, const Weight &w, int panel) : wide(w.wide) {
        size_t number = size_t(panel) * (w.cols / w.group) * PANEL;
        at = base ? (const char *)base + number * (wide ? 4 : 2) : nullptr;
    }
    f32x16 of(int g, int half) const {
        size_t number = size_t(g) * PANEL + half * 16;
        return wide ? load<f32x16>(at + number * 4) : half_to_float(load<u16x16>(at + number * 2));
    }
};

template <int N, int PAIRS, class C>
void multiply_codes(C codes, Scales scales, Scales mins, int groups, Rounded x, float *const *out) {
    f32x16 acc[N][2] = {};
    for (int g = 0; g < groups; g++) {
        i32x16 whole[N][2] = {};
#pragma GCC unroll 16
        for (int p = 0; p < PAIRS; p++) {
            i32x16 a = codes.pair(g, p, 0), b = codes.pair(g, p, 1);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) {
                i32x16 pair = x.pairs[(size_t(n) * groups + g) * PAIRS + p] - i32x16{};
                whole[n][0] = dot2(whole[n][0], a, pair), whole[n][1] = dot2(whole[n][1], b, pair);
            }
        }
        for (int half = 0; half < 2; half++) {
            f32x16 scale = scales.of(g, half), min = mins.at ? mins.of(g, half) : f32x16{};
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) {
                size_t at = size_t(n) * groups + g;
                acc[n][half] += __builtin_convertvector(whole[n][half], f32x16) * (scale * x.scales[at]);
                if (mins.at) acc[n][half] += min * x.sums[at];
            }
        }
    }
    for (int n = 0; n < N; n++) store(out[n], acc[n][0]), store(out[n] + 16, acc[n][1]);
}

// The column of a group at `half` (0 or 1) of pair p. Nibbles are as in ggml: a byte holds columns i and i + group / 2.
int column_of(Kind kind, int group, int p, int half) {
    if (kind == INT8) return 2 * p + half;
    return p / 4 * 4 + p % 4 / 2 + 2 * half + (p % 2) * (group / 2);
}

void round_row(const float *x, Kind kind, int group, int groups, Rounded to) {
    int pairs = group / 2;
    i32x16 low{}, high{}; // columns of the halves of each pair
    for (int p = 0; p < pairs; p++) low[p] = column_of(kind, group, p, 0), high[p] = column_of(kind, group, p, 1);
    for (int g = 0; g < groups; g++, x += group) {
        f32x16 a = load<f32x16>(x), b = group == 32 ? load<f32x16>(x + 16) : f32x16{};
        float max = largest_magnitude(a, b), inverse = max > 0 ? 32767 / max : 0;
        // Adding 1.5 * 2^23 rounds to an integer.
        i32x16 c = __builtin_convertvector(a * inverse + 12582912.0f - 12582912.0f, i32x16);
        i32x16 d = __builtin_convertvector(b * inverse + 12582912.0f - 12582912.0f, i32x16);
        i32x16 packed = (__builtin_shuffle(c, d, low) & 0xffff) | __builtin_shuffle(c, d, high) << 16;
        std::memcpy(to.pairs + g * pairs, &packed, pairs * sizeof(int32_t));
        to.scales[g] = max / 32767, to.sums[g] = sum(__builtin_convertvector(c + d, f32x16)) * to.scales[g];
    }
}

template <int PAIRS, class C>
void linear_codes(const Weight &w, C codes, int panel, const Shared &shared, int first, int count, float *out) {
    int groups = w.cols / w.group;
    Scales scales(w.scales, w, panel), mins(w.mins, w, panel);
    for (int t = 0; t < count; t += TILE) {
        size_t group = size_t(first + t) * groups;
        Rounded x{const_cast<int32_t *>(&shared.pairs[group * PAIRS]), const_cast<float *>(&shared.scales[group]),
                  const_cast<float *>(&shared.sums[group])};
        float *rows[TILE];
        int n = std::min(TILE, count - t);
        for (int i = 0; i < n; i++) rows[i] = out + (t + i) * PANEL;
        with_constant(n, [&](auto N) { multiply_codes<N, PAIRS>(codes, scales, mins, groups, x, rows); });
    }
}

const float *unpack_panel(const Weight &w, int panel) {
    size_t start = size_t(panel) * w.cols * PANEL;
    if (w.kind == F32) return (const float *)w.codes + start;
    resize(panel_buffer, size_t(w.cols) * PANEL);
    const uint16_t *from = (const uint16_t *)w.codes + start;
    for (size_t i = 0; i < size_t(w.cols) * PANEL; i += 16) {
        u16x16 v = load<u16x16>(from + i);
        store(&panel_buffer[i], w.kind == BF16 ? bfloat_to_float(v) : half_to_float(v));
    }
    return panel_buffer.data();
}

// Writes a row of a weight as fp32.
void unpack_row(const Weight &w, int64_t row, float *to) {
    int panel = int(row / PANEL), lane = int(row % PANEL);
    size_t start = size_t(panel) * w.cols * PANEL;
    if (w.kind < INT4) {
        for (int k = 0; k < w.cols; k++) {
            size_t at = start + size_t(k) * PANEL + lane;
            u16x16 half{};
            if (w.kind != F32) half[0] = ((const uint16_t *)w.codes)[at];
            if (w.kind == F32) to[k] = ((const float *)w.codes)[at];
            else to[k] = (w.kind == BF16 ? bfloat_to_float(half) : half_to_float(half))[0];
        }
        return;
    }
    Scales scales(w.scales, w, panel), mins(w.mins, w, panel);
    int pairs = w.group / 2;
    for (int g = 0; g < w.cols / w.group; g++) {
        float scale = scales.of(g, lane / 16)[lane % 16], min = mins.at ? mins.of(g, lane / 16)[lane % 16] : 0;
        for (int p = 0; p < pairs; p++)
            for (int half = 0; half < 2; half++) {
                int code;
                if (w.kind == INT8)
                    code = ((const int8_t *)w.codes)[start + ((size_t(g) * pairs + p) * PANEL + lane) * 2 + half];
                else {
                    const uint32_t *words = (const uint32_t *)w.codes + start / 8;
                    uint32_t word = words[(size_t(g) * (pairs / 4) + p / 4) * PANEL + lane];
                    code = word >> (4 * (p % 4) + 16 * half) & 15;
                    if (w.kind == CODED4) code = w.values[code];
                }
                to[g * w.group + column_of(Kind(w.kind), w.group, p, half)] = float(code) * scale + min;
            }
    }
}

// One panel of x W^T for `count` rows of x from `first`: out is (count, PANEL). row_of: see `linear`.
void linear_panel(const Weight &w, int panel, const float *x, const int32_t *row_of, const Shared &shared, int first,
                  int count, float *out) {
    size_t numbers = size_t(panel) * w.cols * PANEL;
    if (w.kind == INT4) {
        const uint32_t *at = (const uint32_t *)w.codes + numbers / 8;
        if (w.group == 32) linear_codes<16>(w, Codes4<16>{at}, panel, shared, first, count, out);
        else linear_codes<8>(w, Codes4<8>{at}, panel, shared, first, count, out);
    } else if (w.kind == CODED4) {
        Codes4<16> codes{(const uint32_t *)w.codes + numbers / 8};
        linear_codes<16>(w, Coded4<16>{codes, load<i16x32>(w.values)}, panel, shared, first, count, out);
    } else if (w.kind == INT8) {
        const int8_t *at = (const int8_t *)w.codes + numbers;
        if (w.group == 32) linear_codes<16>(w, Codes8<16>{at}, panel, shared, first, count, out);
        else linear_codes<8>(w, Codes8<8>{at}, panel, shared, first, count, out);
    } else {
        const float *unpacked = unpack_panel(w, panel);
        for (int t = 0; t < count; t += TILE) {
            const float *rows[TILE];
            float *outs[TILE];
            int n = std::min(TILE, count - t);
            for (int i = 0; i < n; i++) {
                int row = first + t + i;
                rows[i] = x + size_t(row_of ? row_of[row] : row) * w.cols, outs[i] = out + (t + i) * PANEL;
            }
            multiply_rows(n, rows, unpacked, PANEL, w.cols, outs);
        }
    }
}

// to = scale * (from + bias), or to += it, for `count` outputs
void write_panel(const Op &op, const float *bias, const float *from, int count, float *to) {
    if (count == PANEL) {
        for (int i = 0; i < PANEL; i += 16) {
            f32x16 v = load<f32x16>(from + i);
            if (bias) v += load<f32x16>(bias + i);
            v *= op.scale;
            store(to + i, op.flags & ACCUMULATE ? load<f32x16>(to + i) + v : v);
        }
        return;
    }
    for (int i = 0; i < count; i++) {
        float value = (from[i] + (bias ? bias[i] : 0.0f)) * op.scale;
        to[i] = op.flags & ACCUMULATE ? to[i] + value : value;
    }
}

// dst = scale * (src W^T + bias), or dst += it. ROUTED: each pair of a row and an expert, in the order of `Routes`, with
// the weight of its expert; GATHER: src has rows, not such pairs.
void linear(const Op &op, const Run &run, Shared &shared) {
    const Weight &w = *op.weight;
    const float *x = run.slots[op.src];
    float *y = run.slots[op.dst];
    bool routed = op.flags & ROUTED;
    const std::vector<Segment> &segments = routed ? shared.routes.segments : shared.segments;
    const int32_t *row_of = op.flags & GATHER ? shared.routes.rows.data() : nullptr; // of input row i, if not i
    int rows = segments.back().first + segments.back().count, width = routed ? w.rows : run.widths[op.dst];
    if (w.kind >= INT4 && !(op.flags & SAME_INPUT)) {
        int groups = w.cols / w.group;
        resize(shared.pairs, size_t(rows) * w.cols / 2);
        resize(shared.scales, size_t(rows) * groups), resize(shared.sums, size_t(rows) * groups);
        shared.threads->each(rows, 4 * w.cols, [&](int r) {
            Rounded to{&shared.pairs[size_t(r) * w.cols / 2], &shared.scales[size_t(r) * groups],
                       &shared.sums[size_t(r) * groups]};
            round_row(x + size_t(row_of ? row_of[r] : r) * w.cols, Kind(w.kind), w.group, groups, to);
        });
    }
    int panels = (w.rows + PANEL - 1) / PANEL, parts = int(segments.size());
    shared.threads->each(parts * panels, int64_t(rows) * w.cols * PANEL / parts, [&](int i) {
        const Segment &part = segments[i / panels];
        int panel = i % panels, start = panel * PANEL, end = std::min(PANEL, w.rows - start);
        resize(tile_buffer, size_t(TOKENS) * PANEL);
        float *tile = tile_buffer.data();
        linear_panel(w, part.expert * panels + panel, x, row_of, shared, part.first, part.count, tile);
        const float *bias = op.bias ? op.bias + size_t(part.expert) * w.rows + start : nullptr;
        for (int t = 0; t < part.count; t++)
            write_panel(op, bias, tile + t * PANEL, end, y + size_t(part.first + t) * width + start);
    });
}

} // namespace
