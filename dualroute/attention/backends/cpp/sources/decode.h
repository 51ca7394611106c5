// One token of a text: both routes of a layer write it to their caches and read them.
//
// T is what is computed in, A the type of the model (projections, output, statistics of blocks), S what keys
// and values are stored as.
//
// A row of the softmax is short, top_k + 2 blocks and a pseudo-key for each past block,
// so all its logits are kept: no running softmax, two plain passes.
#pragma once

#include <vector>

#include "select.h"
#include "stored.h"

struct Step {
    long rows, group, dim, tokens, position;  // rows: batch * kv_heads; tokens: room of the cache
    double scale;
    int threads;
    bool worth_threads(long read) const { return rows > 1 && rows * group * read * dim > WORTH_THREADS; }
};

// `count` logits become weights of sum 1; there is room for round_up(count).
template <class T>
void soften(T* logits, long count) {
    const long padded = round_up<T>(count);
    std::fill(logits + count, logits + padded, NEG_INF<T>);
    Vector<T> most = load<T>(logits), sum{};
    for (long i = LANES<T>; i < padded; i += LANES<T>) {
        const Vector<T> other = load<T>(logits + i);
        most = most > other ? most : other;
    }
    const T peak = largest<T>(most);
    for (long i = 0; i < padded; i += LANES<T>) {
        const Vector<T> weights = exponential<T>(load<T>(logits + i) - peak);
        store<T>(logits + i, weights);
        sum += weights;
    }
    scale_row<T>(logits, logits, 1 / total<T>(sum), padded);
}

// The tensors of a cache: (rows, tokens, dim), and scales (rows, tokens) of int8.
template <class S>
struct Cache {
    S *keys, *values;
    float *key_scales, *value_scales;
};

// Keys and values of one row of a cache.
template <class T, class S>
struct Stored {
    Rows<S> keys, values;
    Stored(const Step& step, long row, const Cache<S>& cache)
        : keys{cache.keys + row * step.tokens * step.dim,
               cache.key_scales ? cache.key_scales + row * step.tokens : nullptr, step.dim},
          values{cache.values + row * step.tokens * step.dim,
                 cache.value_scales ? cache.value_scales + row * step.tokens : nullptr, step.dim} {}
    void put(long token, const T* key, const T* value) const {
        put_row<T>(keys, token, key);
        put_row<T>(values, token, value);
    }
    // The logits of tokens begin .. end-1.
    void logits(const T* scaled, long begin, long end, T* out) const {
        dot_rows<T>(scaled, keys.numbers + begin * keys.dim, end - begin, keys.dim, out);
        if (keys.scales)
            for (long token = begin; token < end; ++token) out[token - begin] *= T(keys.scales[token]);
    }
    // out (dim,) += the values of tokens begin .. end-1, times weights[0 ..], which take on the scales.
    void add(T* out, T* weights, long begin, long end) const {
        if (values.scales)
            for (long token = begin; token < end; ++token) weights[token - begin] *= T(values.scales[token]);
        add_rows<T>(out, weights, values.numbers + begin * values.dim, end - begin, values.dim);
    }
};

template <class T, class S>
void decode_local(const Step& step, const T* query, const T* key, const T* value, const Cache<S>& cache,
                  T* out) {
    const long filled = std::min(step.tokens, step.position + 1), dim = step.dim;
#pragma omp parallel for num_threads(step.threads) if (step.worth_threads(filled))
    for (long row = 0; row < step.rows; ++row) {
        const Stored<T, S> stored(step, row, cache);
        stored.put(step.position % step.tokens, key + row * dim, value + row * dim);
        std::vector<T> scaled(dim), logits(round_up<T>(filled));
        for (long head = row * step.group; head < (row + 1) * step.group; ++head) {
            for (long j = 0; j < dim; ++j) scaled[j] = query[head * dim + j] * T(step.scale);
            stored.logits(scaled.data(), 0, filled, logits.data());
            soften<T>(logits.data(), filled);
            std::fill_n(out + head * dim, dim, T(0));
            stored.add(out + head * dim, logits.data(), 0, filled);
        }
    }
}

