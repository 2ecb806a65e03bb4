// The decoder's arithmetic on a CPU: a run of operations over buffers of fp32, on all threads at once.
//
// It knows tensors and no models: what the operations are is the business of program.py, which mirrors the structs
// below. Weights stay as small as the checkpoint has them. An output is summed in one order, whatever stands beside it:
// the logits of a position are the same bits in a prefill, in a step and in a batch, on any number of threads.
//
// Integer weights (groups of 4 or 8 bits with a scale and perhaps a minimum) meet activations that are rounded to 16
// bits in each group, so that products inside a group are exact integers; the rounding is 2^-16 of a group's largest
// activation. All else is fp32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <omp.h>

namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef int16_t i16x32 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef int8_t i8x32 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

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

// ---- vectors ----

template <class V> V load(const void *at) {
    V v;
    std::memcpy(&v, at, sizeof v);
    return v;
}
template <class V> void store(void *at, V v) { std::memcpy(at, &v, sizeof v); }
f32x16 splat(float x) { return x - f32x16{}; }
f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }

// GCC makes of these conversions a dozen instructions where there is one.
i32x16 widen(u16x16 v) {
#if defined(__AVX512F__)
    return (i32x16)_mm512_cvtepu16_epi32((__m256i)v);
#else
    return __builtin_convertvector(v, i32x16);
#endif
}
i32x16 widen(i8x16 v) {
#if defined(__AVX512F__)
    return (i32x16)_mm512_cvtepi8_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, i32x16);
#endif
}
i16x32 widen(i8x32 v) {
#if defined(__AVX512BW__)
    return (i16x32)_mm512_cvtepi8_epi16((__m256i)v);
#else
    return __builtin_convertvector(v, i16x32);
#endif
}

f32x16 half_to_float(u16x16 h) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps((__m256i)h);
#else
    i32x16 x = widen(h);
    return (f32x16)((i32x16)((f32x16)((x & 0x7fff) << 13) * 0x1p112f) | ((x & 0x8000) << 16));
#endif
}

f32x16 bfloat_to_float(u16x16 b) { return (f32x16)(widen(b) << 16); }

// acc + w.low * x.low + w.high * x.high: of pairs of 16-bit integers
i32x16 dot2(i32x16 acc, i32x16 w, i32x16 x) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
    return acc + (i32x16)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
    __m256i a[2], b[2];
    std::memcpy(a, &w, 64), std::memcpy(b, &x, 64);
    a[0] = _mm256_madd_epi16(a[0], b[0]), a[1] = _mm256_madd_epi16(a[1], b[1]);
    return acc + load<i32x16>(a);
#else
    return acc + ((w << 16) >> 16) * ((x << 16) >> 16) + (w >> 16) * (x >> 16);
#endif
}

float sum(f32x16 v) {
    float total = 0;
    for (int i = 0; i < 16; i++) total += v[i];
    return total;
}

// exp to about 2 units in the last place (Cephes' polynomial); 0 below -87
f32x16 exp_of(f32x16 x) {
    f32x16 low = splat(-87.3f), high = splat(88.3f);
    i32x16 keep = x > low;
    x = x > low ? x : low;
    x = x < high ? x : high;
    f32x16 n = x * 1.44269504f;
    i32x16 whole = __builtin_convertvector(n + (n < 0 ? splat(-0.5f) : splat(0.5f)), i32x16);
    n = __builtin_convertvector(whole, f32x16);
    f32x16 r = x - n * 0.693359375f - n * -2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f, p = p * r * r + r + 1.0f;
    return (f32x16)((i32x16)(p * (f32x16)((whole + 127) << 23)) & keep);
}

