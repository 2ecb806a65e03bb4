// What the kernels are told, mirrored by program.py, packed.py and fused.py; and what threads keep between operations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

constexpr int PANEL = 32;   // rows of a weight that lie interleaved, two vectors of them
constexpr int TILE = 6;     // activations that are multiplied at once: what fits into 32 registers
constexpr int TOKENS = 120; // activations that share an unpacked panel: few enough for a core's cache
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

struct Layer { // of a cache: (B, H_kv, capacity, row), whose entry 0 is the position `first`
    char *keys, *values;
    int64_t key_batch, key_head, value_batch, value_head; // strides, in numbers
    int64_t first, window;                                // window: positions that a query sees; 0 for all
    int32_t stored;                                       // what a row is made of
};

struct Table { // rotary cosines and sines, (T, rotated)
    const float *cos, *sin;
    int32_t rotated;
};

struct Run {
    const Op *ops;
    float *const *slots; // (B * T, width) each
    const int32_t *widths;
    const Layer *layers;
    const Table *tables;
    const float *slopes; // of ALiBi, one a head; null for none
    int64_t past;        // positions in the cache, before these
    int32_t count, batch, tokens;
};

template <class T> void resize(std::vector<T> &v, size_t size) {
    if (v.size() < size) v.resize(size);
}

thread_local std::vector<float> panel_room, tile_room;
thread_local std::vector<int32_t> codes_room;

// What threads share during a run.
struct Shared {
    std::vector<int32_t> pairs;
    std::vector<float> scales, sums, parts;
};

} // namespace
