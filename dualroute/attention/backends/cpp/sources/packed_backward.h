// The gradient of a tile of queries and a tile of keys (tiles.h) by products of bfloat16 (matrix_unit.h).
//
// Everything is computed key by key: L^T = K Q^T and (dO V^T)^T = V dO^T, so that the log-sum-exps stand
// beside each other like the logits, and P^T and dS^T are left operands as they come. Only dQ^T = K^T dS^T
// needs to be turned at the end.
#pragma once

#include "tiles.h"

// What a tile of queries brings: their features (TILE, width) and the gradients of their outputs (TILE, dim),
// as right operands of products with the transposed and with themselves; log-sum-exps times log2(e), and
// deltas.
struct PackedQueries {
    const long dim, grad_depth;
    long width, depth;  // up to the widest
    Buffer<BFloat16> rows, grads, turned, pairs, grads_turned, grad_pairs;
    alignas(64) float lse[TILE], delta[TILE];
    int count = 0;

    PackedQueries(long width, long dim)
        : dim(dim),
          grad_depth(round_to(dim, DEPTH)),
          width(width),
          depth(round_to(width, DEPTH)),
          rows(TILE * width),
          grads(TILE * dim),
          turned(TILE * depth),
          pairs(TILE * width),
          grads_turned(TILE * grad_depth),
          grad_pairs(TILE * dim) {}

    void put(int row, float its_lse, float its_delta) {
        lse[row] = its_lse * LOG2_E;
        delta[row] = its_delta;
    }
    // After `rows` and `grads` and the numbers of `tokens` queries were put in their places.
    void pack(int tokens) {
        pack_features(tokens, dim);
        pack_transposed(grads_turned.data(), TILE, grad_depth, grads.data(), tokens, dim);
        pack_rows(grad_pairs.data(), TILE, grads.data(), tokens, dim);
    }
    // After rows of another width were put there.
    void pack_features(int tokens, long its_width) {
        count = tokens;
        width = its_width;
        depth = round_to(width, DEPTH);
        for (int r = tokens; r < TILE; ++r) put(r, INFINITY, 0);  // weights of 0
        pack_transposed(turned.data(), TILE, depth, rows.data(), tokens, width);
        pack_rows(pairs.data(), TILE, rows.data(), tokens, width);
    }
};

// Memory for one tile; `to_query` (width, TILE) collects what several tiles of keys give.
struct PackedScratch {
    Buffer<float> logits, slopes, to_query, turned, partial;
    Buffer<BFloat16> weights, left, right;
    explicit PackedScratch(long width)
        : logits(TILE * TILE),
          slopes(TILE * TILE),
          to_query(width * TILE),
          turned(TILE * width),
          partial(TILE * width),
          weights(TILE * TILE),
          left(TILE * TILE),
          right(TILE * TILE) {}

    void clear(long width) { std::fill_n(to_query.data(), width * TILE, 0.0f); }
    // The gradients of the queries, (TILE, width).
    const float* gradients(long width) {
        transpose<float>(turned.data(), width, to_query.data(), TILE, width, TILE);
        return turned.data();
    }
};

// to (count, columns) += left (SIDE rows more, at most) right. A product writes whole tiles.
inline void add_product(float* to, const BFloat16* left, const BFloat16* right, int count, int columns,
                        PackedScratch& scratch) {
    const int whole = count / SIDE * SIDE;
    product(to, columns, left, TILE, right, TILE * SIDE, whole, columns, TILE, true);
    if (whole == count) return;
    float* last = scratch.partial.data();
    product(last, columns, left + whole * TILE, TILE, right, TILE * SIDE, SIDE, columns, TILE, false);
    add_row<float>(to + long(whole) * columns, last, 1, long(count - whole) * columns);
}

// Adds the gradients of a tile to those of the scratch, dQ^T, and to dK (keys, width) and dV (keys, dim).
// `close(logits, first key, keys)` changes logits (keys, TILE) before they are multiplied by the scale.
template <class Close>
void attend_packed_backward(const PackedQueries& query, const Keys<float>& keys, const Band& band,
                            float scale, Close close, float* to_key, float* to_value,
                            PackedScratch& scratch) {
    const Packed& packed = keys.packed;
    const bool masked = band.masked && band.cuts(query.count, keys.count);
    const float factor = scale * LOG2_E;
    float *logits = scratch.logits.data(), *slopes = scratch.slopes.data();
    BFloat16 *weights = scratch.weights.data(), *left = scratch.left.data();
    for (int first = 0; first < keys.count; first += TILE) {
        const int count = std::min(TILE, keys.count - first), padded = round_to(count, DEPTH);
        product(logits, TILE, packed.key_rows + first * query.depth, query.depth, query.turned.data(),
                query.depth * SIDE, padded, TILE, query.depth, false);
        product(slopes, TILE, packed.value_rows + first * query.grad_depth, query.grad_depth,
                query.grads_turned.data(), query.grad_depth * SIDE, padded, TILE, query.grad_depth, false);
        close(logits, first, count);
        for (int key = 0; key < count; ++key) {
            const long line = key * TILE;
            if (masked)  // the rows r that see key `first + key`
                close_outside<float>(logits + line, 0, TILE, int(first + key - band.offset - band.ahead),
                                     int(first + key - band.offset + band.window));
            for (int r = 0; r < TILE; r += LANES<float>) {
                const Vector<float> weight = power_of_two(load<float>(logits + line + r) * factor -
                                                          load<float>(query.lse + r)),
                                    slope = load<float>(slopes + line + r) - load<float>(query.delta + r);
                store_half(weights + line + r, weight);
                store_half(left + line + r, weight * slope * scale);
            }
        }
        std::fill_n(weights + count * TILE, (padded - count) * TILE, BFloat16{});
        std::fill_n(left + count * TILE, (padded - count) * TILE, BFloat16{});
        pack_rows(scratch.right.data(), padded, left, padded, TILE);
        add_product(to_value + first * query.dim, weights, query.grad_pairs.data(), count, query.dim,
                    scratch);
        add_product(to_key + first * query.width, left, query.pairs.data(), count, query.width, scratch);
        product(scratch.to_query.data(), TILE, packed.key_columns + first, keys.row, scratch.right.data(),
                padded * SIDE, query.width, TILE, padded, true);
    }
}
