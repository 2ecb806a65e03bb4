// Attention over the cached keys and values, in chunks of KEYS positions that are counted from position 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "linear.h"
#include "structs.h"
#include "vectors.h"

namespace {

// A position's numbers as the cache has them: fp32, bf16, or int8 with their fp32 scale behind them.
int row_size(const float *, int dims) { return dims; }
int row_size(const uint16_t *, int dims) { return dims; }
int row_size(const int8_t *, int dims) { return dims + 4; }

// 16 numbers of a row from d on
f32x16 read_row(const float *row, int d, int) { return load<f32x16>(row + d); }
f32x16 read_row(const uint16_t *row, int d, int) { return bfloat_to_float(load<u16x16>(row + d)); }
f32x16 read_row(const int8_t *row, int d, int dims) {
    return __builtin_convertvector(widen(load<i8x16>(row + d)), f32x16) * load<float>(row + dims);
}

void write_row(float *row, const float *from, int dims) { std::memcpy(row, from, dims * sizeof(float)); }
void write_row(uint16_t *row, const float *from, int dims) { // to nearest, ties to even
    for (int d = 0; d < dims; d++) {
        uint32_t bits;
        std::memcpy(&bits, from + d, 4);
        row[d] = from[d] == from[d] ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
    }
}
void write_row(int8_t *row, const float *from, int dims) { // the largest is 127 scales
    float most = 0;
    for (int d = 0; d < dims; d++) most = std::fabs(from[d]) <= most || most != most ? most : std::fabs(from[d]);
    float scale = most / 127, inverse = most > 0 ? 127 / most : 0;
    for (int d = 0; d < dims; d++) row[d] = most == most ? int8_t(std::nearbyint(from[d] * inverse)) : 0;
    std::memcpy(row + dims, &scale, sizeof scale);
}

// KEYS positions of a head, `dims` numbers each, in rows from `keys` and `values`, of which [low, end) are there.
template <class T> struct Chunk {
    const T *keys, *values;
    int dims, row, low, end;

    // 16 numbers of a row from dimension d, zeros behind its end
    f32x16 part(const T *at, int d) const {
        if (d + 16 <= dims) return read_row(at, d, dims);
        T room[32] = {}; // with what stands behind the numbers
        std::memcpy(room, at + d, (row - d) * sizeof(T));
        f32x16 v = read_row(room, 0, dims - d);
        for (int i = dims - d; i < 16; i++) v[i] = 0;
        return v;
    }

    // Turned into a panel for each 32 keys, [D][32]; sixteen of which none is there are left out. Meanwhile the `next`
    // chunk is on its way.
    void turn_keys(float *to, const Chunk &next) const {
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

    // (KEYS, stride), whose rows are whole panels: the cache itself if it can be, else a copy in `room`
    const float *rows_of_values(float *room, int *stride) const {
        *stride = dims;
        if (std::is_same<T, float>::value && dims % PANEL == 0) return (const float *)values;
        *stride = (dims + PANEL - 1) / PANEL * PANEL;
        for (int j = low; j < end; j++)
            for (int d = 0; d < *stride; d += 16)
                store(room + j * *stride + d, d < dims ? part(values + j * row, d) : f32x16{});
        return room;
    }
};

// What some queries see of some positions: weights are exp(score - most). (R, padded) outputs.
struct Part {
    float *most, *total, *out;
};

// Not inlined: copies could be compiled to round differently.
__attribute__((noinline)) void merge(float *most, float *total, float *out, float other_most, float other_total,
                                     const float *other, int dims) {
    if (other_most == -INFINITY) return; // it sees nothing of these
    if (*most == -INFINITY) {
        *most = other_most, *total = other_total;
        std::memcpy(out, other, dims * sizeof(float));
        return;
    }
    float both = std::max(*most, other_most);
    f32x16 scales{};
    scales[0] = *most - both, scales[1] = other_most - both;
    scales = exp_of(scales);
    float a = scales[0], b = scales[1];
    for (int d = 0; d < dims; d++) out[d] = out[d] * a + other[d] * b;
    *total = *total * a + other_total * b, *most = both;
}

// The KEYS positions from `start` that a task's queries see.
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

// Attention of a task's queries to a chunk from position `start`. Rows of `part` go by token, then head.
template <class T>
void attend_part(const Op &op, const Run &run, const Task &task, int64_t start, const Chunk<T> &next, Part part) {
    const Sequence &sequence = run.sequences[task.sequence];
    const Layer &layer = sequence.layers[op.layer];
    int kv_head = task.kv_head, dims = op.width, shared = op.heads / op.kv_heads, rows = (task.t1 - task.t0) * shared;
    int64_t oldest = sequence.past + task.t0; // the position of the first query
    int padded = (dims + PANEL - 1) / PANEL * PANEL, width = run.widths[op.src];
    resize(panel_room, size_t(KEYS) * (dims + padded) + size_t(rows) * KEYS);
    float *keys = panel_room.data(), *copied = keys + KEYS * dims, *scores = copied + KEYS * padded;
    Chunk<T> chunk = chunk_of<T>(op, run, task, start);
    chunk.turn_keys(keys, next);
    int stride;
    const float *values = chunk.rows_of_values(copied, &stride);
    const float *queries = run.slots[op.src] + size_t(sequence.row + task.t0) * width + kv_head * shared * dims;
    for (int r = 0; r < rows; r += TILE) {
        int n = std::min(TILE, rows - r);
        const float *x[TILE];
        float *y[TILE];
        for (int i = 0; i < n; i++) x[i] = queries + size_t((r + i) / shared) * width + (r + i) % shared * dims;
        for (int half = chunk.low / PANEL; half * PANEL < chunk.end; half++) {
            for (int i = 0; i < n; i++) y[i] = scores + (r + i) * KEYS + half * PANEL;
            multiply_rows(n, x, keys + half * dims * PANEL, PANEL, dims, y);
        }
    }
    for (int r = 0; r < rows; r++) {
        float *score = scores + r * KEYS;
        int64_t here = oldest + r / shared;
        int64_t first = layer.window ? std::max<int64_t>(0, here - layer.window + 1) : 0;
        float slope = run.slopes ? run.slopes[kv_head * shared + r % shared] : 0;
        f32x16 most = splat(-INFINITY), total{};
        for (int j = chunk.low / 16 * 16; j < chunk.end; j += 16) {
            f32x16 s = load<f32x16>(score + j) * op.scale;
            if (op.softcap > 0)
                for (int i = 0; i < 16; i++) s[i] = op.softcap * std::tanh(s[i] / op.softcap);
            if (run.slopes)
                for (int i = 0; i < 16; i++) s[i] -= slope * float(here - (start + j + i));
            if (start + j < first || start + j + 15 > here)
                for (int i = 0; i < 16; i++)
                    if (start + j + i < first || start + j + i > here) s[i] = -INFINITY;
            store(score + j, s);
            most = larger(most, s);
        }
        float peak = largest(most);
        for (int j = chunk.low / 16 * 16; j < chunk.end; j += 16) {
            f32x16 s = load<f32x16>(score + j), p = peak == -INFINITY ? f32x16{} : exp_of(s - peak);
            p = s == s ? p : s; // what is not a number makes the sum none: a comparison would lose it
            store(score + j, p);
            total += p;
        }
        part.total[r] = sum(total);
        part.most[r] = part.total[r] == part.total[r] ? peak : 0;
    }
    for (int r = 0; r < rows; r += TILE) {
        int n = std::min(TILE, rows - r);
        const float *x[TILE];
        float *y[TILE];
        for (int i = 0; i < n; i++) x[i] = scores + (r + i) * KEYS + chunk.low;
        for (int d = 0; d < padded; d += PANEL) {
            for (int i = 0; i < n; i++) y[i] = part.out + size_t(r + i) * padded + d;
            multiply_rows(n, x, values + chunk.low * stride + d, stride, chunk.end - chunk.low, y);
        }
    }
}

// Divides attention into tasks. A sequence with few queries is one task for each key head, whose chunks of positions
// threads divide; one with many is a task for each tile of queries. The order of sums is the same.
void plan(const Op &op, const Run &run, Shared &shared) {
    int group = op.heads / op.kv_heads, padded = (op.width + PANEL - 1) / PANEL * PANEL;
    size_t room = 0;
    shared.split.clear(), shared.whole.clear(), shared.chunks.clear(), shared.most_rows = 0;
    for (int s = 0; s < run.sequence_count; s++) {
        const Sequence &sequence = run.sequences[s];
        int64_t window = sequence.layers[op.layer].window;
        bool few = sequence.tokens <= 2 * TILE;
        int tile = few ? sequence.tokens : QUERIES;
        for (int t0 = 0; t0 < sequence.tokens; t0 += tile) {
            int t1 = std::min(t0 + tile, sequence.tokens);
            int64_t from = window ? std::max<int64_t>(0, sequence.past + t0 - window + 1) / KEYS : 0;
            int64_t chunks = (sequence.past + t1 + KEYS - 1) / KEYS - from;
            int rows = (t1 - t0) * group;
            for (int h = 0; h < op.kv_heads; h++) {
                (few ? shared.split : shared.whole).push_back({s, h, t0, t1, from, chunks, room});
                if (!few) continue;
                for (int64_t c = 0; c < chunks; c++)
                    shared.chunks.emplace_back(int32_t(shared.split.size() - 1), int32_t(c));
                room += size_t(rows) * (padded + 2) * chunks, shared.most_rows = std::max(shared.most_rows, rows);
            }
        }
    }
    resize(shared.parts, room);
    // Later queries see more: the long tasks come first.
    std::stable_sort(shared.whole.begin(), shared.whole.end(),
                     [](const Task &a, const Task &b) { return a.chunks > b.chunks; });
}

// src: queries, other: keys, third: values. Stores keys and values in the cache, then dst = what the queries see.
template <class T> void attend(const Op &op, const Run &run, Shared &shared) {
    int dims = op.width, group = op.heads / op.kv_heads, padded = (dims + PANEL - 1) / PANEL * PANEL;
    int key_width = run.widths[op.other];
    plan(op, run, shared);
    shared.threads->each(run.rows, int64_t(op.kv_heads) * dims, [&](int r) {
        const Sequence &sequence = run.sequences[shared.owners[r]];
        const Layer &layer = sequence.layers[op.layer];
        int64_t at = (sequence.past + r - sequence.row - layer.first) * row_size((T *)nullptr, dims);
        for (int h = 0; h < op.kv_heads; h++) {
            const float *key = run.slots[op.other] + size_t(r) * key_width + h * dims;
            const float *value = run.slots[op.third] + size_t(r) * key_width + h * dims;
            write_row((T *)layer.keys + h * layer.key_head + at, key, dims);
            write_row((T *)layer.values + h * layer.value_head + at, value, dims);
        }
    });
    auto part_at = [&](float *room, size_t rows) { return Part{room, room + rows, room + 2 * rows}; };
    auto finish = [&](const Task &task, const Part &part, int r) {
        size_t row = run.sequences[task.sequence].row + task.t0 + r / group;
        float *to = run.slots[op.dst] + row * run.widths[op.dst] + (task.kv_head * group + r % group) * dims;
        const float *out = part.out + size_t(r) * padded;
        for (int d = 0; d < dims; d++) to[d] = out[d] / part.total[r];
    };
    auto merge_row = [&](const Part &sum, const Part &next, int r) {
        merge(sum.most + r, sum.total + r, sum.out + size_t(r) * padded, next.most[r], next.total[r],
              next.out + size_t(r) * padded, padded);
    };
    auto rows_of = [&](const Task &task) { return size_t(task.t1 - task.t0) * group; };
    auto chunk_at = [&](const Task &task, int64_t c) {
        size_t rows = rows_of(task);
        return part_at(&shared.parts[task.room + rows * (padded + 2) * c], rows);
    };
    int chunks = int(shared.chunks.size()), whole = int(shared.whole.size()), most = shared.most_rows;
    int64_t chunk_cost = int64_t(2) * KEYS * dims;
    shared.threads->each(whole, QUERIES * group * chunk_cost, [&](int i) {
        const Task &task = shared.whole[i];
        size_t rows = rows_of(task), room = rows * (padded + 2);
        resize(tile_room, 2 * room);
        Part sum = part_at(tile_room.data(), rows), next = part_at(tile_room.data() + room, rows);
        std::fill(sum.most, sum.most + rows, -INFINITY);
        for (int64_t c = 0; c < task.chunks; c++) {
            Chunk<T> coming = chunk_of<T>(op, run, task, (task.from + std::min(c + 1, task.chunks - 1)) * KEYS);
            attend_part(op, run, task, (task.from + c) * KEYS, coming, next);
            for (size_t r = 0; r < rows; r++) merge_row(sum, next, r);
        }
        for (size_t r = 0; r < rows; r++) finish(task, sum, r);
    });
    shared.threads->each(chunks, most * chunk_cost, [&](int i) {
        auto [t, c] = shared.chunks[i];
        auto [next_t, next_c] = shared.chunks[std::min(i + 1, chunks - 1)];
        const Task &task = shared.split[t], &next = shared.split[next_t];
        Chunk<T> coming = chunk_of<T>(op, run, next, (next.from + next_c) * KEYS);
        attend_part(op, run, task, (task.from + c) * KEYS, coming, chunk_at(task, c));
    });
    int rows = int(shared.split.size()) * most;
    int64_t each_merges = rows ? chunks / int(shared.split.size()) : 0;
    shared.threads->each(rows, each_merges * padded, [&](int i) {
        const Task &task = shared.split[i / most];
        int r = i % most;
        if (r >= int(rows_of(task))) return;
        Part sum = chunk_at(task, 0);
        for (int64_t c = 1; c < task.chunks; c++) merge_row(sum, chunk_at(task, c), r);
        finish(task, sum, r);
    });
}

} // namespace
