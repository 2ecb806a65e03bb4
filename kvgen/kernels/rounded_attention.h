// Attention with integers, for activations of 8 bits: queries, keys and values are rounded to 11 or 12 bits with one
// scale a row, and weights to 15 bits with one scale for each query and chunk, so that sums of products are exact.
#pragma once

#include "chunks.h"

namespace {

constexpr int VALUE_LIMIT = 1023, WEIGHT_LIMIT = 32767; // the sum of KEYS products of them has 31 bits

constexpr float SMALLEST = 1e-30f; // rows without a larger number are taken for zeros: their inverse would be infinite

// The largest integer for queries and keys, so that a sum of `dims` products has 31 bits.
float score_limit(int dims) { return dims <= 512 ? 2047 : std::floor(std::sqrt(2147483647.0f / dims)); }

// v * inverse as an integer, in the low 16 bits: adding 1.5 * 2^23 rounds.
INLINED inline i32x16 rounded(f32x16 v, f32x16 inverse) { return bits_of(fma(v, inverse, 12582912.0f)); }

// Pairs of integers that are in low 16 bits.
INLINED inline i32x16 paired(i32x16 even, i32x16 odd) { return (even & 0xffff) | odd << 16; }

// Rounds `count` numbers to integers of at most `limit`, with zeros to a multiple of 16; returns their scale.
float round_numbers(const float *from, int count, float limit, int16_t *to) {
    i32x16 max{};
    for (int i = 0; i < count; i += 16) max = larger(max, bits_of(load_some(from + i, count - i)) & 0x7fffffff);
    float magnitude = from_bits(splat<i32_lanes>(largest(max)))[0];
    float inverse = magnitude > SMALLEST ? limit / magnitude : 0;
    for (int i = 0; i < count; i += 16) store_i16(to + i, rounded(load_some(from + i, count - i), splat(inverse)));
    return magnitude / limit;
}

// The sums of products of N rows of `pairs` pairs, `stride` numbers apart, with a panel, (pairs, PANEL) pairs.
// out(n, half, sums) takes them.
template <int N, class Out>
INLINED inline void multiply_pairs(const int32_t *x, int stride, const int32_t *panel, int pairs, const Out &out) {
    constexpr int HALVES = halves_of(N);
    for (int half = 0; half < 2; half += HALVES) {
        i32x16 sums[N][HALVES] = {};
        NO_UNROLL for (int k = 0; k < pairs; k++) {
            i32x16 w[HALVES];
            UNROLL for (int h = 0; h < HALVES; h++) w[h] = load<i32x16>(panel + k * PANEL + (half + h) * 16);
            UNROLL for (int n = 0; n < N; n++)
                UNROLL for (int h = 0; h < HALVES; h++)
                    EACH_PART sums[n][h].part[p] =
                        dot2(sums[n][h].part[p], w[h].part[p], x[n * stride + k] - i32_lanes{});
        }
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int h = 0; h < HALVES; h++) out(n, half + h, sums[n][h]);
    }
}

// A chunk as panels of pairs of dimensions of its keys, and of pairs of its values, with the scale of each position.
struct RoundedChunk {
    int32_t *keys, *values;
    float *key_scales, *value_scales;
};

// What numbers of 16 positions are multiplied with to be at most `limit`; writes their scales. max: their largest.
f32x16 inverse_of(f32x16 max, float limit, float *scales) {
    store(scales, max / limit);
    return choose(max > SMALLEST, limit / max, f32x16{});
}

// Rounds panels of keys, [D][32] each.
void round_keys(const float *panels, int dims, int low, int end, RoundedChunk to) {
    float limit = score_limit(dims);
    for (int j = low / 16 * 16; j < end; j += 16) {
        const float *from = panels + j / PANEL * dims * PANEL + j % PANEL;
        i32x16 max{};
        for (int d = 0; d < dims; d++) max = larger(max, bits_of(load<f32x16>(from + d * PANEL)) & 0x7fffffff);
        f32x16 inverse = inverse_of(from_bits(max), limit, to.key_scales + j);
        int32_t *pairs = to.keys + j / PANEL * ((dims + 1) / 2) * PANEL + j % PANEL;
        for (int d = 0; d < dims; d += 2) {
            f32x16 odd = d + 1 < dims ? load<f32x16>(from + (d + 1) * PANEL) : f32x16{};
            i32x16 pair = paired(rounded(load<f32x16>(from + d * PANEL), inverse), rounded(odd, inverse));
            store(pairs + d / 2 * PANEL, pair);
        }
    }
}

template <class T> void round_values(const Chunk<T> &chunk, int padded, RoundedChunk to) {
    for (int j = chunk.low / 16 * 16; j < chunk.end; j += 16) {
        auto part = [&](int i, int d) INLINED {
            bool there = j + i >= chunk.low && j + i < chunk.end && d < chunk.dims;
            return there ? chunk.part(chunk.values + (j + i) * chunk.row, d) : f32x16{};
        };
        f32x16 magnitudes[16];
        for (int i = 0; i < 16; i++) {
            i32x16 max{};
            for (int d = 0; d < chunk.dims; d += 16) max = larger(max, bits_of(part(i, d)) & 0x7fffffff);
            magnitudes[i] = from_bits(max);
        }
        transpose(magnitudes);
        i32x16 max{};
        for (f32x16 some : magnitudes) max = larger(max, bits_of(some));
        float inverses[16];
        store(inverses, inverse_of(from_bits(max), VALUE_LIMIT, to.value_scales + j));
        for (int i = 0; i < 16; i += 2)
            for (int d = 0; d < padded; d += 16) {
                i32x16 even = rounded(part(i, d), splat(inverses[i]));
                i32x16 odd = rounded(part(i + 1, d), splat(inverses[i + 1]));
                store(to.values + (d / PANEL * KEYS / 2 + (j + i) / 2) * PANEL + d % PANEL, paired(even, odd));
            }
    }
}

