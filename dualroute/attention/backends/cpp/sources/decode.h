// One token of a text: both routes of a layer write it to their caches and read them.
//
// T is what is computed in, A the type of the model (projections, output, statistics of blocks, and keys and
// values but where a cache is quantised).
//
// A row of the softmax is short, top_k + 2 blocks and a pseudo-key for each past block,
// so all its logits are kept: no running softmax, two plain passes.
#pragma once

#include <vector>

#include "quantized.h"
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

// The tensors of a cache: (rows, tokens, dim).
template <class S>
struct Cache {
    S *keys, *values;
};

// Keys and values of one row of a cache.
template <class T, class S>
struct Stored {
    using Memory = Cache<S>;
    using Statistic = S;
    Rows<S> keys, values;
    long block, own;
    Stored(long row, long tokens, long dim, long block_size, long position, const Cache<S>& cache)
        : keys{cache.keys + row * tokens * dim, dim},
          values{cache.values + row * tokens * dim, dim},
          block(block_size),
          own(position / block_size) {}
    void put(long token, const T* key, const T* value) const {
        put_row<T>(keys, token, key);
        put_row<T>(values, token, value);
    }
    static long feature_bytes(Router router, long parts, long dim) {
        return parts * (router == MEAN ? dim : 2 * dim) * sizeof(S);
    }
    Rows<S> own_keys() const { return {keys.numbers + own * block * keys.dim, keys.dim}; }
    Rows<S> own_values() const { return {values.numbers + own * block * values.dim, values.dim}; }
    // The logits of tokens begin .. end-1.
    void logits(const T* scaled, long begin, long end, T* out) const {
        dot_rows<T>(scaled, keys.numbers + begin * keys.dim, end - begin, keys.dim, out);
    }
    // out (dim,) += the values of tokens begin .. end-1, times weights[0 ..], which are used up.
    void add(T* out, T* weights, long begin, long end) const {
        add_rows<T>(out, weights, values.numbers + begin * values.dim, end - begin, values.dim);
    }
    // The own block is complete: for the minmax router (null: another one) write the bounds of its `parts`.
    void complete(S* features, long parts) const {
        if (!features) return;
        const long dim = keys.dim, size = block / parts;
        std::vector<T> most(dim), least(dim), row(dim);
        features += own * parts * 2 * dim;
        for (long part = 0; part < parts; ++part, features += 2 * dim) {
            get_row<T>(own_keys(), part * size, most.data());
            least = most;
            for (long i = 1; i < size; ++i) {
                get_row<T>(own_keys(), part * size + i, row.data());
                for (long j = 0; j < dim; ++j) {
                    most[j] = std::max(most[j], row[j]);
                    least[j] = std::min(least[j], row[j]);
                }
            }
            for (long j = 0; j < dim; ++j)
                narrow<T>(most[j], features[j]), narrow<T>(least[j], features[dim + j]);
        }
    }
    // The minmax router's scores of the parts of blocks 0 .. count-1, for query features (2 dim,).
    void bound_scores(const T* query, const S* features, long parts, long count, T* out) const {
        dot_rows<T>(query, features, count * parts, 2 * keys.dim, out);
    }
};

