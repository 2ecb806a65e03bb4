// What the kernels are told, mirrored by program.py, packed.py and fused.py; and what they keep between operations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "threads.h"

namespace {

constexpr int PANEL = 32;   // rows of a weight that lie interleaved, two vectors of them
constexpr int TILE = 6;     // activations that are multiplied at once: what fits into 32 registers
constexpr int TOKENS = 120; // activations that meet a panel in turn: few enough for a core's cache
constexpr int KEYS = 64;    // cached positions that are looked at together, from a multiple of 64
constexpr int QUERIES = 32; // tokens whose queries share packed keys

enum Kind { F32, BF16, F16, INT4, INT8 };

struct Weight {
    int32_t kind, rows, cols, group; // group: columns that share a scale, 16 or 32
    int32_t wide;                    // whether scales are fp32, not fp16
    const void *codes, *scales, *mins;
};

enum OpKind { NORM, LINEAR, ROTATE, ATTEND, ACTIVATE, ADD };
enum Flag { ACCUMULATE = 1, SAME_INPUT = 2 };

struct Op {
    int32_t kind, src, dst, other, third; // slots; what they are depends on the kind
    int32_t mode, width, heads, kv_heads, layer, flags;
    float eps, scale, softcap;
    const Weight *weight;
    const float *vector, *bias;
    int64_t vector_size;
};

enum Stored { STORED_F32, STORED_BF16, STORED_INT8 };

struct Layer { // of one sequence's cache: (H_kv, capacity, row), whose entry 0 is the position `first`
    char *keys, *values;
    int64_t key_head, value_head; // strides, in numbers
    int64_t first, window;        // window: positions that a query sees; 0 for all
    int32_t stored;               // what a row is made of
};

struct Sequence { // its new positions are the rows [row, row + tokens) of every buffer
    const Layer *layers;
    int64_t past; // positions in its cache, before these
    int32_t row, tokens;
};

struct Table { // rotary cosines and sines of every row, (rows, rotated)
    const float *cos, *sin;
    int32_t rotated;
};

struct Run {
    const Op *ops;
    float *const *slots; // (rows, width) each
    const int32_t *widths;
    const Sequence *sequences;
    const Table *tables;
    const float *slopes; // of ALiBi, one a head; null for none
    int32_t count, rows, sequence_count;
};

template <class T> void resize(std::vector<T> &v, size_t size) {
    if (v.size() < size) v.resize(size);
}

thread_local std::vector<float> panel_room, tile_room;

// Attention of the queries [t0, t1) of a sequence, of those that share a key head. Its parts, for each chunk of
// positions, are at `room` of what threads share.
struct Task {
    int32_t sequence, kv_head, t0, t1;
    int64_t from, chunks;
    size_t room;
};

// What there is once in a process: threads, and what they share during a run.
struct Shared {
    int process;
    std::mutex busy; // one run at a time
    std::unique_ptr<Threads> threads;
    void use(int count) {
        if (!threads || threads->asked != count) threads.reset(), threads = std::make_unique<Threads>(count);
    }
    std::vector<int32_t> pairs, owners; // owners: the sequence of each row
    std::vector<float> scales, sums, parts;
    std::vector<Task> split, whole; // tasks whose chunks threads divide, and those that one thread does
    std::vector<std::pair<int32_t, int32_t>> chunks; // of the former: task and chunk
    int32_t most_rows;                               // of one of the former
};

} // namespace