// Rounds n rows of weights of values, times the scales of values; returns the scale of each row.
void round_weights(float *weights, int n, const float *value_scales, int low, int end, int16_t *to, float *scales) {
    low = low / 16 * 16;
    for (int r = 0; r < n; r++) {
        i32x16 max{};
        for (int j = low; j < end; j += 16) {
            f32x16 product = load<f32x16>(weights + r * KEYS + j) * load<f32x16>(value_scales + j);
            store(weights + r * KEYS + j, product);
            max = larger(max, bits_of(product) & 0x7fffffff);
        }
        scales[r] = from_bits(splat<i32_lanes>(largest(max)))[0] / WEIGHT_LIMIT;
    }
    for (int r = 0; r < n; r++) {
        float inverse = scales[r] > SMALLEST ? 1 / scales[r] : 0;
        for (int j = low; j < end; j += 16)
            store_i16(to + r * KEYS + j, rounded(load<f32x16>(weights + r * KEYS + j), splat(inverse)));
    }
}

int query_length(int dims) { return (dims + 15) / 16 * 16; } // integers of 16 bits

void round_queries(const Op &op, const Run &run, Shared &shared) {
    int dims = op.width, group = op.heads / op.kv_heads, length = query_length(dims);
    shared.queries.reserve(size_t(run.rows) * op.heads, length / 2);
    shared.threads->each(run.rows, int64_t(op.heads) * dims * 4, [&](int row) {
        const float *from = run.slots[op.src] + size_t(row) * run.widths[op.src];
        for (int head = 0; head < op.heads; head++) {
            size_t at = (size_t(head / group) * run.rows + row) * group + head % group;
            int16_t *to = (int16_t *)shared.queries.numbers.data() + at * length;
            shared.queries.scales[at] = round_numbers(from + head * dims, dims, score_limit(dims), to);
        }
    });
}

// `attend_chunk` with integers.
template <class T>
void attend_rounded(const Op &op, const Run &run, Shared &shared, const Task &task, int64_t start, Partial to) {
    const Sequence &sequence = run.sequences[task.sequence];
    const Layer &layer = sequence.layers[op.layer];
    int dims = op.width, padded = padded_width(op), pairs = (dims + 1) / 2, group = op.heads / op.kv_heads;
    resize(panel_buffer, size_t(KEYS) * (dims + pairs + padded / 2 + 2));
    float *panels = panel_buffer.data(), *scales = panels + KEYS * (dims + pairs + padded / 2);
    int32_t *integers = (int32_t *)panels + KEYS * dims;
    RoundedChunk rounded{integers, integers + KEYS * pairs, scales, scales + KEYS};
    Chunk<T> chunk = chunk_of<T>(op, run, task, start);
    chunk.pack_keys(panels);
    round_keys(panels, dims, chunk.low, chunk.end, rounded);
    round_values(chunk, padded, rounded);
    size_t first_query = (size_t(task.kv_head) * run.rows + sequence.row + task.t0) * group;
    int length = query_length(dims) / 2;
    each_tile(int(task.rows), [&](int t, auto n) {
        float scores[n * KEYS], weight_scales[n];
        int32_t weights[n * KEYS / 2];
        const int32_t *queries = &shared.queries.numbers[(first_query + t) * length];
        const float *query_scales = &shared.queries.scales[first_query + t];
        for (int j = chunk.low / PANEL * PANEL; j < chunk.end; j += PANEL) {
            auto scale = [&](int r, int half, i32x16 sums) INLINED {
                f32x16 scale = load<f32x16>(rounded.key_scales + j + half * 16) * query_scales[r];
                store(scores + r * KEYS + j + half * 16, to_float(sums) * scale);
            };
            multiply_pairs<n>(queries, length, rounded.keys + j * pairs, pairs, scale);
        }
        auto visible = [&](int r) { return Visible(layer, sequence.past + task.t0 + (t + r) / group, start); };
        exponentiate(op, scores, n, chunk.low, chunk.end, visible, to.max + t, to.total + t);
        round_weights(scores, n, rounded.value_scales, chunk.low, chunk.end, (int16_t *)weights, weight_scales);
        int low = chunk.low / 2, count = (chunk.end + 1) / 2 - low;
        for (int d = 0; d < padded; d += PANEL) {
            auto scale = [&](int r, int half, i32x16 sums) INLINED {
                store(to.out + size_t(t + r) * padded + d + half * 16, to_float(sums) * weight_scales[r]);
            };
            const int32_t *values = rounded.values + d * KEYS / 2 + low * PANEL;
            multiply_pairs<n>(weights + low, KEYS / 2, values, count, scale);
        }
    });
}

} // namespace