// Statistics of blocks: features (rows, blocks, parts, width), far keys (rows, blocks, far_width) and values.
template <class A>
struct Statistics {
    A *features, *far_keys, *far_values;
    long parts, far_width;  // far_width 0: no summary
    Router router;
    long width(long dim) const { return router == MEAN ? dim : 2 * dim; }
};

// Mean and variance, (dim,) each, of `count` rows from `first` on.
template <class T, class S>
void moments(const Rows<S>& rows, long first, long count, T* mean, T* variance) {
    std::vector<T> row(rows.dim);
    std::fill_n(mean, rows.dim, T(0));
    std::fill_n(variance, rows.dim, T(0));
    for (long i = first; i < first + count; ++i)
        add_stored<T>(mean, scale_of<T>(rows, i), rows.numbers + i * rows.dim, rows.dim);
    for (long j = 0; j < rows.dim; ++j) mean[j] /= count;
    for (long i = first; i < first + count; ++i) {
        get_row<T>(rows, i, row.data());
        for (long j = 0; j < rows.dim; ++j) variance[j] += (row[j] - mean[j]) * (row[j] - mean[j]) / count;
    }
}

// The statistics of a complete block of a row of the cache.
template <class T, class S, class A>
void summarise(const Stored<T, S>& stored, const Statistics<A>& to, long row_blocks, long block_number,
               long block) {
    const long dim = stored.keys.dim, first = block_number * block, width = to.width(dim);
    const long place = row_blocks + block_number;
    std::vector<T> mean(dim), variance(dim), row(dim);
    A* features = to.features + place * to.parts * width;
    if (to.router == MINMAX) {
        const long size = block / to.parts;
        for (long part = 0; part < to.parts; ++part, features += width) {
            get_row<T>(stored.keys, first + part * size, mean.data());  // the largest
            variance = mean;                                            // the smallest
            for (long i = 1; i < size; ++i) {
                get_row<T>(stored.keys, first + part * size + i, row.data());
                for (long j = 0; j < dim; ++j) {
                    mean[j] = std::max(mean[j], row[j]);
                    variance[j] = std::min(variance[j], row[j]);
                }
            }
            for (long j = 0; j < dim; ++j)
                narrow<T>(mean[j], features[j]), narrow<T>(variance[j], features[dim + j]);
        }
    }
    moments<T>(stored.keys, first, block, mean.data(), variance.data());
    for (long j = 0; j < dim; ++j) {
        if (to.router != MINMAX) narrow<T>(mean[j], features[j]);
        if (to.router == MOMENT) narrow<T>(variance[j], features[dim + j]);
        if (to.far_width) narrow<T>(mean[j], to.far_keys[place * to.far_width + j]);
        if (to.far_width > dim) narrow<T>(variance[j], to.far_keys[place * to.far_width + dim + j]);
    }
    if (!to.far_width) return;
    moments<T>(stored.values, first, block, mean.data(), variance.data());
    for (long j = 0; j < dim; ++j) narrow<T>(mean[j], to.far_values[place * dim + j]);
}