// rows of 16 become columns, in four rounds that swap blocks of 8, 4, 2 and 1
template <int STEP> inline void swap_blocks(f32x16 m[16]) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const i32x16 low = (lane & STEP) != 0 ? lane + (16 - STEP) : lane, high = low + STEP;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (!(i & STEP)) {
            f32x16 a = m[i], b = m[i + STEP];
            m[i] = __builtin_shuffle(a, b, low), m[i + STEP] = __builtin_shuffle(a, b, high);
        }
}
void transpose(f32x16 m[16]) { swap_blocks<8>(m), swap_blocks<4>(m), swap_blocks<2>(m), swap_blocks<1>(m); }

// ---- products ----

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

void multiply_rows(int n, const float *const *x, const float *panel, int stride, int cols, float *const *out) {
    switch (n) {
    case 1: return multiply<1>(x, panel, stride, cols, out);
    case 2: return multiply<2>(x, panel, stride, cols, out);
    case 3: return multiply<3>(x, panel, stride, cols, out);
    case 4: return multiply<4>(x, panel, stride, cols, out);
    case 5: return multiply<5>(x, panel, stride, cols, out);
    default: return multiply<TILE>(x, panel, stride, cols, out);
    }
}

// Activations as 16-bit integers: of each group its pairs in the order in which the weight's codes come, its scale, the sum.
struct Rounded {
    int32_t *pairs;
    float *scales, *sums;
};

// How a panel's codes are laid out. `pair(g, p, half)`: columns 2p and 2p + 1, as ordered, of 16 rows in group g.
template <int PAIRS> struct Codes4 { // [group][word][row], 8 columns in a word
    const uint32_t *at;
    i32x16 pair(int g, int p, int half) const {
        i32x16 word = load<i32x16>(at + (size_t(g) * (PAIRS / 4) + p / 4) * PANEL + half * 16);
        return (word >> (4 * (p % 4))) & 0x000f000f;
    }
};
template <int PAIRS> struct Codes8 { // [group][pair][row][2]
    const int8_t *at;
    i32x16 pair(int g, int p, int half) const {
        i8x32 bytes = load<i8x32>(at + ((size_t(g) * PAIRS + p) * PANEL + half * 16) * 2);
        return (i32x16)widen(bytes);
    }
};
template <int PAIRS> struct Codes16 { // [group][pair][row], unpacked
    const int32_t *at;
    i32x16 pair(int g, int p, int half) const {
        return load<i32x16>(at + (size_t(g) * PAIRS + p) * PANEL + half * 16);
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
                acc[n][half] += __builtin_convertvector(whole[n][half], f32x16) * (scale * x.scales[size_t(n) * groups + g]);
                if (mins.at) acc[n][half] += min * x.sums[size_t(n) * groups + g];
            }
        }
    }
    for (int n = 0; n < N; n++) store(out[n], acc[n][0]), store(out[n] + 16, acc[n][1]);
}

template <int PAIRS, class C>
void multiply_codes_rows(int n, C codes, Scales scales, Scales mins, int groups, Rounded x, float *const *out) {
    switch (n) {
    case 1: return multiply_codes<1, PAIRS>(codes, scales, mins, groups, x, out);
    case 2: return multiply_codes<2, PAIRS>(codes, scales, mins, groups, x, out);
    case 3: return multiply_codes<3, PAIRS>(codes, scales, mins, groups, x, out);
    case 4: return multiply_codes<4, PAIRS>(codes, scales, mins, groups, x, out);
    case 5: return multiply_codes<5, PAIRS>(codes, scales, mins, groups, x, out);
    default: return multiply_codes<TILE, PAIRS>(codes, scales, mins, groups, x, out);
    }
}

// The column of a group that stands at `half` (0 or 1) of pair p. Nibbles lie as ggml has them: a byte holds columns
// i and i + group / 2.
int column_of(Kind kind, int group, int p, int half) {
    if (kind == INT8) return 2 * p + half;
    return p / 4 * 4 + p % 4 / 2 + 2 * half + (p % 2) * (group / 2);
}

float largest(f32x16 v) {
    float most = v[0];
    for (int i = 1; i < 16; i++) most = std::max(most, v[i]);
    return most;
}

