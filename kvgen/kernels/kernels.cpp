// The decoder's arithmetic on a CPU: runs the operations that program.py lists over fp32 buffers, on all threads.
//
// Every output is summed in one fixed order, whatever is computed beside it, so the logits of a position have the same
// bits in a prefill, a step and a batch, on any number of threads.
//
// Integer weights (groups of 4 or 8 bits with a scale and maybe a minimum) are multiplied with activations rounded to
// 16 bits per group, so products inside a group are exact integers; the error is 2^-16 of a group's largest activation.
// Everything else is fp32.

#include <unistd.h>

#include "attention.h"
#include "experts.h"
#include "recurrence.h"

namespace {

// RMSNorm (mode 0) or LayerNorm (mode 1) of each `width` numbers
void norm(const Op &op, const Run &run, Shared &shared) {
    int width = op.width, runs = run.rows * (run.widths[op.src] / width);
    shared.threads->each(runs, 4 * width, [&](int r) {
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
        float scale = 1 / std::sqrt(square / width + op.eps);
        for (i = 0; i < width; i++) {
            float value = (x[i] - mean) * scale;
            if (op.vector) value *= op.vector[at + i];
            y[i] = op.bias ? value + op.bias[at + i] : value;
        }
    });
}

// Rotates pairs (i, i + R / 2) of each head, in place.
void rotate(const Op &op, const Run &run, Shared &shared) {
    const Table &table = run.tables[op.mode];
    int half = table.rotated / 2;
    shared.threads->each(run.rows, 4 * op.heads * table.rotated, [&](int r) {
        const float *cos = table.cos + size_t(r) * table.rotated, *sin = table.sin + size_t(r) * table.rotated;
        for (int h = 0; h < op.heads; h++) {
            float *x = run.slots[op.src] + size_t(r) * run.widths[op.src] + h * op.width;
#pragma GCC ivdep
            for (int i = 0; i < half; i++) {
                float a = x[i], b = x[i + half];
                x[i] = a * cos[i] - b * sin[i], x[i + half] = b * cos[i + half] + a * sin[i + half];
            }
        }
    });
}

float gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678f)); }
float gelu_tanh(float x) { return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x))); }

float xielu(float x, const Op &op) {
    float bend = x > 0 ? op.scale * x * x : op.slope * (std::expm1(std::min(x, op.eps)) - x);
    return bend + op.softcap * x;
}

float clamped_swiglu(float gate, float up, const Op &op) {
    gate = std::min(gate, op.eps), up = std::clamp(up, -op.eps, op.eps);
    return gate * sigmoid_of(splat(op.scale * gate))[0] * (up + 1);
}

// dst = act(src) * other, or act(src); src from op.column. mode: 0 SiLU, 1 GELU, 2 its tanh approximation, 3 ReLU,
// 4 ReLU squared, 5 xIELU, 6 sigmoid, 7 clamped SwiGLU of both
void activate(const Op &op, const Run &run, Shared &shared) {
    int width = run.widths[op.dst], blocks = (width + 255) / 256;
    shared.threads->each(run.rows * blocks, 16 * std::min(width, 256), [&](int block) { // 16: exponentials are slow
        size_t row = block / blocks;
        int i = block % blocks * 256, end = std::min(width, i + 256);
        const float *x = run.slots[op.src] + row * run.widths[op.src] + op.column;
        const float *up = op.other < 0 ? nullptr : run.slots[op.other] + row * width;
        float *y = run.slots[op.dst] + row * width;
        for (; (op.mode == 0 || op.mode == 6) && i + 16 <= end; i += 16) {
            f32x16 v = load<f32x16>(x + i);
            v = op.mode == 0 ? v / (exp_of(-v) + 1.0f) : sigmoid_of(v);
            store(y + i, up ? v * load<f32x16>(up + i) : v);
        }
        for (; i < end; i++) {
            float v = x[i];
            if (op.mode == 0) v = v / (1 + exp_of(splat(-v))[0]);
            else if (op.mode == 1) v = gelu(v);
            else if (op.mode == 2) v = gelu_tanh(v);
            else if (op.mode == 5) v = xielu(v, op);
            else if (op.mode == 6) v = sigmoid_of(splat(v))[0];
            else if (op.mode == 7) v = clamped_swiglu(v, up[i], op);
            else if (v = std::max(v, 0.0f); op.mode == 4) v *= v;
            y[i] = up && op.mode != 7 ? v * up[i] : v;
        }
    });
}

// dst = scale * src, or dst += it; times the sigmoid of the row's number in `other`, if there is one
void add(const Op &op, const Run &run, Shared &shared) {
    size_t width = run.widths[op.src];
    shared.threads->each(run.rows, width, [&](int r) {
        const float *x = run.slots[op.src] + r * width;
        float *y = run.slots[op.dst] + r * width;
        float scale = op.other < 0 ? op.scale : op.scale * sigmoid_of(splat(run.slots[op.other][r]))[0];
        for (size_t i = 0; i < width; i++) y[i] = (op.flags & ACCUMULATE ? y[i] : 0.0f) + scale * x[i];
    });
}

Shared &process_state() {
    static std::atomic<Shared *> current{nullptr};
    Shared *shared = current.load();
    if (shared && shared->process == getpid()) return *shared;
    auto *fresh = new Shared; // a forked process abandons its parent's state, whose threads it does not have
    fresh->process = getpid();
    if (current.compare_exchange_strong(shared, fresh)) return *fresh;
    delete fresh; // a concurrent call was faster
    return *shared;
}

} // namespace

extern "C" {

void kvgen_run(const Run *run, int threads) {
    Shared &shared = process_state();
    std::lock_guard<std::mutex> lock(shared.busy);
    shared.use(threads);
    shared.owners.resize(run->rows);
    for (int s = 0; s < run->sequence_count; s++)
        std::fill_n(shared.owners.begin() + run->sequences[s].row, run->sequences[s].tokens, s);
    if (run->rows == 0) return;
    shared.segments.clear();
    for (int first = 0; first < run->rows; first += TOKENS)
        shared.segments.push_back({first, std::min(TOKENS, run->rows - first), 0});
    for (int i = 0; i < run->count; i++) {
        const Op &op = run->ops[i];
        switch (op.kind) {
        case NORM: norm(op, *run, shared); break;
        case LINEAR: linear(op, *run, shared); break;
        case ROTATE: rotate(op, *run, shared); break;
        case ATTEND:
            switch (run->sequences[0].layers[op.layer].stored) {
            case STORED_F32: attend<float>(op, *run, shared); break;
            case STORED_BF16: attend<uint16_t>(op, *run, shared); break;
            default: attend<int8_t>(op, *run, shared);
            }
            break;
        case ACTIVATE: activate(op, *run, shared); break;
        case ROUTE: route(op, *run, shared); break;
        case COMBINE: combine(op, *run, shared); break;
        case CONVOLVE: convolve(op, *run, shared); break;
        case SCAN: scan(op, *run, shared); break;
        case DELTA: delta(op, *run, shared); break;
        default: add(op, *run, shared);
        }
    }
}

// out[i] = row ids[i] of a weight, as fp32, (count, cols)
void kvgen_rows(const Weight *w, const int64_t *ids, int64_t count, float *out, int threads) {
    Shared &shared = process_state();
    std::lock_guard<std::mutex> lock(shared.busy);
    shared.use(threads);
    shared.threads->each(int(count), w->cols, [&](int i) { unpack_row(*w, ids[i], out + size_t(i) * w->cols); });
}

} // extern "C"
