// Attention over the cache, in chunks of KEYS positions that start at multiples of KEYS.
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
        if (d + 16 <= dims) return read_row(at, d, dims);
        T padded[32] = {}; // includes the scale after the numbers
        std::memcpy(padded, at + d, (row - d) * sizeof(T));
        f32x16 v = read_row(padded, 0, dims - d);
        return load_some((const float *)&v, dims - d);
    }

    // Transposes keys into a panel [D][32] for each 32 of them, skipping empty blocks of 16, and prefetches `next`.
    void pack_keys(float *to, const Chunk &next) const {
        for (int j = low / 16 * 16; j < end; j += 16) {
            const T *key = keys + j * row;
            bool whole = j >= low && j + 16 <= end;
            for (int d = 0; d < dims; d += 16) {
                f32x16 m[16];
                for (int i = 0; i < 16; i++) {
                    if (d * sizeof(T) % 64 == 0 && j + i < next.end) {
                        __builtin_prefetch(next.keys + (j + i) * row + d);
                        __builtin_prefetch(next.values + (j + i) * row + d);
                    }
                    m[i] = whole || (j + i >= low && j + i < end) ? part(key + i * row, d) : f32x16{};
                }
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

// Attention of R rows to some of the positions, as in flash attention: the largest score, the sum of exp(score - max),
// and the sum of values weighted by it, (R, padded).
struct Partial {
    float *max, *total, *out;
    Partial(float *at, size_t rows) : max(at), total(at + rows), out(at + 2 * rows) {}
};

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
    float a = exp_of(splat(*max - both))[0], b = exp_of(splat(other_max - both))[0];
    for (int d = 0; d < dims; d++) out[d] = out[d] * a + other[d] * b;
    *total = *total * a + other_total * b, *max = both;
}

// The chunk of positions from `start` that a task's queries attend to.
template <class T> Chunk<T> chunk_of(const Op &op, const Run &run, const Task &task, int64_t start) {
    const Sequence &sequence = run.sequences[task.sequence];
    const Layer &layer = sequence.layers[op.layer];
    int64_t first = layer.window ? std::max(layer.first, sequence.past + task.t0 - layer.window + 1) : layer.first;
    int row = row_size((const T *)nullptr, op.width);
    int64_t at = (start - layer.first) * row;
    return {(const T *)layer.keys + task.kv_head * layer.key_head + at,
            (const T *)layer.values + task.kv_head * layer.value_head + at,
            op.width,
            row,
            int(std::clamp<int64_t>(first - start, 0, KEYS)),
            int(std::min<int64_t>(sequence.past + sequence.tokens - start, KEYS))};
}

// Turns a row of scores into exp(score - max); returns max and the sum. The query at `position` attends to keys from
// position `first`.
void exponentiate(const Op &op, float *score, int64_t start, int low, int end, int64_t first, int64_t position,
                  float *max, float *total) {
    const i32x16 lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    f32x16 maxima = splat(-INFINITY), sums{};
    for (int j = low / 16 * 16; j < end; j += 16) {
        f32x16 s = load<f32x16>(score + j) * op.scale;
        if (op.softcap > 0) s = op.softcap * tanh_of(s / op.softcap);
        if (start + j < first || start + j + 15 > position) {
            i32x16 visible = (lane >= int32_t(first - start - j)) & (lane <= int32_t(position - start - j));
            s = choose(visible, s, splat(-INFINITY));
        }
        store(score + j, s);
        maxima = larger(maxima, s);
    }
    float peak = largest(maxima);
    for (int j = low / 16 * 16; j < end; j += 16) {
        f32x16 s = load<f32x16>(score + j), p = peak == -INFINITY ? f32x16{} : exp_of(s - peak);
        p = choose(s == s, p, s); // keep NaN, which comparisons lose
        store(score + j, p);
        sums += p;
    }
    *total = sum(sums);
    *max = *total == *total ? peak : 0;
}

// Attention of a task's queries to the chunk from position `start`. Rows of `to` are ordered by token, then head.
template <class T>
void attend_chunk(const Op &op, const Run &run, const Task &task, int64_t start, const Chunk<T> &next, Partial to) {
    const Sequence &sequence = run.sequences[task.sequence];
    const Layer &layer = sequence.layers[op.layer];
    int dims = op.width, padded = padded_width(op), width = run.widths[op.src];
    int group = op.heads / op.kv_heads, rows = int(task.rows);
    resize(panel_buffer, size_t(KEYS) * (dims + padded) + size_t(rows) * KEYS);
    float *keys = panel_buffer.data(), *copied = keys + KEYS * dims, *scores = copied + KEYS * padded;
    Chunk<T> chunk = chunk_of<T>(op, run, task, start);
    chunk.pack_keys(keys, next);
    int stride;
    const float *values = chunk.unpack_values(copied, &stride);
    const float *queries = run.slots[op.src] + size_t(sequence.row + task.t0) * width + task.kv_head * group * dims;
    auto query = [&](int r) { return queries + size_t(r / group) * width + r % group * dims; };
    for (int j = chunk.low / PANEL * PANEL; j < chunk.end; j += PANEL)
        multiply_rows(rows, query, keys + j * dims, PANEL, dims, [&](int r) { return scores + r * KEYS + j; });
    for (int r = 0; r < rows; r++) {
        int64_t position = sequence.past + task.t0 + r / group;
        int64_t first = layer.window ? std::max<int64_t>(0, position - layer.window + 1) : 0;
        exponentiate(op, scores + r * KEYS, start, chunk.low, chunk.end, first, position, to.max + r, to.total + r);
    }
    auto weights = [&](int r) { return scores + r * KEYS + chunk.low; };
    for (int d = 0; d < padded; d += PANEL)
        multiply_rows(rows, weights, values + chunk.low * stride + d, stride, chunk.end - chunk.low,
                      [&](int r) { return to.out + size_t(r) * padded + d; });
}

// Divides attention into tasks: for a sequence with few queries, one per key head, whose chunks are divided among
// threads; for one with many, one per key head and tile of queries. Sums have the same order in both cases.
void plan(const Op &op, const Run &run, Shared &shared) {
    int group = op.heads / op.kv_heads, padded = padded_width(op);
    size_t offset = 0;
    shared.split.clear(), shared.whole.clear(), shared.chunks.clear(), shared.max_rows = 0;
    for (int s = 0; s < run.sequence_count; s++) {
        const Sequence &sequence = run.sequences[s];
        int64_t window = sequence.layers[op.layer].window;
        bool few = sequence.tokens <= FEW;
        int tile = few ? sequence.tokens : QUERIES;
        for (int t0 = 0; t0 < sequence.tokens; t0 += tile) {
            int t1 = std::min(t0 + tile, sequence.tokens);
            int64_t from = window ? std::max<int64_t>(0, sequence.past + t0 - window + 1) / KEYS : 0;
            int64_t chunks = (sequence.past + t1 + KEYS - 1) / KEYS - from;
            size_t rows = size_t(t1 - t0) * group;
            for (int h = 0; h < op.kv_heads; h++) {
                (few ? shared.split : shared.whole).push_back({s, h, t0, t1, from, chunks, rows, offset});
                if (!few) continue;
                for (int64_t c = 0; c < chunks; c++)
                    shared.chunks.emplace_back(int32_t(shared.split.size() - 1), int32_t(c));
                offset += rows * (padded + 2) * chunks, shared.max_rows = std::max(shared.max_rows, int(rows));
            }
        }
    }
    resize(shared.partials, offset);
    // Later queries attend to more positions: start the long tasks first.
    std::stable_sort(shared.whole.begin(), shared.whole.end(),
                     [](const Task &a, const Task &b) { return a.chunks > b.chunks; });
}

// Writes the new keys and values to the cache.
template <class T> void append_to_cache(const Op &op, const Run &run, Shared &shared) {
    int dims = op.width, width = run.widths[op.other];
    shared.threads->each(run.rows, int64_t(op.kv_heads) * dims, [&](int r) {
        const Sequence &sequence = run.sequences[shared.owners[r]];
        const Layer &layer = sequence.layers[op.layer];
        int64_t at = (sequence.past + r - sequence.row - layer.first) * row_size((T *)nullptr, dims);
        for (int h = 0; h < op.kv_heads; h++) {
            size_t from = size_t(r) * width + h * dims;
            write_row((T *)layer.keys + h * layer.key_head + at, run.slots[op.other] + from, dims);
            write_row((T *)layer.values + h * layer.value_head + at, run.slots[op.third] + from, dims);
        }
    });
}

// dst = attention of queries (src) to the cache, after appending keys (other) and values (third) to it. op.vector: the
// scores of sinks, (heads,), or null.
template <class T> void attend(const Op &op, const Run &run, Shared &shared) {
    int dims = op.width, group = op.heads / op.kv_heads, padded = padded_width(op);
    plan(op, run, shared);
    append_to_cache<T>(op, run, shared);
    auto finish = [&](const Task &task, const Partial &part, int r) {
        size_t row = run.sequences[task.sequence].row + task.t0 + r / group;
        int head = task.kv_head * group + r % group;
        float *to = run.slots[op.dst] + row * run.widths[op.dst] + head * dims;
        const float *out = part.out + size_t(r) * padded;
        float sink = op.vector ? exp_of(splat(op.vector[head] - part.max[r]))[0] : 0.0f, total = part.total[r] + sink;
        for (int d = 0; d < dims; d++) to[d] = out[d] / total;
    };
    auto merge_row = [&](const Partial &sum, const Partial &next, int r) {
        merge(sum.max + r, sum.total + r, sum.out + size_t(r) * padded, next.max[r], next.total[r],
              next.out + size_t(r) * padded, padded);
    };
    auto partial_of = [&](const Task &task, int64_t c) {
        return Partial(&shared.partials[task.offset + task.rows * (padded + 2) * c], task.rows);
    };
    int chunks = int(shared.chunks.size()), whole = int(shared.whole.size()), max_rows = shared.max_rows;
    int64_t chunk_cost = int64_t(2) * KEYS * dims;
    shared.threads->each(whole, QUERIES * group * chunk_cost, [&](int i) {
        const Task &task = shared.whole[i];
        size_t rows = task.rows, size = rows * (padded + 2);
        resize(tile_buffer, 2 * size);
        Partial sum(tile_buffer.data(), rows), next(tile_buffer.data() + size, rows);
        std::fill(sum.max, sum.max + rows, -INFINITY);
        for (int64_t c = 0; c < task.chunks; c++) {
            Chunk<T> coming = chunk_of<T>(op, run, task, (task.from + std::min(c + 1, task.chunks - 1)) * KEYS);
            attend_chunk(op, run, task, (task.from + c) * KEYS, coming, next);
            for (size_t r = 0; r < rows; r++) merge_row(sum, next, r);
        }
        for (size_t r = 0; r < rows; r++) finish(task, sum, r);
    });
    shared.threads->each(chunks, max_rows * chunk_cost, [&](int i) {
        auto [t, c] = shared.chunks[i];
        auto [next_t, next_c] = shared.chunks[std::min(i + 1, chunks - 1)];
        const Task &task = shared.split[t], &next = shared.split[next_t];
        Chunk<T> coming = chunk_of<T>(op, run, next, (next.from + next_c) * KEYS);
        attend_chunk(op, run, task, (task.from + c) * KEYS, coming, partial_of(task, c));
    });
    int rows = int(shared.split.size()) * max_rows;
    int64_t merges = rows ? chunks / int(shared.split.size()) : 0; // per row
    shared.threads->each(rows, merges * padded, [&](int i) {
        const Task &task = shared.split[i / max_rows];
        int r = i % max_rows;
        if (r >= int(task.rows)) return;
        Partial sum = partial_of(task, 0);
        for (int64_t c = 1; c < task.chunks; c++) merge_row(sum, partial_of(task, c), r);
        finish(task, sum, r);
    });
}

} // namespace