void round_row(const float *x, Kind kind, int group, int groups, Rounded to) {
    int pairs = group / 2;
    i32x16 low{}, high{}; // where in the group the halves of each pair stand
    for (int p = 0; p < pairs; p++) low[p] = column_of(kind, group, p, 0), high[p] = column_of(kind, group, p, 1);
    for (int g = 0; g < groups; g++, x += group) {
        f32x16 a = load<f32x16>(x), b = group == 32 ? load<f32x16>(x + 16) : f32x16{};
        float most = largest(larger(larger(a, -a), larger(b, -b))), inverse = most > 0 ? 32767 / most : 0;
        // Added to 1.5 * 2^23, a number is rounded to a whole one.
        i32x16 c = __builtin_convertvector(a * inverse + 12582912.0f - 12582912.0f, i32x16);
        i32x16 d = __builtin_convertvector(b * inverse + 12582912.0f - 12582912.0f, i32x16);
        i32x16 packed = (__builtin_shuffle(c, d, low) & 0xffff) | __builtin_shuffle(c, d, high) << 16;
        std::memcpy(to.pairs + g * pairs, &packed, pairs * sizeof(int32_t));
        c += d;
        int32_t total = 0;
        for (int i = 0; i < 16; i++) total += c[i];
        to.scales[g] = most / 32767, to.sums[g] = float(total) * to.scales[g];
    }
}

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

template <int PAIRS, class C>
void linear_codes(const Weight &w, C codes, int panel, const Shared &shared, int first, int count, float *out) {
    int groups = w.cols / w.group;
    Scales scales(w.scales, w, panel), mins(w.mins, w, panel);
    Codes16<PAIRS> unpacked{nullptr};
    if (count > 2 * TILE) { // worth unpacking once
        resize(codes_room, size_t(groups) * PAIRS * PANEL);
        for (int g = 0; g < groups; g++)
            for (int p = 0; p < PAIRS; p++)
                for (int half = 0; half < 2; half++)
                    store(&codes_room[(size_t(g) * PAIRS + p) * PANEL + half * 16], codes.pair(g, p, half));
        unpacked.at = codes_room.data();
    }
    for (int t = 0; t < count; t += TILE) {
        size_t group = size_t(first + t) * groups;
        Rounded x{const_cast<int32_t *>(&shared.pairs[group * PAIRS]), const_cast<float *>(&shared.scales[group]),
                  const_cast<float *>(&shared.sums[group])};
        float *rows[TILE];
        int n = std::min(TILE, count - t);
        for (int i = 0; i < n; i++) rows[i] = out + (t + i) * PANEL;
        if (unpacked.at) multiply_codes_rows<PAIRS>(n, unpacked, scales, mins, groups, x, rows);
        else multiply_codes_rows<PAIRS>(n, codes, scales, mins, groups, x, rows);
    }
}

const float *unpack_panel(const Weight &w, int panel) {
    size_t start = size_t(panel) * w.cols * PANEL;
    if (w.kind == F32) return (const float *)w.codes + start;
    resize(panel_room, size_t(w.cols) * PANEL);
    const uint16_t *from = (const uint16_t *)w.codes + start;
    for (size_t i = 0; i < size_t(w.cols) * PANEL; i += 16) {
        u16x16 v = load<u16x16>(from + i);
        store(&panel_room[i], w.kind == BF16 ? bfloat_to_float(v) : half_to_float(v));
    }
    return panel_room.data();
}

// One panel of x W^T for `count` rows of x from `first`: out is (count, PANEL).
void linear_panel(const Weight &w, int panel, const float *x, const Shared &shared, int first, int count, float *out) {
    size_t numbers = size_t(panel) * w.cols * PANEL;
    if (w.kind == INT4) {
        const uint32_t *at = (const uint32_t *)w.codes + numbers / 8;
        if (w.group == 32) linear_codes<16>(w, Codes4<16>{at}, panel, shared, first, count, out);
        else linear_codes<8>(w, Codes4<8>{at}, panel, shared, first, count, out);
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
            for (int i = 0; i < n; i++) rows[i] = x + size_t(first + t + i) * w.cols, outs[i] = out + (t + i) * PANEL;
            multiply_rows(n, rows, unpacked, PANEL, w.cols, outs);
        }
    }
}

