// Recurrent mixers: they continue from the state of a sequence and write a new one after each piece of its positions.
#pragma once

#include "structs.h"

namespace {

constexpr int CHANNELS = 64; // convolved at once

// Part `part` of a recurrent mixer's state: before the pass, or after piece `piece` - 1.
float *state_of(const Op &op, const Sequence &sequence, int piece, int part) {
    return sequence.states[(size_t(op.layer) * (sequence.pieces + 1) + piece) * STATE_PARTS + part];
}

// dst = silu(conv(src)): each channel alone, over its last op.width inputs. The state's first part has the last
// op.width - 1 inputs, (op.width - 1, channels). Mode 1, of (b, c, x) in src: dst = c * conv(b * x).
void convolve(const Op &op, const Run &run, Shared &shared) {
    int channels = run.widths[op.dst], taps = op.width, kept = taps - 1, stride = run.widths[op.src];
    int blocks = (channels + CHANNELS - 1) / CHANNELS;
    bool gated = op.mode == 1;
    shared.threads->each(run.sequence_count * blocks, int64_t(run.rows) * CHANNELS * taps, [&](int i) {
        const Sequence &sequence = run.sequences[i / blocks];
        int first = i % blocks * CHANNELS, count = std::min(CHANNELS, channels - first), tokens = sequence.tokens;
        std::vector<float> &buffer = tile_buffer;
        resize(buffer, size_t(kept + tokens + taps + 1) * CHANNELS);
        float *inputs = buffer.data(), *weights = inputs + size_t(kept + tokens) * CHANNELS;
        float *bias = weights + taps * CHANNELS;
        std::fill_n(weights, (taps + 1) * CHANNELS, 0.0f);
        for (int c = 0; c < count; c++) {
            for (int k = 0; k < taps; k++) weights[k * CHANNELS + c] = op.vector[size_t(first + c) * taps + k];
            if (op.bias) bias[c] = op.bias[first + c];
        }
        const float *state = state_of(op, sequence, 0, 0);
        for (int k = 0; k < kept; k++)
            std::memcpy(inputs + k * CHANNELS, state + size_t(k) * channels + first, count * sizeof(float));
        for (int t = 0; t < tokens; t++) {
            const float *x = run.slots[op.src] + size_t(sequence.row + t) * stride + op.column + first;
            float *to = inputs + size_t(kept + t) * CHANNELS;
            for (int c = 0; c < count; c++) to[c] = gated ? x[c] * x[2 * channels + c] : x[c];
        }
        for (int t = 0; t < tokens; t++) {
            float out[CHANNELS];
            for (int c = 0; c < CHANNELS; c += 16) {
                f32x16 sum = load<f32x16>(bias + c);
                for (int k = 0; k < taps; k++) {
                    f32x16 x = load<f32x16>(inputs + (t + k) * CHANNELS + c);
                    sum = fma(load<f32x16>(weights + k * CHANNELS + c), x, sum);
                }
                store(out + c, sum);
            }
            const float *gate = run.slots[op.src] + size_t(sequence.row + t) * stride + channels + first;
            for (int c = 0; gated && c < count; c++) out[c] *= gate[c];
            for (int c = 0; !gated && c < CHANNELS; c += 16) {
                f32x16 v = load<f32x16>(out + c);
                store(out + c, v / (exp_of(-v) + 1.0f));
            }
            std::memcpy(run.slots[op.dst] + size_t(sequence.row + t) * channels + first, out, count * sizeof(float));
        }
        for (int p = 0; p < sequence.pieces; p++)
            for (int k = 0; k < kept; k++)
                std::memcpy(state_of(op, sequence, p + 1, 0) + size_t(k) * channels + first,
                            inputs + size_t(sequence.ends[p] + k) * CHANNELS, count * sizeof(float));
    });
}

constexpr int COLUMNS = 32; // of a head's state at once, as two vectors: few enough for a core's first cache

// Numbers of some columns; those that do not exist are 0.
struct Columns {
    f32x16 low{}, high{};
    Columns() {}
    Columns(const float *at, int count) {
        float numbers[COLUMNS] = {};
        std::memcpy(numbers, at, count * sizeof(float));
        low = load<f32x16>(numbers), high = load<f32x16>(numbers + 16);
    }
    void write(float *at, int count) const {
        float numbers[COLUMNS];
        store(numbers, low), store(numbers + 16, high);
        std::memcpy(at, numbers, count * sizeof(float));
    }
};

// Calls step(row, head, column, count, state) for each new position of each sequence, each head, and each block of
// columns of its state, the second part of a mixer's, (key_dim, value_dim). `state` is a copy of `count` columns from
// `column`, (key_dim, COLUMNS), which the step changes.
template <class Step> void recur(const Op &op, const Run &run, Shared &shared, const Step &step) {
    const Recurrence &sizes = *op.recurrence;
    int dims = sizes.key_dim, width = sizes.value_dim, blocks = (width + COLUMNS - 1) / COLUMNS;
    int tasks = sizes.heads * blocks;
    int64_t cost = int64_t(4) * dims * COLUMNS * run.rows / run.sequence_count;
    shared.threads->each(run.sequence_count * tasks, cost, [&](int i) {
        const Sequence &sequence = run.sequences[i / tasks];
        int head = i % tasks / blocks, column = i % blocks * COLUMNS, count = std::min(COLUMNS, width - column);
        size_t first = size_t(head) * dims * width + column;
        resize(tile_buffer, size_t(dims) * COLUMNS);
        float *state = tile_buffer.data();
        const float *before = state_of(op, sequence, 0, 1) + first;
        for (int k = 0; k < dims; k++) Columns(before + size_t(k) * width, count).write(state + k * COLUMNS, COLUMNS);
        for (int t = 0, piece = 0; t < sequence.tokens; t++) {
            step(sequence.row + t, head, column, count, state);
            if (t + 1 < sequence.ends[piece]) continue;
            float *after = state_of(op, sequence, ++piece, 1) + first;
            for (int k = 0; k < dims; k++)
                std::memcpy(after + size_t(k) * width, state + k * COLUMNS, count * sizeof(float));
        }
    });
}

// dst = what Mamba 2 reads from its states: for each head h_t = exp(dt A) h_(t-1) + dt b x^T, y = c^T h_t + D x. src
// has x, b and c after the convolution, `other` the time steps from op.column.
void scan(const Op &op, const Run &run, Shared &shared) {
    const Recurrence &sizes = *op.recurrence;
    int share = sizes.heads / sizes.key_heads, dims = sizes.key_dim, inner = sizes.heads * sizes.value_dim;
    recur(op, run, shared, [&](int row, int head, int column, int count, float *state) {
        const float *x = run.slots[op.src] + size_t(row) * run.widths[op.src], *b = x + inner + head / share * dims;
        const float *c = b + sizes.key_heads * dims, *steps = run.slots[op.other] + size_t(row) * run.widths[op.other];
        float dt = softplus_of(splat(steps[op.column + head] + sizes.dt[head]))[0];
        dt = std::clamp(dt, sizes.dt_min, sizes.dt_max);
        float decay = exp_of(splat(dt * sizes.A[head]))[0];
        int at = head * sizes.value_dim + column;
        Columns in(x + at, count), out;
        f32x16 low = in.low * dt, high = in.high * dt;
        for (int k = 0; k < dims; k++, state += COLUMNS) {
            f32x16 a = fma(load<f32x16>(state), decay, low * b[k]), z = fma(load<f32x16>(state + 16), decay, high * b[k]);
            out.low = fma(a, c[k], out.low), out.high = fma(z, c[k], out.high);
            store(state, a), store(state + 16, z);
        }
        out.low = fma(in.low, sizes.D[head], out.low), out.high = fma(in.high, sizes.D[head], out.high);
        out.write(run.slots[op.dst] + size_t(row) * run.widths[op.dst] + at, count);
    });
}

// 1 / the length of a vector
float unit_scale(const float *x, int count) {
    f32x16 squares{};
    float total = 0;
    int i = 0;
    for (; i + 16 <= count; i += 16) {
        f32x16 v = load<f32x16>(x + i);
        squares = fma(v, v, squares);
    }
    for (; i < count; i++) total += x[i] * x[i];
    return 1 / std::sqrt(total + sum(squares) + 1e-6f); // as in flash-linear-attention
}

// dst = what a gated delta net reads from its states: for each head u = beta (v - alpha S_(t-1)^T k),
// S_t = alpha S_(t-1) + k u^T, o = S_t^T q. src has q, k and v after the convolution, of which q and k become unit
// vectors, and q is multiplied by op.scale; alpha = exp(A softplus(other + dt)), beta = sigmoid(third).
void delta(const Op &op, const Run &run, Shared &shared) {
    const Recurrence &sizes = *op.recurrence;
    int share = sizes.heads / sizes.key_heads, dims = sizes.key_dim, keys = sizes.key_heads * dims;
    recur(op, run, shared, [&](int row, int head, int column, int count, float *state) {
        const float *x = run.slots[op.src] + size_t(row) * run.widths[op.src];
        const float *q = x + head / share * dims, *k = q + keys;
        size_t gate = size_t(row) * sizes.heads + head;
        f32x16 step = softplus_of(splat(run.slots[op.other][gate] + sizes.dt[head]));
        float alpha = exp_of(step * sizes.A[head])[0];
        float beta = sigmoid_of(splat(run.slots[op.third][gate]))[0];
        float q_scale = unit_scale(q, dims) * op.scale, k_scale = unit_scale(k, dims);
        int at = head * sizes.value_dim + column;
        Columns v(x + 2 * keys + at, count), held, out; // held: S^T k
        const float *from = state;
        for (int d = 0; d < dims; d++, from += COLUMNS)
            held.low = fma(load<f32x16>(from), k[d], held.low), held.high = fma(load<f32x16>(from + 16), k[d], held.high);
        f32x16 low = beta * k_scale * (v.low - alpha * k_scale * held.low);
        f32x16 high = beta * k_scale * (v.high - alpha * k_scale * held.high);
        for (int d = 0; d < dims; d++, state += COLUMNS) {
            f32x16 a = fma(load<f32x16>(state), alpha, low * k[d]), z = fma(load<f32x16>(state + 16), alpha, high * k[d]);
            out.low = fma(a, q[d], out.low), out.high = fma(z, q[d], out.high);
            store(state, a), store(state + 16, z);
        }
        out.low *= q_scale, out.high *= q_scale;
        out.write(run.slots[op.dst] + size_t(row) * run.widths[op.dst] + at, count);
    });
}

} // namespace
