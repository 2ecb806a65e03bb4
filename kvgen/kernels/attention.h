// Attention over the cache, chunk by chunk.
#pragma once

#include "rounded_attention.h"

namespace {

// Attention of a task's queries to the chunk from position `start`. Rows of `to` are ordered by token, then head.
template <class T>
void attend_chunk(const Op &op, const Run &run, Shared &shared, const Task &task, int64_t start, Partial to) {
    if (run.activation_bits == 8) return attend_rounded<T>(op, run, shared, task, start, to);
    const Sequence &sequence = run.sequences[task.sequence];
    const Layer &layer = sequence.layers[op.layer];
    int dims = op.width, padded = padded_width(op), width = run.widths[op.src];
    int group = op.heads / op.kv_heads, rows = int(task.rows);
    resize(panel_buffer, size_t(KEYS) * (dims + padded) + size_t(rows) * KEYS);
    float *keys = panel_buffer.data(), *copied = keys + KEYS * dims, *scores = copied + KEYS * padded;
    Chunk<T> chunk = chunk_of<T>(op, run, task, start);
    chunk.pack_keys(keys);
    int stride;
    const float *values = chunk.unpack_values(copied, &stride);
    const float *queries = run.slots[op.src] + size_t(sequence.row + task.t0) * width + task.kv_head * group * dims;
    auto query = [&](int r) { return queries + size_t(r / group) * width + r % group * dims; };
    for (int j = chunk.low / PANEL * PANEL; j < chunk.end; j += PANEL)
        multiply_rows(rows, query, keys + j * dims, PANEL, dims, [&](int r) { return scores + r * KEYS + j; });
    auto visible = [&](int r) { return Visible(layer, sequence.past + task.t0 + r / group, start); };
    exponentiate(op, scores, rows, chunk.low, chunk.end, visible, to.max, to.total);
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
        int tile = few ? sequence.tokens : std::max(FEW, QUERIES / group);
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
    if (run.activation_bits == 8) round_queries(op, run, shared);
    auto finish = [&](const Task &task, const Partial &part, int r) {
        size_t row = run.sequences[task.sequence].row + task.t0 + r / group;
        int head = task.kv_head * group + r % group;
        float *to = run.slots[op.dst] + row * run.widths[op.dst] + head * dims;
        const float *out = part.out + size_t(r) * padded;
        float total = part.total[r];
        if (op.vector) total += exp2_of(splat(std::min(127.0f, op.vector[head] * LOG2_E - part.max[r])))[0];
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
    shared.threads->each(whole, QUERIES * chunk_cost, [&](int i) {
        const Task &task = shared.whole[i];
        size_t rows = task.rows, size = rows * (padded + 2);
        resize(tile_buffer, 2 * size);
        Partial sum(tile_buffer.data(), rows), next(tile_buffer.data() + size, rows);
        std::fill(sum.max, sum.max + rows, -INFINITY);
        for (int64_t c = 0; c < task.chunks; c++) {
            attend_chunk<T>(op, run, shared, task, (task.from + c) * KEYS, next);
            for (size_t r = 0; r < rows; r++) merge_row(sum, next, r);
        }
        for (size_t r = 0; r < rows; r++) finish(task, sum, r);
    });
    shared.threads->each(chunks, max_rows * chunk_cost, [&](int i) {
        auto [t, c] = shared.chunks[i];
        const Task &task = shared.split[t];
        attend_chunk<T>(op, run, shared, task, (task.from + c) * KEYS, partial_of(task, c));
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
