// Chunks of KEYS positions of the cache, which start at multiples of KEYS, and the softmax over them.
#pragma once

#include "linear.h"

namespace {

// Rows of the cache: fp32, bf16, or int8 followed by an fp32 scale.
int row_size(const float *, int dims) { return dims; }
int row_size(const uint16_t *, int dims) { return dims; }
int row_size(const int8_t *, int dims) { return dims + 4; }

// Reads 16 numbers of a row from d.
f32x16 read_row(const float *row, int d, int) { return load<f32x16>(row + d); }
f32x16 read_row(const uint16_t *row, int d, int) { return load_bfloat(row + d); }
f32x16 read_row(const int8_t *row, int d, int dims) { return to_float(load_i8(row + d)) * load<float>(row + dims); }

void write_row(float *row, const float *from, int dims) { std::memcpy(row, from, dims * sizeof(float)); }
void write_row(uint16_t *row, const float *from, int dims) { // to nearest, ties to even
    for (int d = 0; d < dims; d++) {
        uint32_t bits;
        std::memcpy(&bits, from + d, 4);
        row[d] = from[d] == from[d] ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
    }
}
void write_row(int8_t *row, const float *from, int dims) { // the largest magnitude becomes 127; NaN is kept
    float max = 0;
    for (int d = 0; d < dims; d++) max = std::fabs(from[d]) <= max || max != max ? max : std::fabs(from[d]);
    float scale = max / 127, inverse = max > 0 ? 127 / max : 0;
    for (int d = 0; d < dims; d++) row[d] = max == max ? int8_t(std::nearbyint(from[d] * inverse)) : 0;
    std::memcpy(row + dims, &scale, sizeof scale);
}

// KEYS positions of a head, as rows of `dims` numbers at `keys` and `values`; only [low, end) exist.
template <class T> struct Chunk {
    const T *keys, *values;
    int dims, row, low, end;

    // 16 numbers of a row from dimension d, with zeros after its end
    f32x16 part(const T *at, int d) const {
        if (d * sizeof(T) % 64 == 0) fetch_ahead(at + d);
        if (d + 16 <= dims) return read_row(at, d, dims);
        T padded[32] = {}; // includes the scale after the numbers
        std::memcpy(padded, at + d, (row - d) * sizeof(T));
        f32x16 v = read_row(padded, 0, dims - d);
        return load_some((const float *)&v, dims - d);
    }

    // Transposes keys into a panel [D][32] for each 32 of them, skipping empty blocks of 16.
    void pack_keys(float *to) const {
        for (int j = low / 16 * 16; j < end; j += 16) {
            const T *key = keys + j * row;
            bool whole = j >= low && j + 16 <= end;
            for (int d = 0; d < dims; d += 16) {
                f32x16 m[16];
                for (int i = 0; i < 16; i++)
                    m[i] = whole || (j + i >= low && j + i < end) ? part(key + i * row, d) : f32x16{};
                transpose(m);
                float *panel = to + (j / PANEL * dims + d) * PANEL + j % PANEL;
                for (int i = 0; i < 16 && d + i < dims; i++) store(panel + i * PANEL, m[i]);
            }
        }
    }

    // Returns values as (KEYS, stride), in rows of whole panels: the cache itself if possible, else a copy.
    const float *unpack_values(float *copy, int *stride) const {
        *stride = dims;
        if (std::is_same<T, float>::value && dims % PANEL == 0) return (const float *)values;
        *stride = (dims + PANEL - 1) / PANEL * PANEL;
        for (int j = low; j < end; j++)
            for (int d = 0; d < *stride; d += 16)
                store(copy + j * *stride + d, d < dims ? part(values + j * row, d) : f32x16{});
        return copy;
    }
};

// Attention of R rows to some of the positions, as in flash attention, in powers of two: the largest score, rounded up
// to an integer, so that results are merged exactly; the sum of 2^(score - max); and the sum of values weighted by it,
// (R, padded). A score is a product of query and key times log2(e), so that 2^score is its exponential.
struct Partial {
    float *max, *total, *out;
    Partial(float *at, size_t rows) : max(at), total(at + rows), out(at + 2 * rows) {}
};

constexpr float LOG2_E = 1.44269504f;

int padded_width(const Op &op) { return (op.width + PANEL - 1) / PANEL * PANEL; }

// Merges a partial result of later positions into `max, total, out`.
void merge(float *max, float *total, float *out, float other_max, float other_total, const float *other, int dims) {
    if (other_max == -INFINITY) return; // all masked
    if (*max == -INFINITY) {
        *max = other_max, *total = other_total;
        std::memcpy(out, other, dims * sizeof(float));
        return;
    }
    float both = std::max(*max, other_max);
    float a = power_of_two(*max - both), b = power_of_two(other_max - both);
    for (int d = 0; d < dims; d += 16) store(out + d, fma(load<f32x16>(other + d), b, load<f32x16>(out + d) * a));
    *total = *total * a + other_total * b, *max = both;
}

// The oldest position that the query at `position` attends to.
int64_t first_visible(const Layer &layer, int64_t position) {
    return layer.window ? std::max<int64_t>(0, position - layer.window + 1) : 0;
}

// The chunk of positions from `start` that a task's queries attend to.
template <class T> Chunk<T> chunk_of(const Op &op, const Run &run, const Task &task, int64_t start) {
    const Sequence &sequence = run.sequences[task.sequence];
    const Layer &layer = sequence.layers[op.layer];
    int64_t first = std::max(layer.first, first_visible(layer, sequence.past + task.t0));
    int row = row_size((const T *)nullptr, op.width);
    int64_t at = (start - layer.first) * row;
    return {(const T *)layer.keys + task.kv_head * layer.key_head + at,
            (const T *)layer.values + task.kv_head * layer.value_head + at,
            op.width,
            row,
            int(std::clamp<int64_t>(first - start, 0, KEYS)),
            int(std::min<int64_t>(sequence.past + sequence.tokens - start, KEYS))};
}

// The positions that a query attends to, of the chunk from `start`: entries [from, to] of it.
struct Visible {
    int32_t from, to;
    Visible(const Layer &layer, int64_t position, int64_t start)
        : from(int32_t(std::max<int64_t>(first_visible(layer, position) - start, 0))),
          to(int32_t(std::min<int64_t>(position - start, KEYS))) {}
};

// Turns the products of n queries and the keys of a chunk, (n, KEYS), into 2^(score - max), of entries [low, end) in
// whole vectors; returns max and the sum of each row. Loops over all rows hide the latency of each.
template <class Rows>
void exponentiate(const Op &op, float *scores, int n, int low, int end, const Rows &visible, float *max,
                  float *total) {
    const i32x16 lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    low = low / 16 * 16;
    for (int r = 0; r < n; r++) {
        float *score = scores + r * KEYS;
        Visible seen = visible(r);
        f32x16 maxima = splat(-INFINITY);
        for (int j = low; j < end; j += 16) {
            f32x16 s = load<f32x16>(score + j);
            if (op.softcap > 0) s = op.softcap * LOG2_E * tanh_of(s * op.scale / op.softcap);
            else s *= op.scale * LOG2_E;
            if (j < seen.from || j + 15 > seen.to)
                s = choose((lane >= seen.from - j) & (lane <= seen.to - j), s, splat(-INFINITY));
            store(score + j, s);
            maxima = larger(maxima, s);
        }
        max[r] = std::ceil(largest(maxima));
    }
    for (int r = 0; r < n; r++) {
        float *score = scores + r * KEYS, base = max[r] == -INFINITY ? 0 : max[r]; // -inf: all masked
        f32x16 sums{};
        for (int j = low; j < end; j += 16) {
            f32x16 p = exp2_of(load<f32x16>(score + j) - base);
            store(score + j, p);
            sums += p;
        }
        total[r] = sum(sums);
        if (total[r] != total[r]) max[r] = 0;
    }
}

} // namespace