// ---- operations; each is called by all threads and divides its work among them ----

// dst = scale * (src W^T + bias), or that added to dst
void linear(const Op &op, const Run &run, Shared &shared) {
    const Weight &w = *op.weight;
    const float *x = run.slots[op.src];
    float *y = run.slots[op.dst];
    int rows = run.batch * run.tokens, panels = (w.rows + PANEL - 1) / PANEL, width = run.widths[op.dst];
    if (w.kind >= INT4 && !(op.flags & SAME_INPUT)) {
        int groups = w.cols / w.group;
#pragma omp single
        {
            resize(shared.pairs, size_t(rows) * w.cols / 2);
            resize(shared.scales, size_t(rows) * groups), resize(shared.sums, size_t(rows) * groups);
        }
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r++) {
            Rounded to{&shared.pairs[size_t(r) * w.cols / 2], &shared.scales[size_t(r) * groups],
                       &shared.sums[size_t(r) * groups]};
            round_row(x + size_t(r) * w.cols, Kind(w.kind), w.group, groups, to);
        }
    }
    resize(tile_room, size_t(TOKENS) * PANEL);
    float *tile = tile_room.data();
    for (int first = 0; first < rows; first += TOKENS) {
        int count = std::min(TOKENS, rows - first);
#pragma omp for schedule(static) nowait
        for (int panel = 0; panel < panels; panel++) {
            linear_panel(w, panel, x, shared, first, count, tile);
            int start = panel * PANEL, end = std::min(PANEL, w.rows - start);
            for (int t = 0; t < count; t++) {
                float *to = y + size_t(first + t) * width + start;
                const float *from = tile + t * PANEL;
                for (int i = 0; i < end; i++) {
                    float value = (from[i] + (op.bias ? op.bias[start + i] : 0.0f)) * op.scale;
                    to[i] = op.flags & ACCUMULATE ? to[i] + value : value;
                }
            }
        }
    }
#pragma omp barrier
}

// Norms over runs of `width` numbers; mode 0 is RMS, 1 layer, 2 the unit vector
void norm(const Op &op, const Run &run) {
    int width = op.width, runs = run.batch * run.tokens * (run.widths[op.src] / width);
#pragma omp for schedule(static)
    for (int r = 0; r < runs; r++) {
        const float *x = run.slots[op.src] + size_t(r) * width;
        float *y = run.slots[op.dst] + size_t(r) * width;
        int64_t at = op.vector_size ? int64_t(r) * width % op.vector_size : 0;
        f32x16 sums{}, squares{};
        float total = 0, square = 0, mean = 0;
        int i = 0;
        if (op.mode == 1) {
            for (; i + 16 <= width; i += 16) sums += load<f32x16>(x + i);
            for (; i < width; i++) total += x[i];
            mean = (total + sum(sums)) / width;
        }
        for (i = 0; i + 16 <= width; i += 16) {
            f32x16 v = load<f32x16>(x + i) - mean;
            squares += v * v;
        }
        for (; i < width; i++) square += (x[i] - mean) * (x[i] - mean);
        square += sum(squares);
        float scale = op.mode == 2 ? 1 / std::max(std::sqrt(square), op.eps) : 1 / std::sqrt(square / width + op.eps);
        for (i = 0; i < width; i++) {
            float value = (x[i] - mean) * scale;
            if (op.vector) value *= op.vector[at + i];
            y[i] = op.bias ? value + op.bias[at + i] : value;
        }
    }
}

