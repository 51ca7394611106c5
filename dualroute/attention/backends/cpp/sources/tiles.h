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

#include "matrix_unit.h"

constexpr int TILE = 64;    // query rows of a tile
constexpr int GROUP = 16;   // rows that share a range of columns where a tile is masked
constexpr int PACKED = 32;  // rows that are worked on at once where operands are packed
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

// For products of bfloat16, null where floats are multiplied: forward the right operands of Q K^T, whose rows
// are `depth` numbers, and of P V; backward keys, values and transposed keys as left operands.
struct Packed {
    const BFloat16 *keys = nullptr, *values = nullptr;
    long depth = 0;
    const BFloat16 *key_rows = nullptr, *value_rows = nullptr, *key_columns = nullptr;
};

// Keys (or pseudo-keys) of a tile. `transposed` is (width, row), row >= count a multiple of the lanes, packed
// of DEPTH; what stands beyond `count` is closed. Packed, the other pointers are null.
template <class T>
struct Keys {
    const T *keys, *transposed, *values, *values_transposed;
    long row;
    int count;
    Packed packed{};
};

// Queries of a tile: rows of `width` numbers that are multiplied by 1 / sqrt(d), or packed as they are.
template <class T>
struct Queries {
    const T* rows;
    int width;
    const BFloat16* packed;
    T scale;
};

// Keys and values of up to `most` tokens, widened and transposed, or packed.
template <class T, class S>
struct TurnedKeys {
    long dim, row, depth;
    bool values_too, packs;
    Buffer<T> keys, values, keys_turned, values_turned;
    Buffer<BFloat16> key_pairs, value_pairs, key_columns;  // backward rows and columns
    Keys<T> view{};

    TurnedKeys(long dim, long most, bool values_too, bool packs)
        : dim(dim),
          row(packs ? round_to(most, DEPTH) : round_up<T>(most)),
          depth(round_to(dim, DEPTH)),
          values_too(values_too),
          packs(packs),
          keys(packs || std::is_same_v<T, S> ? 0 : most * dim),
          values(packs || std::is_same_v<T, S> ? 0 : most * dim),
          keys_turned(packs ? 0 : dim * row),
          values_turned(values_too && !packs ? dim * row : 0),
          key_pairs(packs ? depth * row : 0),
          value_pairs(packs ? depth * row : 0),
          key_columns(packs && values_too ? dim * row : 0) {}

