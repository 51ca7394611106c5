// Attention of a tile of queries to a tile of keys: one step of a running softmax, and its gradient.
//
// Forward (Milakov and Gimelshein, arXiv 1805.02867): each row keeps the largest logit so far (`peak`), the
// sum of exp(logit - peak) (`norm`) and the sum of exp(logit - peak) * value. Backward (Dao et al., arXiv
// 2205.14135, algorithm 4): with P = exp(logit - lse) and delta = sum(dO * O), both of the *whole* softmax,
//     dV = P^T dO     dS = P * (dO V^T - delta)     dQ = dS K     dK = dS^T Q.
//
// Queries come multiplied by 1 / sqrt(d). Rows are d numbers wide, d a multiple of the lanes.
#pragma once

#include <vector>

#include "stored.h"

constexpr int TILE = 64;   // query rows of a tile
constexpr int GROUP = 16;  // rows that share a range of columns where a tile is masked
// The peak of a row that has seen nothing: finite, so that differences are numbers.
constexpr float UNSEEN = -1e30f;

// Row r of a tile sees columns r + offset - window + 1 .. r + offset + ahead; not `masked`, all of them.
struct Band {
    bool masked = false;
    long offset = 0, window = 0, ahead = 0;
    int first(int row) const { return int(std::max(0L, row + offset - window + 1)); }
    int last(int row, int columns) const { return int(std::min<long>(columns, row + offset + ahead + 1)); }
    bool cuts(int rows, int columns) const {
        return offset + ahead < columns - 1 || rows - 1 + offset >= window;
    }
};

// Keys (or pseudo-keys) of a tile. `transposed` is (width, row), row >= count a multiple of the lanes; what
// stands beyond `count` is closed.
template <class T>
struct Keys {
    const T *keys, *transposed, *values, *values_transposed;
    long row;
    int count;
};

// Keys and values of up to `most` tokens, widened and transposed.
template <class T, class S>
struct TurnedKeys {
    long dim, row;
    bool values_too;
    Buffer<T> keys, values, keys_turned, values_turned;
    Keys<T> view{};

    TurnedKeys(long dim, long most, bool values_too)
        : dim(dim),
          row(round_up<T>(most)),
          values_too(values_too),
          keys(std::is_same_v<T, S> ? 0 : most * dim),
          values(std::is_same_v<T, S> ? 0 : most * dim),
          keys_turned(dim * row),
          values_turned(values_too ? dim * row : 0) {}

    const Keys<T>& turn(const S* key, const S* value, int count) {
        view = {widened<T>(key, count * dim, keys.data()),
                keys_turned.data(),
                widened<T>(value, count * dim, values.data()),
                values_turned.data(),
                row,
                count};
        transpose<T>(keys_turned.data(), row, view.keys, dim, count, dim);
        if (values_too) transpose<T>(values_turned.data(), row, view.values, dim, count, dim);
        return view;
    }
};

template <class T>
struct Scratch {
    Buffer<T> logits, gradients, query, grad, output, to_query;
    alignas(64) T peak[TILE], norm[TILE], decay[TILE], lse[TILE], delta[TILE];
    Scratch(long dim, long width, long keys)
        : logits(TILE * keys),
          gradients(TILE * keys),
          query(TILE * width),
          grad(TILE * dim),
          output(TILE * dim),
          to_query(TILE * width) {}
};

template <class T>
void close_outside(T* row, int begin, int end, int first, int last) {
    for (int j = begin; j < std::min(first, end); ++j) row[j] = NEG_INF<T>;
    for (int j = std::max(last, begin); j < end; ++j) row[j] = NEG_INF<T>;
}

// Logits of rows 0..rows-1, columns from..to-1 -> weights; updates peaks and norms, gives the decays of the
// past.
template <class T>
void softmax_step(T* logits, long row, int rows, int from, int to, T* peak, T* norm, T* decay) {
    T fresh[TILE];
    for (int r = 0; r < rows; ++r) {
        const T* line = logits + r * row;
        Vector<T> best = load<T>(line + from);
        for (int j = from + LANES<T>; j < to; j += LANES<T>) {
            const Vector<T> other = load<T>(line + j);
            best = best > other ? best : other;
        }
        fresh[r] = std::max(peak[r], largest<T>(best));
    }
    for (int r = rows; r < round_up<T>(rows); ++r) fresh[r] = peak[r];
    for (int r = 0; r < rows; r += LANES<T>) {
        const Vector<T> now = load<T>(fresh + r);
        store<T>(decay + r, exponential<T>(load<T>(peak + r) - now));
        store<T>(peak + r, now);
    }
    for (int r = 0; r < rows; ++r) {
        T* line = logits + r * row;
        Vector<T> sum{};
        for (int j = from; j < to; j += LANES<T>) {
            const Vector<T> weight = exponential<T>(load<T>(line + j) - fresh[r]);
            store<T>(line + j, weight);
            sum += weight;
        }
        norm[r] = norm[r] * decay[r] + total<T>(sum);
    }
}

// Calls step(first row, rows, first column, last + 1 column, that column rounded up) for the parts of a tile.
template <class T, class Step>
void for_parts(int rows, int columns, const Band& band, Step step) {
    const bool masked = band.masked && band.cuts(rows, columns);
    const int size = masked ? GROUP : rows;
    for (int r = 0; r < rows; r += size) {
        const int count = std::min(size, rows - r);
        const int from = masked ? band.first(r) / LANES<T> * LANES<T> : 0;
        const int to = masked ? band.last(r + count - 1, columns) : columns;
        if (from < to) step(r, count, from, to, round_up<T>(to), masked);
    }
}