// Rotates pairs (i, i + R / 2) of each head, in place
void rotate(const Op &op, const Run &run) {
    const Table &table = run.tables[op.mode];
    int rows = run.batch * run.tokens, half = table.rotated / 2;
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) {
        const float *cos = table.cos + size_t(r % run.tokens) * table.rotated;
        const float *sin = table.sin + size_t(r % run.tokens) * table.rotated;
        for (int h = 0; h < op.heads; h++) {
            float *x = run.slots[op.src] + size_t(r) * run.widths[op.src] + h * op.width;
            for (int i = 0; i < half; i++) {
                float a = x[i], b = x[i + half];
                x[i] = a * cos[i] - b * sin[i], x[i + half] = b * cos[i + half] + a * sin[i + half];
            }
        }
    }
}

float gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678f)); }
float gelu_tanh(float x) { return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x))); }

// dst = act(src) * other, or act(src); mode 0 is SiLU, 1 GELU, 2 its tanh approximation, 3 ReLU
void activate(const Op &op, const Run &run) {
    size_t size = size_t(run.batch) * run.tokens * run.widths[op.src];
    const float *x = run.slots[op.src], *up = op.other < 0 ? nullptr : run.slots[op.other];
    float *y = run.slots[op.dst];
    int blocks = int((size + 255) / 256);
#pragma omp for schedule(static)
    for (int block = 0; block < blocks; block++) {
        size_t i = size_t(block) * 256, end = std::min(size, i + 256);
        for (; op.mode == 0 && i + 16 <= end; i += 16) {
            f32x16 v = load<f32x16>(x + i);
            v = v / (exp_of(-v) + 1.0f);
            store(y + i, up ? v * load<f32x16>(up + i) : v);
        }
        for (; i < end; i++) {
            float v = x[i];
            if (op.mode == 0) v = v / (1 + exp_of(splat(-v))[0]);
            else if (op.mode == 1) v = gelu(v);
            else if (op.mode == 2) v = gelu_tanh(v);
            else v = std::max(v, 0.0f);
            y[i] = up ? v * up[i] : v;
        }
    }
}

// dst += scale * src
void add(const Op &op, const Run &run) {
    size_t size = size_t(run.batch) * run.tokens * run.widths[op.src];
    const float *x = run.slots[op.src];
    float *y = run.slots[op.dst];
#pragma omp for schedule(static)
    for (size_t i = 0; i < size; i++) y[i] += op.scale * x[i];
}

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
        row[d] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
void write_row(int8_t *row, const float *from, int dims) { // the largest is 127 scales
    float most = 0;
    for (int d = 0; d < dims; d++) most = std::max(most, std::fabs(from[d]));
    float scale = most / 127, inverse = most > 0 ? 127 / most : 0;
    for (int d = 0; d < dims; d++) row[d] = int8_t(std::nearbyint(from[d] * inverse));
    std::memcpy(row + dims, &scale, sizeof scale);
}

// KEYS positions of a head, `dims` numbers each, in rows from `keys` and `values`; of them only [low, end) are there, and
// the others count as zeros.
template <class T> struct Chunk {
    const T *keys, *values;
    int dims, row, low, end;

    bool whole() const { return low <= 0 && end >= KEYS; }

    // 16 numbers of a row from dimension d, zeros behind its end
    f32x16 part(const T *at, int d) const {
        if (d + 16 <= dims) return read_row(at, d, dims);
        T room[32] = {}; // with what stands behind the numbers
        std::memcpy(room, at + d, (row - d) * sizeof(T));
        f32x16 v = read_row(room, 0, dims - d);
        for (int i = dims - d; i < 16; i++) v[i] = 0;
        return v;
    }

    // Turned into a panel for each 32 keys, [D][32]
    void turn_keys(float *to) const {
        const T *key = keys, *value = values;
        for (int j = 0; j < KEYS; j += 16, key += 16 * row, value += 16 * row)
            for (int d = 0; d < dims; d += 16) {
                f32x16 m[16];
                for (int i = 0; i < 16; i++) {
                    if (d * sizeof(T) % 64 == 0) { // the next chunk is on its way while this one is used
                        __builtin_prefetch(key + (KEYS + i) * row + d);
                        __builtin_prefetch(value + (KEYS + i) * row + d);
                    }
                    m[i] = whole() || (j + i >= low && j + i < end) ? part(key + i * row, d) : f32x16{};
                }
                transpose(m);
                float *panel = to + (j / PANEL * dims + d) * PANEL + j % PANEL;
                for (int i = 0; i < 16 && d + i < dims; i++) store(panel + i * PANEL, m[i]);
            }
    }

    // (KEYS, stride), whose rows are whole panels: the cache itself if it can be, else a copy in `room`
    const float *rows_of_values(float *room, int *stride) const {
        *stride = dims;
        if (std::is_same<T, float>::value && dims % PANEL == 0 && whole()) return (const float *)values;
        *stride = (dims + PANEL - 1) / PANEL * PANEL;
        for (int j = 0; j < KEYS; j++)
            for (int d = 0; d < *stride; d += 16) {
                bool there = j >= low && j < end && d < dims;
                store(room + j * *stride + d, there ? part(values + j * row, d) : f32x16{});
            }
        return room;
    }
};