template <class T, class S>
void decode_local(const Step& step, const T* query, const T* key, const T* value, const Cache<S>& cache,
                  T* out) {
    const long filled = std::min(step.tokens, step.position + 1), dim = step.dim;
#pragma omp parallel for num_threads(step.threads) if (step.worth_threads(filled))
    for (long row = 0; row < step.rows; ++row) {
        const Stored<T, S> stored(row, step.tokens, dim, step.tokens, step.position, cache);
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
    // Those of one row, of `blocks` blocks whose features have so many bytes.
    Statistics of_row(long row, long blocks, long dim, long feature_bytes) const {
        Statistics of = *this;
        of.features = reinterpret_cast<A*>(reinterpret_cast<char*>(features) + row * blocks * feature_bytes);
        of.far_keys += row * blocks * far_width;
        of.far_values += row * blocks * dim;
        return of;
    }
};

// Mean and variance, (dim,) each, of `count` rows.
template <class T, class S>
void moments(const Rows<S>& rows, long count, T* mean, T* variance) {
    std::vector<T> row(rows.dim);
    std::fill_n(mean, rows.dim, T(0));
    std::fill_n(variance, rows.dim, T(0));
    for (long i = 0; i < count; ++i) add_stored<T>(mean, T(1), rows.numbers + i * rows.dim, rows.dim);
    for (long j = 0; j < rows.dim; ++j) mean[j] /= count;
    for (long i = 0; i < count; ++i) {
        get_row<T>(rows, i, row.data());
        for (long j = 0; j < rows.dim; ++j) variance[j] += (row[j] - mean[j]) * (row[j] - mean[j]) / count;
    }
}

// The statistics of the own block of a row of the cache, which is complete. `to` begins with the row's.
template <class T, class K>
void summarise(const K& kept, const Statistics<typename K::Statistic>& to) {
    const auto keys = kept.own_keys();
    const long dim = keys.dim;
    kept.complete(to.router == MINMAX ? to.features : nullptr, to.parts);
    std::vector<T> mean(dim), variance(dim);
    moments<T>(keys, kept.block, mean.data(), variance.data());
    for (long j = 0; j < dim; ++j) {
        if (to.router != MINMAX) narrow<T>(mean[j], to.features[kept.own * to.width(dim) + j]);
        if (to.router == MOMENT) narrow<T>(variance[j], to.features[kept.own * to.width(dim) + dim + j]);
        if (to.far_width) narrow<T>(mean[j], to.far_keys[kept.own * to.far_width + j]);
        if (to.far_width > dim) narrow<T>(variance[j], to.far_keys[kept.own * to.far_width + dim + j]);
    }
    if (!to.far_width) return;
    moments<T>(kept.own_values(), kept.block, mean.data(), variance.data());
    for (long j = 0; j < dim; ++j) narrow<T>(mean[j], to.far_values[kept.own * dim + j]);
}

// The best blocks among 1 .. own - 1 for one row, whose heads share the choice; -1 where there are too few.
template <class T, class K>
void choose(const Step& step, const K& kept, const T* query,
            const Statistics<typename K::Statistic>& statistics, std::vector<int32_t>& chosen) {
    const long own = kept.own;
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
    if (statistics.router == MINMAX)
        kept.bound_scores(features.data(), statistics.features, parts, own, of_parts.data());
    else
        dot_rows<T>(features.data(), statistics.features, own, width, of_parts.data());
    for (long b = 1; b < own; ++b) {
        const T* first = of_parts.data() + b * parts;
        const T score = *std::max_element(first, first + parts);
        if (float(score) > worst) {
            best.put(float(score), b);
            worst = best.worst();
        }
    }
}

// What several layers choose together, (rows, top_k): the first writes it, those that follow read it; null: a
// layer chooses for itself.
struct SharedChoice {
    int32_t* blocks;
    bool follows;
};

// K is how a row of the cache is kept: `Stored` or `Quantized`.
template <class T, class K>
void decode_global(const Step& step, long block, int top_k, bool exact, const SharedChoice& shared,
                   const T* query, const T* key, const T* value, const typename K::Memory& cache,
                   const Statistics<typename K::Statistic>& of_rows, T* out) {
    const long dim = step.dim, own = step.position / block, count = step.position + 1;
    const bool everything = exact || own <= top_k + 1;  // every block is own, sink or chosen
#pragma omp parallel for num_threads(                        \
        step.threads) if (step.worth_threads(everything      \
                                                     ? count \
                                                     : (top_k + 2) * block + own * (2 * of_rows.parts + 3)))
    for (long row = 0; row < step.rows; ++row) {
        const K stored(row, step.tokens, dim, block, step.position, cache);
        const auto statistics = of_rows.of_row(row, step.tokens / block, dim,
                                               K::feature_bytes(of_rows.router, of_rows.parts, dim));
        stored.put(step.position, key + row * dim, value + row * dim);
        if (count % block == 0) summarise<T>(stored, statistics);

        std::vector<int32_t> chosen(everything ? 0 : top_k, -1);
        int32_t* const of_layers = shared.blocks ? shared.blocks + row * top_k : nullptr;
        if (of_layers && shared.follows)
            std::copy_n(of_layers, chosen.size(), chosen.begin());
        else if (!chosen.empty())
            choose<T>(step, stored, query + row * step.group * dim, statistics, chosen);
        if (of_layers && !shared.follows) std::copy(chosen.begin(), chosen.end(), of_layers);
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
                dot_rows<T>(features.data(), statistics.far_keys, summaries, statistics.far_width, next);
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
            if (summaries) add_rows<T>(sums, weights, statistics.far_values, summaries, dim);
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
    SharedChoice shared;
};

// Both routes of a layer: out (batch, (global heads + local heads) * dim). cos, sin: (2, dim / 2), the global
// route's first.
template <class T, class A, class K>
void decode_layer(const Layer& layer, const T* cos, const T* sin, const A* global, const A* local,
                  const typename K::Memory& far, const Statistics<typename K::Statistic>& statistics,
                  const Cache<A>& near, A* out) {
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
        decode_global<T, K>(step_of(layer.global_kv_heads, layer.global_tokens), layer.block, layer.top_k,
                            layer.exact, layer.shared, p.query.data(), p.key.data(), p.value.data(), far,
                            statistics, heads.data());
        write(heads, layer.global_kv_heads, 0);
    }
    if (local) {
        const long pairs = layer.dim / 2;
        const Projected<T> p(local, layer.batch, layer.local_kv_heads, layer.group, layer.dim, cos + pairs,
                             sin + pairs);
        std::vector<T> heads(layer.batch * layer.local_kv_heads * layer.group * layer.dim);
        decode_local<T, A>(step_of(layer.local_kv_heads, layer.window), p.query.data(), p.key.data(),
                           p.value.data(), near, heads.data());
        write(heads, layer.local_kv_heads, layer.global_kv_heads * layer.group * layer.dim);
    }
}