    const Keys<T>& turn(const S* key, const S* value, int count) {
        if constexpr (std::is_same_v<S, BFloat16>)
            if (packs && values_too) {
                pack_columns(key_columns.data(), row, key, count, dim, key_pairs.data());
                pack_left(key_pairs.data(), row, depth, key, count, dim);
                pack_left(value_pairs.data(), row, depth, value, count, dim);
                return view = {{},
                               {},
                               {},
                               {},
                               row,
                               count,
                               {{}, {}, depth, key_pairs.data(), value_pairs.data(), key_columns.data()}};
            } else if (packs) {
                pack_transposed(key_pairs.data(), row, depth, key, count, dim);
                pack_rows(value_pairs.data(), row, value, count, dim);
                return view = {{}, {}, {}, {}, row, count, {key_pairs.data(), value_pairs.data(), depth}};
            }
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
    long dim, depth;
    bool packs;
    Buffer<T> logits, gradients, query, grad, output, to_query;
    Buffer<BFloat16> packed_query, weights;
    alignas(64) T peak[TILE], norm[TILE], lse[TILE], delta[TILE];
    // For keys of up to `keys` rows, queries of `width` numbers.
    Scratch(long dim, long width, long keys, bool packs)
        : dim(dim),
          depth(round_to(dim, DEPTH)),
          packs(packs),
          logits(TILE * keys),
          gradients(TILE * keys),
          query(TILE * width),
          grad(TILE * dim),
          output(TILE * dim),
          to_query(TILE * width),
          packed_query(packs ? TILE * depth : 0),
          weights(packs ? TILE * keys : 0) {
        if (packs) std::fill_n(packed_query.data(), TILE * depth, BFloat16{});
    }

    // Queries of a tile from its row `row` on.
    template <class S>
    void put_queries(int row, const S* from, int rows, T scale) {
        if constexpr (std::is_same_v<S, BFloat16>)
            if (packs) {
                for (int r = 0; r < rows; ++r)
                    copy_row(packed_query.data() + (row + r) * depth, from + r * dim, dim);
                return;
            }
        scale_row<T>(query.data() + row * dim, from, scale, rows * dim);
    }
    Queries<T> queries(T scale) const { return {query.data(), int(dim), packed_query.data(), scale}; }
};

template <class T>
void close_outside(T* row, int begin, int end, int first, int last) {
    for (int j = begin; j < std::min(first, end); ++j) row[j] = NEG_INF<T>;
    for (int j = std::max(last, begin); j < end; ++j) row[j] = NEG_INF<T>;
}

// Logits of rows 0..rows-1, columns from..to-1 -> weights; updates peaks and norms, and lets the past of
// `sums` (rows, dim) decay. What the logits are, times `scale`; `power(x, shift)` is e^(x scale - shift),
// `put` keeps the weights.
template <class T, class Power, class Put>
void softmax_step(const T* logits, long row, int rows, int from, int to, T scale, T* peak, T* norm, T* sums,
                  int dim, Power power, Put put) {
    for (int begin = 0; begin < rows; begin += LANES<T>) {
        const int count = std::min(LANES<T>, rows - begin);
        Vector<T> each[LANES<T>];
        for (int i = 0; i < LANES<T>; ++i) {
            const T* line = logits + (begin + std::min(i, count - 1)) * row;
            each[i] = load<T>(line + from);
            for (int j = from + LANES<T>; j < to; j += LANES<T>) {
                const Vector<T> other = load<T>(line + j);
                each[i] = each[i] > other ? each[i] : other;
            }
        }
        const Vector<T> most = largest_of_each<T>(each) * scale, past = load<T>(peak + begin),
                        now = past > most ? past : most, kept = exponential<T>(past - now);
        store<T>(peak + begin, now);
        for (int i = 0; i < count; ++i)
            scale_row<T>(sums + (begin + i) * dim, sums + (begin + i) * dim, kept[i], dim);
        for (int i = 0; i < count; ++i) {
            const long place = (begin + i) * row;
            const T shift = peak[begin + i];
            each[i] = Vector<T>{};
            for (int j = from; j < to; j += LANES<T>) {
                const Vector<T> weight = power(load<T>(logits + place + j), shift);
                put(place + j, weight);
                each[i] += weight;
            }
        }
        for (int i = count; i < LANES<T>; ++i) each[i] = Vector<T>{};
        store<T>(norm + begin, load<T>(norm + begin) * kept + total_of_each<T>(each));
    }
}

// Calls step(first row, rows, first column, last + 1 column, that column rounded up) for the parts of a tile
// of at most `most` rows, masked of `group`; columns are rounded to multiples of `unit`.
template <class Step>
void for_parts(int rows, int columns, const Band& band, int most, int group, int unit, Step step) {
    const bool masked = band.masked && band.cuts(rows, columns);
    const int size = masked ? group : most;
    for (int r = 0; r < rows; r += size) {
        const int count = std::min(size, rows - r);
        const int from = masked ? band.first(r) / unit * unit : 0;
        const int to = masked ? band.last(r + count - 1, columns) : columns;
        if (from < to) step(r, count, from, to, round_to(to, unit), masked);
    }
}

// Adds a tile of keys to the running softmax of `rows` rows: `output` (rows, dim) is the sum so far, peaks
// and norms are those of the scratch.
template <class T, class Close>
void attend_tile(const Queries<T>& query, int rows, const Keys<T>& keys, int dim, const Band& band,
                 Close close, T* output, Scratch<T>& scratch) {
    const Packed& packed = keys.packed;
    const long row = keys.row;
    const int most = packed.keys ? PACKED : TILE, group = packed.keys ? PACKED : GROUP,
              unit = packed.keys ? DEPTH : LANES<T>;
    for_parts(rows, keys.count, band, most, group, unit,
              [&](int r, int count, int from, int to, int end, bool masked) {
                  T *logits = scratch.logits.data(), *sums = output + r * dim;  // of this part alone
                  const int padded = round_to(count, SIDE);  // rows of a product of bfloat16
                  if constexpr (std::is_same_v<T, float>)
                      if (packed.keys)
                          product(logits + from, row, query.packed + r * packed.depth, packed.depth,
                                  packed.keys + from * packed.depth, packed.depth * SIDE, padded, end - from,
                                  packed.depth, false);
                  if (!packed.keys)
                      multiply<T>(logits + from, row, {query.rows + r * query.width, query.width, 1},
                                  keys.transposed + from, row, count, end - from, query.width, false);
                  for (int i = 0; i < count; ++i)
                      close_outside<T>(logits + i * row, from, end, masked ? band.first(r + i) : 0,
                                       masked ? band.last(r + i, keys.count) : keys.count);
                  close(logits, r, count, from, end);
                  const auto step = [&](T scale, auto power, auto put) {
                      softmax_step<T>(logits, row, count, from, end, scale, scratch.peak + r,
                                      scratch.norm + r, sums, dim, power, put);
                  };
                  if constexpr (std::is_same_v<T, float>)
                      if (packed.keys) {
                          BFloat16* weights = scratch.weights.data();
                          const float factor = query.scale * LOG2_E;
                          step(
                              query.scale,
                              [=](auto x, float shift) { return power_of_two(x * factor - shift * LOG2_E); },
                              [=](long place, auto weight) { store_half(weights + place, weight); });
                          for (int i = count; i < padded; ++i)
                              std::fill_n(weights + i * row + from, end - from, BFloat16{});
                          product(sums, dim, weights + from, row, packed.values + from * SIDE, row * SIDE,
                                  padded, dim, end - from, true);
                          return;
                      }
                  step(
                      T(1), [](auto x, T shift) { return exponential<T>(x - shift); },
                      [=](long place, auto weight) { store<T>(logits + place, weight); });
                  multiply<T>(sums, dim, {logits + from, row, 1}, keys.values + from * dim, dim, count, dim,
                              to - from, true);
              });
}

// Adds the gradients of a tile to dQ (rows, width), dK and dV.
template <class T, class Close>
void attend_tile_backward(const T* query, int width, const T* grad, int rows, const Keys<T>& keys, int dim,
                          const Band& band, Close close, const T* lse, const T* delta, T* to_query, T* to_key,
                          T* to_value, Scratch<T>& scratch) {
    for_parts(rows, keys.count, band, TILE, GROUP, LANES<T>,
              [&](int r, int count, int from, int to, int end, bool masked) {
                  T* weights = scratch.logits.data() + r * keys.row;
                  T* slopes = scratch.gradients.data() + r * keys.row;
                  const T* rows_query = query + r * width;
                  const T* rows_grad = grad + r * dim;
                  multiply<T>(weights + from, keys.row, {rows_query, width, 1}, keys.transposed + from,
                              keys.row, count, end - from, width, false);
                  multiply<T>(slopes + from, keys.row, {rows_grad, dim, 1}, keys.values_transposed + from,
                              keys.row, count, end - from, dim, false);
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
                  multiply<T>(to_value + from * dim, dim, {weights + from, 1, keys.row}, rows_grad, dim,
                              columns, dim, count, true);
                  multiply<T>(to_key + from * width, width, {slopes + from, 1, keys.row}, rows_query, width,
                              columns, width, count, true);
                  multiply<T>(to_query + r * width, width, {slopes + from, keys.row, 1},
                              keys.keys + from * width, width, count, width, columns, true);
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

struct CloseNothing {
    template <class... Part>
    void operator()(Part...) const {}
};

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
    bool packs;  // products are those of bfloat16

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