// The best blocks among 1 .. own - 1 for one row, whose heads share the choice; -1 where there are too few.
template <class T, class A>
void choose(const Step& step, const T* query, const Statistics<A>& statistics, long row_blocks, long own,
            std::vector<int32_t>& chosen) {
    const long dim = step.dim, width = statistics.width(dim);
    std::vector<T> features(width, T(0));
    for (long head = 0; head < step.group; ++head, query += dim)
        for (long j = 0; j < dim; ++j) {
            const T q = query[j], scaled = q * T(step.scale);
            if (statistics.router == MEAN) {
                features[j] += q;
            } else if (statistics.router == MINMAX) {
                features[j] += std::max(q, T(0));
                features[dim + j] += std::min(q, T(0));
            } else {
                features[j] += scaled;
                features[dim + j] += scaled * scaled / 2;
            }
        }
    std::vector<float> scores(chosen.size(), -INFINITY);
    Best best{scores.data(), chosen.data(), int(chosen.size())};
    float worst = -INFINITY;
    const long parts = statistics.parts;
    std::vector<T> of_parts(own * parts);
    dot_rows<T>(features.data(), statistics.features + row_blocks * parts * width, own * parts, width,
                of_parts.data());
    for (long b = 1; b < own; ++b) {
        const T* first = of_parts.data() + b * parts;
        const T score = *std::max_element(first, first + parts);
        if (float(score) > worst) {
            best.put(float(score), b);
            worst = best.worst();
        }
    }
}

template <class T, class S, class A>
void decode_global(const Step& step, long block, int top_k, bool exact, const T* query, const T* key,
                   const T* value, const Cache<S>& cache, const Statistics<A>& statistics, T* out) {
    const long dim = step.dim, own = step.position / block, count = step.position + 1;
    const bool everything = exact || own <= top_k + 1;  // every block is own, sink or chosen
#pragma omp parallel for num_threads(                                           \
        step.threads) if (step.worth_threads(everything ? count                 \
                                                        : (top_k + 2) * block + \
                                                                  own * (2 * statistics.parts + 3)))
    for (long row = 0; row < step.rows; ++row) {
        const Stored<T, S> stored(step, row, cache);
        const long row_blocks = row * (step.tokens / block);
        stored.put(step.position, key + row * dim, value + row * dim);
        if (count % block == 0) summarise<T>(stored, statistics, row_blocks, own, block);

        std::vector<int32_t> chosen(everything ? 0 : top_k, -1);
        if (!chosen.empty())
            choose<T>(step, query + row * step.group * dim, statistics, row_blocks, own, chosen);
        std::sort(chosen.begin(), chosen.end());
        std::vector<std::pair<long, long>> ranges;  // of tokens that are read exactly
        if (everything) {
            ranges.push_back({0, count});
        } else {
            ranges.push_back({0, block});
            for (const int32_t b : chosen)
                if (b >= 0) ranges.push_back({b * block, (b + 1) * block});
            ranges.push_back({own * block, count});
        }
        long exactly = 0;
        for (const auto& [begin, end] : ranges) exactly += end - begin;
        const long summaries =
            everything || !statistics.far_width ? 0 : own;  // 0 stands for the sink: closed

        std::vector<T> features(2 * dim), logits(round_up<T>(exactly + summaries));
        for (long head = row * step.group; head < (row + 1) * step.group; ++head) {
            for (long j = 0; j < dim; ++j) {
                features[j] = query[head * dim + j] * T(step.scale);
                features[dim + j] = features[j] * features[j] / 2;
            }
            T* next = logits.data();
            for (const auto& [begin, end] : ranges) {
                stored.logits(features.data(), begin, end, next);
                next += end - begin;
            }
            if (summaries) {
                dot_rows<T>(features.data(), statistics.far_keys + row_blocks * statistics.far_width,
                            summaries, statistics.far_width, next);
                for (long b = 0; b < summaries; ++b) next[b] += std::log(T(block));
                logits[exactly] = NEG_INF<T>;
                for (const int32_t b : chosen)
                    if (b >= 0) logits[exactly + b] = NEG_INF<T>;
            }
            soften<T>(logits.data(), exactly + summaries);
            T *sums = out + head * dim, *weights = logits.data();
            std::fill_n(sums, dim, T(0));
            for (const auto& [begin, end] : ranges) {
                stored.add(sums, weights, begin, end);
                weights += end - begin;
            }
            if (summaries)
                add_rows<T>(sums, weights, statistics.far_values + row_blocks * dim, summaries, dim);
        }
    }
}

