// The input of the kernels, mirrored by structs.py, and their state between operations.
#pragma once

#include "functions.h"
#include "threads.h"

namespace {

constexpr int PANEL = 32;   // interleaved rows of a weight: two halves of a vector each
constexpr int TILE = ACCUMULATORS / std::max(PARTS, 2); // input rows multiplied at once, at most
constexpr int TOKENS = 128; // input rows per panel of a weight: few enough for a core's cache
constexpr int KEYS = 64;    // cached positions attended to at once; chunks start at multiples of 64
constexpr int FEW = 12;     // tokens of a sequence whose attention is divided among threads by chunks, at most
constexpr int QUERIES = 192; // queries that share a chunk of packed keys, roughly

// Calls f(first, n) for tiles of `count` input rows; n is a compile-time constant.
template <class F> void each_tile(int count, const F &f) {
    auto tile = [&](int first, auto n) INLINED { return f(first, n), first + n; };
    for (int t = 0; t < count;) {
        int left = count - t;
        if (left >= TILE) t = tile(t, std::integral_constant<int, TILE>());
        else if (left >= 6) t = tile(t, std::integral_constant<int, 6>());
        else if (left >= 4) t = tile(t, std::integral_constant<int, 4>());
        else if (left == 3) t = tile(t, std::integral_constant<int, 3>());
        else if (left == 2) t = tile(t, std::integral_constant<int, 2>());
        else t = tile(t, std::integral_constant<int, 1>());
    }
}

// Halves of a panel multiplied at once with n input rows.
constexpr int halves_of(int n) { return n * 2 * PARTS <= ACCUMULATORS ? 2 : 1; }

enum Kind { F32, BF16, F16, INT4, INT8, CODED4, INT5 };

struct Weight { // or one for each expert, each of whole panels
    int32_t kind, rows, cols, group; // group: columns that share a scale, 16 or 32
    int32_t wide;                    // scales are fp32, not fp16
    const void *codes, *scales, *mins;
    uint8_t values[16]; // of CODED4: what its codes stand for, plus 128; of INT5: what code 0 stands for, plus 128
};

enum OpKind { NORM, LINEAR, ROTATE, ATTEND, ACTIVATE, ADD, ROUTE, COMBINE, CONVOLVE, SCAN, DELTA };
enum Flag { ACCUMULATE = 1, SAME_INPUT = 2, ROUTED = 4, GATHER = 8 };
enum Scores { SOFTMAX, SOFTMAX_OF_CHOSEN, SIGMOID };

struct Router { // chooses experts for each row; see `Router` in kvgen/model/ffns.py
    int32_t experts, active, scores, normalize, groups, active_groups, group_top;
    float smallest_sum, added_to_sum, scale;
    const float *selection; // added to scores to choose, (experts,), or null
};

struct Recurrence { // sizes and weights of Mamba2 (groups are key heads) or DeltaNet; see kvgen/model/mixers.py
    int32_t heads, value_dim, key_heads, key_dim;
    float dt_min, dt_max;
    const float *dt, *A, *D; // (heads,) each; D may be null
};

struct Op {
    int32_t kind, src, dst, other, third; // slots, used as the kind requires
    int32_t mode, width, heads, kv_heads, flags;
    int32_t layer;  // of the cache, among those of its kind: attention or recurrent
    int32_t column; // the first that is read of a slot
    float eps, scale, softcap, slope;
    const Weight *weight;
    const float *vector, *bias;
    int64_t vector_size;
    const Router *router;
    const Recurrence *recurrence;
};

enum Stored { STORED_F32, STORED_BF16, STORED_INT8 };

struct Layer { // keys and values of one sequence, (H_kv, capacity, row); entry 0 is position `first`
    char *keys, *values;
    int64_t key_head, value_head; // strides, in numbers
    int64_t first, window;        // window: positions that a query attends to; 0 for all
    int32_t stored;
};

constexpr int STATE_PARTS = 2; // tensors of a recurrent mixer's state, at most

struct Sequence { // its new positions are rows [row, row + tokens) of every buffer
    const Layer *layers;
    float *const *states; // of recurrent mixers, (mixers, pieces + 1, STATE_PARTS): before the pass, after each piece
    const int32_t *ends;  // of pieces: how many of the new positions are before it
    int64_t past;         // positions already in the cache
    int32_t row, tokens, pieces;
};

struct Table { // rotary cosines and sines, (rows, rotated)
    const float *cos, *sin;
    int32_t rotated;
};

struct Run {
    const Op *ops;
    float *const *slots; // (rows, width) each
    const int32_t *widths;
    const Sequence *sequences;
    const Table *tables;
    int32_t count, rows, sequence_count;
    int32_t activation_bits; // of integers that activations are rounded to for integer weights: 16 or 8
};

template <class T> void resize(std::vector<T> &v, size_t size) {
    if (v.size() < size) v.resize(size);
}

thread_local std::vector<float> panel_buffer, tile_buffer;
thread_local std::vector<int32_t> code_buffer;

// Activations as integers, per group: the integers (their order: codes.h), their sum, what one of them stands for, and
// the sum of what they stand for. The last two are `step` numbers apart.
struct Rounded {
    int32_t *numbers, *totals;
    float *scales, *sums;
    int step;
};
struct RoundedRows {
    std::vector<int32_t> numbers, totals;
    std::vector<float> scales, sums;
    void reserve(size_t groups, int length) { // length: of the numbers of a group
        resize(numbers, groups * length), resize(totals, groups), resize(scales, groups), resize(sums, groups);
    }
    Rounded row(size_t row, size_t groups, int length) { // scales and sums are (rows, groups)
        size_t at = row * groups;
        return {&numbers[at * length], &totals[at], &scales[at], &sums[at], 1};
    }
    Rounded row_of_tile(size_t row, size_t groups, int length) { // scales and sums are (rows / 16, groups, 16)
        size_t at = row * groups, first = row / 16 * 16 * groups + row % 16;
        return {&numbers[at * length], &totals[at], &scales[first], &sums[first], 16};
    }
};

// Attention of queries [t0, t1) of a sequence, in the heads of one key head, to `chunks` chunks from chunk `from`.
struct Task {
    int32_t sequence, kv_head, t0, t1;
    int64_t from, chunks;
    size_t rows, offset; // rows: (t1 - t0) * heads; offset: of the results per chunk in Shared::partials
};

// Input rows [first, first + count) of a product with one weight.
struct Segment {
    int32_t first, count, expert;
};

// What the last ROUTE chose. Pairs of a row and one of its experts are computed in the order of experts, then rows.
struct Routes {
    std::vector<int32_t> experts, places; // (rows, active): ascending in each row, and their places in that order
    std::vector<float> weights;           // of the same
    std::vector<int32_t> rows;            // of the pairs, in order
    std::vector<Segment> segments;        // of pairs, in order
};

// Per-process state: threads, and what they share during a run.
struct Shared {
    int process;
    std::mutex busy; // one run at a time
    std::unique_ptr<Threads> threads;
    void use(int count) {
        if (!threads || threads->asked != count) threads.reset(), threads = std::make_unique<Threads>(count);
    }
    std::vector<int32_t> owners; // the sequence of each row
    RoundedRows rounded;
    RoundedRows queries; // (key heads, rows, queries of a key head)
    std::vector<float> partials;
    std::vector<Segment> segments; // of all rows
    Routes routes;
    std::vector<Task> split, whole; // tasks whose chunks are divided among threads; tasks for one thread each
    std::vector<std::pair<int32_t, int32_t>> chunks; // of split tasks: task and chunk
    int32_t max_rows;                                // of a split task
};

} // namespace
