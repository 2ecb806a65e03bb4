// Products with weights, which keep the checkpoint's types.
#pragma once

#include "tiles.h"

namespace {

// out[n][0..31] = sum over k of x[n][k] * panel[k * stride + 0..31]
template <int N, int HALVES>
void multiply(const float *const *x, const float *panel, int stride, int cols, float *const *out) {
    for (int half = 0; half < 2; half += HALVES) {
        f32x16 acc[N][HALVES] = {};
        for (int k = 0; k < cols; k++) {
            f32x16 w[HALVES];
            UNROLL for (int h = 0; h < HALVES; h++) {
                w[h] = load<f32x16>(panel + k * stride + (half + h) * 16);
                if (HALVES == 2) fetch_ahead(panel + k * stride + h * 16);
            }
            UNROLL for (int n = 0; n < N; n++)
                UNROLL for (int h = 0; h < HALVES; h++) acc[n][h] = fma(w[h], x[n][k], acc[n][h]);
        }
        for (int n = 0; n < N; n++)
            for (int h = 0; h < HALVES; h++) store(out[n] + (half + h) * 16, acc[n][h]);
    }
}

// The same for `count` rows, whose inputs and outputs `x_of` and `out_of` give.
template <class X, class Out>
void multiply_rows(int count, const X &x_of, const float *panel, int stride, int cols, const Out &out_of) {
    each_tile(count, [&](int t, auto n) {
        const float *x[n];
        float *out[n];
        for (int i = 0; i < n; i++) x[i] = x_of(t + i), out[i] = out_of(t + i);
        multiply<n, halves_of(n)>(x, panel, stride, cols, out);
    });
}

const float *unpack_panel(const Weight &w, int panel) {
    size_t start = size_t(panel) * w.cols * PANEL;
    if (w.kind == F32) return (const float *)w.codes + start;
    resize(panel_buffer, size_t(w.cols) * PANEL);
    const uint16_t *from = (const uint16_t *)w.codes + start;
    for (size_t i = 0; i < size_t(w.cols) * PANEL; i += 16) {
        fetch_ahead(from + i);
        store(&panel_buffer[i], w.kind == BF16 ? load_bfloat(from + i) : load_half(from + i));
    }
    return panel_buffer.data();
}

const int32_t *panel_codes(const Weight &w, int panel) {
    size_t words = size_t(panel) * PANEL * w.cols / 8; // of 4-bit codes
    return (const int32_t *)w.codes + (w.kind == INT8 ? words * 2 : w.kind == INT5 ? words / 4 * 5 : words);
}

// Writes a row of a weight as fp32.
void unpack_row(const Weight &w, int64_t row, float *to) {
    int panel = int(row / PANEL), lane = int(row % PANEL);
    size_t start = size_t(panel) * w.cols * PANEL;
    if (w.kind < INT4) {
        for (int k = 0; k < w.cols; k++) {
            size_t at = start + size_t(k) * PANEL + lane;
            uint16_t halves[16] = {w.kind == F32 ? uint16_t(0) : ((const uint16_t *)w.codes)[at]};
            if (w.kind == F32) to[k] = ((const float *)w.codes)[at];
            else to[k] = (w.kind == BF16 ? load_bfloat(halves) : load_half(halves))[0];
        }
        return;
    }
    Scales scales(w.scales, w, panel), mins(w.mins, w, panel);
    int words = w.group / 8;
    const uint32_t *from = (const uint32_t *)panel_codes(w, panel);
    for (int g = 0; g < w.cols / w.group; g++) {
        float scale = scales.of(g, lane / 16)[lane % 16], min = mins.at ? mins.of(g, lane / 16)[lane % 16] : 0;
        for (int column = 0; column < w.group; column++) {
            int side = column / (w.group / 2), word = column % (w.group / 2) / 4, byte = column % 4, code;
            size_t at = size_t(g) * words + word;
            if (w.kind == INT8) code = int(from[(at * 2 + side) * PANEL + lane] >> 8 * byte & 255) - 128;
            else code = from[(at + (w.kind == INT5 ? g : 0)) * PANEL + lane] >> (8 * byte + 4 * side) & 15;
            if (w.kind == INT5) {
                uint32_t high = from[size_t(g * 5 + 4) * PANEL + lane] >> (8 * byte + 4 * side + word) & 1;
                code += int(high << 4) + w.values[0] - 128;
            }
            if (w.kind == CODED4) code = w.values[code] - 128;
            to[g * w.group + column] = float(code) * scale + min;
        }
    }
}

template <class C>
void multiply_codes(const Run &run, const Weight &w, C codes, int panel, Shared &shared, bool tiles, int first,
                    int count, float *out) {
    Form form = form_of(run, w, tiles);
    if (tiles && form == BYTES) multiply_tiles<false>(w, codes, panel, shared, first, count, out);
    else if (tiles) multiply_tiles<true>(w, codes, panel, shared, first, count, out);
    else if (form == PAIRS) multiply_codes<false>(w, codes, panel, shared, first, count, out);
    else if constexpr (HAS_DOT4 || std::is_same<C, Codes4>::value) // see form_of
        multiply_codes<true>(w, codes, panel, shared, first, count, out);
}

// One panel of x W^T for `count` rows of x from `first`: out is (count, PANEL). row_of: see `linear`.
void linear_panel(const Run &run, const Weight &w, int panel, const float *x, const int32_t *row_of,
                  Shared &shared, bool tiles, int first, int count, float *out) {
    if (w.kind >= INT4) {
        auto multiply = [&](auto codes) { multiply_codes(run, w, codes, panel, shared, tiles, first, count, out); };
        const int32_t *at = panel_codes(w, panel);
        if (w.kind == INT5) {
            resize(code_buffer, size_t(w.cols) * PANEL / 4);
            widen_codes(w, at, code_buffer.data());
            at = code_buffer.data();
        }
        if (w.kind == INT4) multiply(Codes4{at});
        else if (w.kind == INT8 || w.kind == INT5) multiply(Codes8{at});
        else multiply(Coded4{{at}, w.values});
        return;
    }
    const float *unpacked = unpack_panel(w, panel);
    auto input = [&](int i) { return x + size_t(row_of ? row_of[first + i] : first + i) * w.cols; };
    multiply_rows(count, input, unpacked, PANEL, w.cols, [&](int i) { return out + i * PANEL; });
}

// to = scale * (from + bias), or to += it, for `count` outputs
void write_panel(const Op &op, const float *bias, const float *from, int count, float *to) {
    for (int i = 0; i < count; i += 16) {
        f32x16 v = load<f32x16>(from + i);
        if (bias) v += load_some(bias + i, count - i);
        v *= op.scale;
        if (op.flags & ACCUMULATE) v += load_some(to + i, count - i);
        store_some(to + i, v, count - i);
    }
}

// dst = scale * (src W^T + bias), or dst += it. ROUTED: each pair of a row and an expert, in the order of `Routes`,
// with the weight of its expert; GATHER: src has rows, not such pairs.
void linear(const Op &op, const Run &run, Shared &shared) {
    const Weight &w = *op.weight;
    const float *x = run.slots[op.src];
    float *y = run.slots[op.dst];
    bool routed = op.flags & ROUTED;
    const std::vector<Segment> &segments = routed ? shared.routes.segments : shared.segments;
    const int32_t *row_of = op.flags & GATHER ? shared.routes.rows.data() : nullptr; // of input row i, if not i
    int rows = segments.back().first + segments.back().count, width = routed ? w.rows : run.widths[op.dst];
    bool tiles = !routed && uses_tiles(rows);
    if (w.kind >= INT4 && !(op.flags & SAME_INPUT)) {
        int groups = w.cols / w.group, limit = run.activation_bits == 8 ? 127 : 32767;
        Form form = form_of(run, w, tiles);
        size_t length = w.group / (form == BYTES ? 4 : 2);
        RoundedRows &all = shared.rounded;
        all.reserve(size_t(rows + 15) / 16 * 16 * groups, length); // whole tiles
        shared.threads->each(rows, 4 * w.cols, [&](int r) {
            Rounded to = tiles ? all.row_of_tile(r, groups, length) : all.row(r, groups, length);
            round_row(x + size_t(row_of ? row_of[r] : r) * w.cols, w.group, groups, limit, form, to);
        });
    }
    int panels = (w.rows + PANEL - 1) / PANEL, parts = int(segments.size());
    shared.threads->each(parts * panels, int64_t(rows) * w.cols * PANEL / parts, [&](int i) {
        const Segment &part = segments[i / panels];
        int panel = i % panels, start = panel * PANEL, end = std::min(PANEL, w.rows - start);
        resize(tile_buffer, size_t(TOKENS) * PANEL);
        float *tile = tile_buffer.data();
        linear_panel(run, w, part.expert * panels + panel, x, row_of, shared, tiles, part.first, part.count, tile);
        const float *bias = op.bias ? op.bias + size_t(part.expert) * w.rows + start : nullptr;
        for (int t = 0; t < part.count; t++)
            write_panel(op, bias, tile + t * PANEL, end, y + size_t(part.first + t) * width + start);
    });
}

} // namespace