// Queries, keys and values of one route, as its projection gives them: (batch, (heads + 2 kv_heads) * dim).
template <class T>
struct Projected {
    std::vector<T> query, key, value;  // (rows, group, dim), (rows, dim), rotated
    template <class A>
    Projected(const A* from, long batch, long kv_heads, long group, long dim, const T* cos, const T* sin)
        : query(batch * kv_heads * group * dim), key(batch * kv_heads * dim), value(batch * kv_heads * dim) {
        const long heads = kv_heads * group;
        for (long b = 0; b < batch; ++b, from += (heads + 2 * kv_heads) * dim) {
            turn(from, heads, dim, cos, sin, query.data() + b * heads * dim);
            turn(from + heads * dim, kv_heads, dim, cos, sin, key.data() + b * kv_heads * dim);
            for (long i = 0; i < kv_heads * dim; ++i)
                value.data()[b * kv_heads * dim + i] = widen<T>(from[(heads + kv_heads) * dim + i]);
        }
    }

    // Rotary position embedding: the two halves of a head are turned against each other.
    template <class A>
    static void turn(const A* from, long heads, long dim, const T* cos, const T* sin, T* to) {
        for (long h = 0; h < heads; ++h, from += dim, to += dim)
            for (long i = 0; i < dim / 2; ++i) {
                const T first = widen<T>(from[i]), second = widen<T>(from[dim / 2 + i]);
                to[i] = first * cos[i] - second * sin[i];
                to[dim / 2 + i] = second * cos[i] + first * sin[i];
            }
    }
};

struct Layer {
    long batch, group, dim;
    int threads;
    long global_kv_heads, global_tokens, block;
    int top_k;
    bool exact;  // the global route reads everything
    long local_kv_heads, window, position;
};

// Both routes of a layer: out (batch, (global heads + local heads) * dim). cos, sin: (2, dim / 2), the global
// route's first.
template <class T, class A, class S>
void decode_layer(const Layer& layer, const T* cos, const T* sin, const A* global, const A* local,
                  const Cache<S>& far, const Statistics<A>& statistics, const Cache<S>& near, A* out) {
    const long width = (layer.global_kv_heads + layer.local_kv_heads) * layer.group * layer.dim;
    const auto write = [&](const std::vector<T>& heads, long kv_heads, long offset) {
        const long size = kv_heads * layer.group * layer.dim;
        for (long b = 0; b < layer.batch; ++b)
            for (long i = 0; i < size; ++i)
                narrow<T>(heads.data()[b * size + i], out[b * width + offset + i]);
    };
    const auto step_of = [&](long kv_heads, long tokens) {
        return Step{layer.batch * kv_heads,           layer.group,  layer.dim, tokens, layer.position,
                    1 / std::sqrt(double(layer.dim)), layer.threads};
    };
    if (global) {
        const Projected<T> p(global, layer.batch, layer.global_kv_heads, layer.group, layer.dim, cos, sin);
        std::vector<T> heads(layer.batch * layer.global_kv_heads * layer.group * layer.dim);
        decode_global<T, S, A>(step_of(layer.global_kv_heads, layer.global_tokens), layer.block, layer.top_k,
                               layer.exact, p.query.data(), p.key.data(), p.value.data(), far, statistics,
                               heads.data());
        write(heads, layer.global_kv_heads, 0);
    }
    if (local) {
        const long pairs = layer.dim / 2;
        const Projected<T> p(local, layer.batch, layer.local_kv_heads, layer.group, layer.dim, cos + pairs,
                             sin + pairs);
        std::vector<T> heads(layer.batch * layer.local_kv_heads * layer.group * layer.dim);
        decode_local<T, S>(step_of(layer.local_kv_heads, layer.window), p.query.data(), p.key.data(),
                           p.value.data(), near, heads.data());
        write(heads, layer.local_kv_heads, layer.global_kv_heads * layer.group * layer.dim);
    }
}
