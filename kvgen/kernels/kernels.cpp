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
            squares = fma(v, v, squares);
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

f32x16 gelu(f32x16 x) { return 0.5f * x * (1.0f + erf_of(x * 0.70710678f)); }
f32x16 gelu_tanh(f32x16 x) { return 0.5f * x * (1.0f + tanh_of(0.79788456f * (x + 0.044715f * x * x * x))); }

f32x16 xielu(f32x16 x, const Op &op) {
    f32x16 negative = op.slope * (expm1_of(smaller(x, splat(op.eps))) - x);
    return fma(x, op.softcap, choose(x > 0, op.scale * x * x, negative));
}

f32x16 clamped_swiglu(f32x16 gate, f32x16 up, const Op &op) {
    gate = smaller(gate, splat(op.eps)), up = larger(smaller(up, splat(op.eps)), splat(-op.eps));
    return gate * sigmoid_of(op.scale * gate) * (up + 1.0f);
}

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU_SQUARED, XIELU, SIGMOID_ALONE, CLAMPED_SWIGLU };

f32x16 activation(const Op &op, f32x16 x, f32x16 up) {
    f32x16 positive = larger(x, f32x16{});
    switch (op.mode) {
    case SILU: return x / (exp_of(-x) + 1.0f) * up;
    case GELU: return gelu(x) * up;
    case GELU_TANH: return gelu_tanh(x) * up;
    case RELU: return positive * up;
    case RELU_SQUARED: return positive * positive * up;
    case XIELU: return xielu(x, op) * up;
    case SIGMOID_ALONE: return sigmoid_of(x) * up;
    default: return clamped_swiglu(x, up, op);
    }
}

// dst = act(src) * other, or act(src); src from op.column
void activate(const Op &op, const Run &run, Shared &shared) {
    int width = run.widths[op.dst], blocks = (width + 255) / 256;
    shared.threads->each(run.rows * blocks, 16 * std::min(width, 256), [&](int block) { // 16: exponentials are slow
        size_t row = block / blocks;
        int begin = block % blocks * 256, end = std::min(width, begin + 256);
        const float *x = run.slots[op.src] + row * run.widths[op.src] + op.column;
        const float *up = op.other < 0 ? nullptr : run.slots[op.other] + row * width;
        float *y = run.slots[op.dst] + row * width;
        for (int i = begin; i < end; i += 16) {
            f32x16 factor = up ? load_some(up + i, end - i) : splat(1.0f);
            store_some(y + i, activation(op, load_some(x + i, end - i), factor), end - i);
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