// What some queries see of some positions: weights are exp(score - most). (R, padded) outputs.
struct Part {
    float *most, *total, *out;
};

// Not inlined: copies could be compiled to round differently.
__attribute__((noinline)) void merge(float *most, float *total, float *out, float other_most, float other_total, const float *other, int dims) {
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

// Attention of the tokens [t0, t1) of one batch row to the KEYS positions from `start`, for the heads that share a key
// head. Rows of `part` go by token, then head.
template <class T>
void attend_part(const Op &op, const Run &run, int batch, int kv_head, int t0, int t1, int64_t start, Part part) {
    const Layer &layer = run.layers[op.layer];
    int dims = op.width, shared = op.heads / op.kv_heads, rows = (t1 - t0) * shared;
    int padded = (dims + PANEL - 1) / PANEL * PANEL, width = run.widths[op.src];
    resize(panel_room, size_t(KEYS) * (dims + padded) + size_t(rows) * KEYS);
    float *keys = panel_room.data(), *copied = keys + KEYS * dims, *scores = copied + KEYS * padded;
    int64_t low = std::max(layer.first, layer.window ? run.past + t0 - layer.window + 1 : 0);
    int row = row_size((const T *)nullptr, dims);
    int64_t entry = (start - layer.first) * row;
    Chunk<T> chunk{(const T *)layer.keys + batch * layer.key_batch + kv_head * layer.key_head + entry,
                   (const T *)layer.values + batch * layer.value_batch + kv_head * layer.value_head + entry, dims, row,
                   int(std::max<int64_t>(low - start, 0)), int(std::min<int64_t>(run.past + run.tokens - start, KEYS))};
    chunk.turn_keys(keys);
    int stride;
    const float *values = chunk.rows_of_values(copied, &stride);
    const float *queries = run.slots[op.src] + (size_t(batch) * run.tokens + t0) * width + kv_head * shared * dims;
    for (int r = 0; r < rows; r += TILE) {
        int n = std::min(TILE, rows - r);
        const float *x[TILE];
        float *y[TILE];
        for (int i = 0; i < n; i++) x[i] = queries + size_t((r + i) / shared) * width + (r + i) % shared * dims;
        for (int half = 0; half < KEYS / PANEL; half++) {
            for (int i = 0; i < n; i++) y[i] = scores + (r + i) * KEYS + half * PANEL;
            multiply_rows(n, x, keys + half * dims * PANEL, PANEL, dims, y);
        }
    }
    for (int r = 0; r < rows; r++) {
        float *score = scores + r * KEYS;
        int64_t here = run.past + t0 + r / shared;
        int64_t first = layer.window ? std::max<int64_t>(0, here - layer.window + 1) : 0;
        float slope = run.slopes ? run.slopes[kv_head * shared + r % shared] : 0;
        f32x16 most = splat(-INFINITY), total{};
        for (int j = 0; j < KEYS; j += 16) {
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
        part.most[r] = peak;
        for (int j = 0; j < KEYS; j += 16) {
            f32x16 p = peak == -INFINITY ? f32x16{} : exp_of(load<f32x16>(score + j) - peak);
            store(score + j, p);
            total += p;
        }
        part.total[r] = sum(total);
    }
    for (int r = 0; r < rows; r += TILE) {
        int n = std::min(TILE, rows - r);
        const float *x[TILE];
        float *y[TILE];
        for (int i = 0; i < n; i++) x[i] = scores + (r + i) * KEYS;
        for (int d = 0; d < padded; d += PANEL) {
            for (int i = 0; i < n; i++) y[i] = part.out + size_t(r + i) * padded + d;
            multiply_rows(n, x, values + d, stride, KEYS, y);
        }
    }
}

// src: queries, other: keys, third: values. Stores keys and values in the cache, then dst = what the queries see.
template <class T> void attend(const Op &op, const Run &run, Shared &shared) {
    const Layer &layer = run.layers[op.layer];
    int dims = op.width, group = op.heads / op.kv_heads, padded = (dims + PANEL - 1) / PANEL * PANEL;
    int rows = run.batch * run.tokens, key_width = run.widths[op.other];
#pragma omp for schedule(static) collapse(2)
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < op.kv_heads; h++) {
            int64_t at = (run.past + r % run.tokens - layer.first) * row_size((T *)nullptr, dims), b = r / run.tokens;
            const float *key = run.slots[op.other] + size_t(r) * key_width + h * dims;
            const float *value = run.slots[op.third] + size_t(r) * key_width + h * dims;
            T *to_key = (T *)layer.keys + b * layer.key_batch + h * layer.key_head + at;
            T *to_value = (T *)layer.values + b * layer.value_batch + h * layer.value_head + at;
            write_row(to_key, key, dims), write_row(to_value, value, dims);
        }
    int64_t end = run.past + run.tokens;
    auto lowest = [&](int t) { return layer.window ? std::max<int64_t>(0, run.past + t - layer.window + 1) : 0; };
    auto finish = [&](int b, int kv_head, int t, int g, const float *out, float total) {
        size_t row = size_t(b) * run.tokens + t;
        float *to = run.slots[op.dst] + row * run.widths[op.dst] + (kv_head * group + g) * dims;
        for (int d = 0; d < dims; d++) to[d] = out[d] / total;
    };
    int heads = run.batch * op.kv_heads;
    int64_t from = lowest(0) / KEYS, chunks = (end + KEYS - 1) / KEYS - from;
    size_t few = size_t(run.tokens) * group, size = few * (padded + 2);
    if (run.tokens <= 2 * TILE) { // too few queries for all threads: they divide the positions
#pragma omp single
        resize(shared.parts, size * heads * chunks);
#pragma omp for schedule(static) collapse(2)
        for (int h = 0; h < heads; h++)
            for (int64_t c = 0; c < chunks; c++) {
                float *room = &shared.parts[size * (h * chunks + c)];
                Part part{room, room + few, room + 2 * few};
                attend_part<T>(op, run, h / op.kv_heads, h % op.kv_heads, 0, run.tokens, (from + c) * KEYS, part);
            }
#pragma omp for schedule(static) collapse(2)
        for (int h = 0; h < heads; h++)
            for (int r = 0; r < int(few); r++) {
                float *room = &shared.parts[size * h * chunks], *out = room + 2 * few + size_t(r) * padded;
                for (int64_t c = 1; c < chunks; c++) {
                    const float *next = room + size * c;
                    merge(room + r, room + few + r, out, next[r], next[few + r], next + 2 * few + size_t(r) * padded,
                          padded);
                }
                finish(h / op.kv_heads, h % op.kv_heads, r / group, r % group, out, room[few + r]);
            }
        return;
    }
    int tiles = (run.tokens + QUERIES - 1) / QUERIES;
#pragma omp for schedule(dynamic)
    for (int task = heads * tiles - 1; task >= 0; task--) { // later queries see more: the long tasks come first
        int tile = task / heads, h = task % heads, t0 = tile * QUERIES, t1 = std::min(t0 + QUERIES, run.tokens);
        size_t many = size_t(t1 - t0) * group, room = many * (padded + 2);
        resize(tile_room, 2 * room);
        float *sum = tile_room.data(), *next = sum + room;
        Part part{next, next + many, next + 2 * many};
        int64_t c = lowest(t0) / KEYS, last = (run.past + t1 - 1) / KEYS;
        std::fill(sum, sum + many, -INFINITY);
        for (; c <= last; c++) {
            attend_part<T>(op, run, h / op.kv_heads, h % op.kv_heads, t0, t1, c * KEYS, part);
            for (size_t r = 0; r < many; r++)
                merge(sum + r, sum + many + r, sum + 2 * many + r * padded, part.most[r], part.total[r],
                      part.out + r * padded, padded);
        }
        for (size_t r = 0; r < many; r++)
            finish(h / op.kv_heads, h % op.kv_heads, t0 + r / group, r % group, sum + 2 * many + r * padded,
                   sum[many + r]);
    }
}

} // namespace

