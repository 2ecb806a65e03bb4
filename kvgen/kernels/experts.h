// Mixtures of experts: choosing experts for each row, and adding up their outputs. `linear` computes them.
#pragma once

#include "linear.h"

namespace {

enum State : uint8_t { CANDIDATE, CHOSEN, EXCLUDED };

// NaN is the largest, so that it is not lost.
bool exceeds(float a, float b) { return b == b && !(a <= b); }

// Chooses the `count` largest of the candidates from `begin` to `end`, of equal ones the first. Returns their sum.
float take_largest(const float *values, State *states, int begin, int end, int count) {
    float total = 0;
    while (count--) {
        int best = -1;
        for (int i = begin; i < end; i++)
            if (states[i] == CANDIDATE && (best < 0 || exceeds(values[i], values[best]))) best = i;
        states[best] = CHOSEN, total += values[best];
    }
    return total;
}

// Excludes the experts outside of the best groups: those whose best experts have the largest sum.
void exclude_groups(const Router &router, const float *values, State *states) {
    int size = router.experts / router.groups;
    std::vector<float> sums(router.groups);
    std::vector<State> groups(router.groups, CANDIDATE);
    for (int g = 0; g < router.groups; g++) sums[g] = take_largest(values, states, g * size, (g + 1) * size, router.group_top);
    take_largest(sums.data(), groups.data(), 0, router.groups, router.active_groups);
    for (int i = 0; i < router.experts; i++) states[i] = groups[i / size] == CHOSEN ? CANDIDATE : EXCLUDED;
}

// Replaces `count` numbers x by f(x), 16 at a time.
template <class F> void replace(float *x, int count, F f) {
    for (int i = 0; i < count; i += 16)
        store_some(x + i, f(load_some(x + i, count - i)), count - i);
}

void softmax(float *x, int count) {
    float peak = x[0], total = 0;
    for (int i = 1; i < count; i++) peak = exceeds(x[i], peak) ? x[i] : peak;
    replace(x, count, [peak](f32x16 v) { return exp_of(v - peak); });
    for (int i = 0; i < count; i++) total += x[i];
    for (int i = 0; i < count; i++) x[i] = peak == peak ? x[i] / total : peak;
}

// Chooses the experts of one row, ascending, and their weights.
void route_row(const Router &router, const float *logits, int32_t *experts, float *weights) {
    int count = router.experts, active = router.active;
    std::vector<float> scores(logits, logits + count);
    if (router.scores == SOFTMAX) softmax(scores.data(), count);
    else if (router.scores == SIGMOID) replace(scores.data(), count, [](f32x16 v) { return sigmoid_of(v); });
    std::vector<float> values(scores);
    for (int i = 0; router.selection && i < count; i++) values[i] += router.selection[i];
    std::vector<State> states(count, CANDIDATE);
    if (router.active_groups < router.groups) exclude_groups(router, values.data(), states.data());
    take_largest(values.data(), states.data(), 0, count, active);
    for (int i = 0, a = 0; i < count; i++)
        if (states[i] == CHOSEN) experts[a] = i, weights[a++] = scores[i];
    if (router.scores == SOFTMAX_OF_CHOSEN) softmax(weights, active);
    float total = 0;
    for (int a = 0; a < active; a++) total += weights[a];
    total = std::max(total + router.added_to_sum, router.smallest_sum);
    float factor = router.normalize ? router.scale / total : router.scale;
    for (int a = 0; a < active; a++) weights[a] *= factor;
}

// Chooses experts by the router's logits (src), and orders the pairs of rows and experts.
void route(const Op &op, const Run &run, Shared &shared) {
    const Router &router = *op.router;
    Routes &routes = shared.routes;
    int active = router.active, pairs = run.rows * active;
    resize(routes.experts, pairs), resize(routes.places, pairs), resize(routes.weights, pairs);
    resize(routes.rows, pairs);
    shared.threads->each(run.rows, int64_t(router.experts) * active, [&](int r) {
        const float *logits = run.slots[op.src] + size_t(r) * router.experts;
        route_row(router, logits, &routes.experts[size_t(r) * active], &routes.weights[size_t(r) * active]);
    });
    std::vector<int32_t> next(router.experts + 1); // the place of the next pair of each expert
    for (int i = 0; i < pairs; i++) next[routes.experts[i] + 1]++;
    routes.segments.clear();
    for (int e = 0; e < router.experts; e++) {
        int count = next[e + 1], parts = (count + TOKENS - 1) / TOKENS;
        next[e + 1] += next[e];
        for (int p = 0; p < parts; p++) {
            int begin = count * p / parts, end = count * (p + 1) / parts;
            routes.segments.push_back({next[e] + begin, end - begin, e});
        }
    }
    for (int i = 0; i < pairs; i++) {
        int place = next[routes.experts[i]]++;
        routes.places[i] = place, routes.rows[place] = i / active;
    }
}

// dst = scale * the weighted outputs of each row's experts (src), added in ascending order of experts; or dst += it
void combine(const Op &op, const Run &run, Shared &shared) {
    int width = run.widths[op.dst], active = op.router->active;
    shared.threads->each(run.rows, int64_t(active) * width, [&](int r) {
        resize(tile_buffer, width);
        float *total = tile_buffer.data(), *y = run.slots[op.dst] + size_t(r) * width;
        std::fill_n(total, width, 0.0f);
        for (int i = r * active; i < (r + 1) * active; i++) {
            const float *x = run.slots[op.src] + size_t(shared.routes.places[i]) * width;
            float weight = shared.routes.weights[i];
            for (int d = 0; d < width; d++) total[d] += weight * x[d];
        }
        for (int d = 0; d < width; d++) y[d] = op.flags & ACCUMULATE ? y[d] + op.scale * total[d] : op.scale * total[d];
    });
}

} // namespace