// Adds a tile of keys to the running softmax of `rows` rows: `output` (rows, dim) is the sum so far, peaks
// and norms are those of the scratch.
template <class T, class Close>
void attend_tile(const T* query, int width, int rows, const Keys<T>& keys, int dim, const Band& band,
                 Close close, T* output, Scratch<T>& scratch) {
    for_parts<T>(rows, keys.count, band, [&](int r, int count, int from, int to, int end, bool masked) {
        T* logits = scratch.logits.data() + r * keys.row;
        multiply<T>(logits + from, keys.row, {query + r * width, width, 1}, keys.transposed + from, keys.row,
                    count, end - from, width, false);
        for (int i = 0; i < count; ++i)
            close_outside<T>(logits + i * keys.row, from, end, masked ? band.first(r + i) : 0,
                             masked ? band.last(r + i, keys.count) : keys.count);
        close(logits, r, count, from, end);
        softmax_step<T>(logits, keys.row, count, from, end, scratch.peak + r, scratch.norm + r,
                        scratch.decay + r);
        T* sums = output + r * dim;
        for (int i = 0; i < count; ++i)
            scale_row<T>(sums + i * dim, sums + i * dim, scratch.decay[r + i], dim);
        multiply<T>(sums, dim, {logits + from, keys.row, 1}, keys.values + from * dim, dim, count, dim,
                    to - from, true);
    });
}

// Adds the gradients of a tile to dQ (rows, width), dK and dV.
template <class T, class Close>
void attend_tile_backward(const T* query, int width, const T* grad, int rows, const Keys<T>& keys, int dim,
                          const Band& band, Close close, const T* lse, const T* delta, T* to_query, T* to_key,
                          T* to_value, Scratch<T>& scratch) {
    for_parts<T>(rows, keys.count, band, [&](int r, int count, int from, int to, int end, bool masked) {
        T* weights = scratch.logits.data() + r * keys.row;
        T* slopes = scratch.gradients.data() + r * keys.row;
        const T* rows_query = query + r * width;
        const T* rows_grad = grad + r * dim;
        multiply<T>(weights + from, keys.row, {rows_query, width, 1}, keys.transposed + from, keys.row, count,
                    end - from, width, false);
        multiply<T>(slopes + from, keys.row, {rows_grad, dim, 1}, keys.values_transposed + from, keys.row,
                    count, end - from, dim, false);
        for (int i = 0; i < count; ++i)
            close_outside<T>(weights + i * keys.row, from, end, masked ? band.first(r + i) : 0,
                             masked ? band.last(r + i, keys.count) : keys.count);
        close(weights, r, count, from, end);
        for (int i = 0; i < count; ++i) {
            T *weight = weights + i * keys.row, *slope = slopes + i * keys.row;
            for (int j = from; j < end; j += LANES<T>) {
                const Vector<T> p = exponential<T>(load<T>(weight + j) - lse[r + i]);
                store<T>(weight + j, p);
                store<T>(slope + j, p * (load<T>(slope + j) - delta[r + i]));
            }
        }
        const int columns = to - from;
        multiply<T>(to_value + from * dim, dim, {weights + from, 1, keys.row}, rows_grad, dim, columns, dim,
                    count, true);
        multiply<T>(to_key + from * width, width, {slopes + from, 1, keys.row}, rows_query, width, columns,
                    width, count, true);
        multiply<T>(to_query + r * width, width, {slopes + from, keys.row, 1}, keys.keys + from * width,
                    width, count, width, columns, true);
    });
}

// delta = sum(dO * O) of `rows` neighbouring rows.
template <class T, class S>
void softmax_delta(const S* grad, const S* out, int rows, long dim, T* delta) {
    for (int r = 0; r < rows; ++r) {
        Vector<T> sum{};
        for (long j = 0; j < dim; j += LANES<T>)
            sum += load_stored<T>(grad + r * dim + j) * load_stored<T>(out + r * dim + j);
        delta[r] = total<T>(sum);
    }
}

template <class T>
inline void close_nothing(T*, int, int, int, int) {}

struct Shape {
    long heads, kv_heads, slots, block, dim;  // dim: width of a row, a multiple of the lanes
    int threads;
    // Of each block: the first block of its document; and where tokens see both sides of themselves the last
    // + 1 one, and how many of its slots hold tokens. Causal, what follows a block is nobody's concern, and
    // slots without a token lie behind all others.
    const int32_t *first_block, *end_block, *block_tokens;
    // Of each block, causal: whether it is a copy, from which nobody asks, and `ranges` times, the blocks
    // begin..end-1 before it that its tokens do not read (see core/clusters.py). Null: nothing is hidden.
    const int32_t *copy, *hidden;
    int ranges;

    bool causal() const { return !end_block; }
    long blocks() const { return slots / block; }
    // Last + 1 block, of those that are not its own, that the tokens of block b may read.
    long end(long b) const { return causal() ? b : end_block[b]; }
    int tokens(long b) const { return int(causal() ? block : block_tokens[b]); }
    bool copied(long b) const { return copy && copy[b]; }
    // Whether the tokens of block b read none of the blocks from..to-1.
    bool hides(long b, long from, long to) const {
        bool all = false;
        for (int range = 0; range < ranges; ++range) all |= from >= begin(range, b) && to <= end(range, b);
        return all;
    }
    long begin(int range, long b) const { return hidden[2 * range * blocks() + b]; }
    long end(int range, long b) const { return hidden[(2 * range + 1) * blocks() + b]; }
    long group() const { return heads / kv_heads; }
    long document(long b) const { return first_block[b] * block; }  // first slot of the document of a block
};