extern "C" {

void kvgen_run(const Run *run, int threads) {
    static Shared shared; // one run at a time: the caller holds a lock
#pragma omp parallel num_threads(threads)
    for (int i = 0; i < run->count; i++) {
        const Op &op = run->ops[i];
        switch (op.kind) {
        case NORM: norm(op, *run); break;
        case LINEAR: linear(op, *run, shared); break;
        case ROTATE: rotate(op, *run); break;
        case ATTEND:
            switch (run->layers[op.layer].stored) {
            case STORED_F32: attend<float>(op, *run, shared); break;
            case STORED_BF16: attend<uint16_t>(op, *run, shared); break;
            default: attend<int8_t>(op, *run, shared);
            }
            break;
        case ACTIVATE: activate(op, *run); break;
        default: add(op, *run);
        }
    }
}

// out[i] = row ids[i] of a weight, as fp32: (count, cols)
void kvgen_rows(const Weight *w, const int64_t *ids, int64_t count, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 64)
    for (int64_t i = 0; i < count; i++) {
        int panel = int(ids[i] / PANEL), lane = int(ids[i] % PANEL);
        size_t start = size_t(panel) * w->cols * PANEL;
        float *to = out + i * w->cols;
        if (w->kind < INT4) {
            for (int k = 0; k < w->cols; k++) {
                size_t at = start + size_t(k) * PANEL + lane;
                u16x16 half{};
                if (w->kind != F32) half[0] = ((const uint16_t *)w->codes)[at];
                to[k] = w->kind == F32    ? ((const float *)w->codes)[at]
                        : w->kind == BF16 ? bfloat_to_float(half)[0]
                                          : half_to_float(half)[0];
            }
            continue;
        }
        Scales scales(w->scales, *w, panel), mins(w->mins, *w, panel);
        int pairs = w->group / 2;
        for (int g = 0; g < w->cols / w->group; g++) {
            float scale = scales.of(g, lane / 16)[lane % 16], min = mins.at ? mins.of(g, lane / 16)[lane % 16] : 0;
            for (int p = 0; p < pairs; p++)
                for (int half = 0; half < 2; half++) {
                    int code;
                    if (w->kind == INT8)
                        code = ((const int8_t *)w->codes)[start + ((size_t(g) * pairs + p) * PANEL + lane) * 2 + half];
                    else {
                        const uint32_t *words = (const uint32_t *)w->codes + start / 8;
                        code = words[(size_t(g) * (pairs / 4) + p / 4) * PANEL + lane] >> (4 * (p % 4) + 16 * half) & 15;
                    }
                    to[g * w->group + column_of(Kind(w->kind), w->group, p, half)] = float(code) * scale + min;
                }
        }
    }
}

} // extern "C"
