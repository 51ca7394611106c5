// The local route: o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over 0 <= t - s < window in one document,
// or over |t - s| < window where tokens see both sides.
//
// Work is cut into pieces of neighbouring tiles. A piece owns the gradients of its own keys; what it adds to
// keys outside of them goes to a buffer of its own, and the buffers are added up at the end, in order. So the
// sums do not depend on how many threads there are.
#pragma once

#include "packed_backward.h"

struct LocalTile {
    long begin, document, end;  // slots; the end is that of the document's tokens, causal of its blocks
    int rows, gap;              // slots without a token behind it, which are no rows of any tile
    int count(long key_tile) const { return int(std::min<long>(TILE, end - key_tile)); }
};

// Tiles of at most TILE rows that never cross documents, counted from the beginning of their document.
inline std::vector<LocalTile> local_tiles(const Shape& shape) {
    std::vector<LocalTile> tiles;
    for (long b = 0; b < shape.blocks();) {
        const long document = shape.document(b);
        while (b < shape.blocks() && shape.document(b) == document) ++b;
        const long end = (b - 1) * shape.block + shape.tokens(b - 1);
        for (long slot = document; slot < end; slot += TILE)
            tiles.push_back({slot, document, end, int(std::min<long>(TILE, end - slot)), 0});
        tiles.back().gap = int(b * shape.block - end);
    }
    return tiles;
}

// The keys that a token sees: up to `window - 1` before it, itself, and `ahead` behind it.
struct Reach {
    long window, ahead;
    Reach(const Shape& shape, long window) : window(window), ahead(shape.causal() ? 0 : window - 1) {}
    static long tiles(long keys) { return (keys + TILE - 1) / TILE; }
    long back() const { return tiles(window - 1); }  // tiles before and behind a tile of queries
    long forth() const { return tiles(ahead); }
};

// Turned tiles of keys and values, kept while the window moves over them.
template <class T, class S>
struct LocalKeys {
    long dim;
    std::vector<TurnedKeys<T, S>> ring;
    std::vector<long> held;

    LocalKeys(const Reach& reach, long dim, bool values_too, bool packs)
        : dim(dim), held(reach.back() + reach.forth() + 2, -1) {
        for (size_t i = 0; i < held.size(); ++i) ring.emplace_back(dim, TILE, values_too, packs);
    }

    // The tile of `count` keys from slot `begin` on, of a head whose rows begin at `key` and `value`.
    const Keys<T>& get(const S* key, const S* value, long begin, long document, int count) {
        const long place = (begin - document) / TILE % held.size();
        if (held[place] == begin) return ring[place].view;
        held[place] = begin;
        return ring[place].turn(key + begin * dim, value + begin * dim, count);
    }
};

// Calls step(keys, band, first slot) for the tiles of keys that a tile of queries sees.
template <class T, class S, class Step>
void for_local_keys(const LocalTile& tile, const Reach& reach, const S* key, const S* value,
                    LocalKeys<T, S>& cache, Step step) {
    const long oldest = std::max(tile.document, tile.begin - reach.window + 1);
    const long first = tile.document + (oldest - tile.document) / TILE * TILE;
    const long newest = std::min(tile.end, tile.begin + tile.rows + reach.ahead);
    for (long begin = first; begin < newest; begin += TILE)
        step(cache.get(key, value, begin, tile.document, tile.count(begin)),
             Band{true, tile.begin - begin, reach.window, reach.ahead}, begin);
}

struct LocalPieces {
    std::vector<LocalTile> tiles;
    long size, count;
    // At least four times as long as the window, to turn few keys twice; but in quarters at least, so that
    // one head keeps some threads busy even where the window hides nothing.
    explicit LocalPieces(const Shape& shape, long window) : tiles(local_tiles(shape)) {
        const long all = tiles.size();
        size = std::max(32L, std::min((window + TILE - 1) / TILE * 4, (all + 3) / 4));
        count = (all + size - 1) / size;
    }
    long first(long piece) const { return piece * size; }
    long last(long piece) const { return std::min<long>(tiles.size(), (piece + 1) * size); }
};

// The slots of a piece, and how many before and behind it its tokens see.
struct LocalSpan {
    long start, stop, past, future;
    LocalSpan(const LocalPieces& pieces, long piece, const Reach& reach) {
        const LocalTile &first = pieces.tiles[pieces.first(piece)],
                        &last = pieces.tiles[pieces.last(piece) - 1];
        start = first.begin;
        stop = last.begin + last.rows + last.gap;
        past = std::min(reach.back() * TILE, start - first.document);
        future = std::max(0L, std::min(reach.forth() * TILE, last.end - stop));
    }
    // Where a slot outside of it stands among those.
    long place(long slot) const { return past + slot - (slot < start ? start : stop); }
};

template <class T, class S>
void local_forward(const Shape& shape, long window, T scale, const S* query, const S* key, const S* value,
                   S* out, T* lse) {
    const LocalPieces pieces(shape, window);
    const Reach reach(shape, window);
    const long dim = shape.dim, row = shape.slots * dim;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(shape.threads)
    for (long head = 0; head < shape.heads; ++head)
        for (long piece = 0; piece < pieces.count; ++piece) {
            const long kv = head / shape.group();
            const Tiles held(shape.packs);
            Scratch<T> scratch(dim, dim, TILE, shape.packs);
            LocalKeys<T, S> cache(reach, dim, false, shape.packs);
            for (long i = pieces.first(piece); i < pieces.last(piece); ++i) {
                const LocalTile& tile = pieces.tiles[i];
                S* rows_out = out + head * row + tile.begin * dim;
                T* sums = in_place(rows_out, scratch.output.data());
                scratch.put_queries(0, query + head * row + tile.begin * dim, tile.rows, scale);
                std::fill_n(sums, tile.rows * dim, T(0));
                std::fill_n(scratch.peak, TILE, T(UNSEEN));
                std::fill_n(scratch.norm, TILE, T(0));
                for_local_keys(tile, reach, key + kv * row, value + kv * row, cache,
                               [&](const Keys<T>& keys, const Band& band, long) {
                                   attend_tile<T>(scratch.queries(scale), tile.rows, keys, dim, band,
                                                  CloseNothing{}, sums, scratch);
                               });
                for (int r = 0; r < tile.rows; ++r) {
                    scale_row<T>(sums + r * dim, sums + r * dim, 1 / scratch.norm[r], dim);
                    lse[head * shape.slots + tile.begin + r] = scratch.peak[r] + std::log(scratch.norm[r]);
                }
                put_numbers(rows_out, sums, tile.rows * dim);
                std::fill_n(rows_out + tile.rows * dim, tile.gap * dim, S{});
                std::fill_n(lse + head * shape.slots + tile.begin + tile.rows, tile.gap, T(0));
            }
        }
}

template <class T, class S>
void local_backward(const Shape& shape, long window, T scale, const S* grad, const S* query, const S* key,
                    const S* value, const S* out, const T* lse, S* to_query, T* to_key, T* to_value) {
    const LocalPieces pieces(shape, window);
    const Reach reach(shape, window);
    const long dim = shape.dim, row = shape.slots * dim;
    // Gradients of the keys, then of the values, that lie before a piece and behind it.
    std::vector<std::vector<T>> outside(shape.kv_heads * pieces.count);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(shape.threads)
    for (long kv = 0; kv < shape.kv_heads; ++kv)
        for (long piece = 0; piece < pieces.count; ++piece) {
            const Tiles held(shape.packs);
            Scratch<T> scratch(dim, dim, TILE, false);
            LocalKeys<T, S> cache(reach, dim, true, shape.packs);
            PackedQueries packed(dim, dim);
            PackedScratch packed_scratch(dim);
            const LocalSpan own(pieces, piece, reach);
            std::vector<T>& others = outside[kv * pieces.count + piece];
            others.assign(2 * (own.past + own.future) * dim, T(0));
            std::fill_n(to_key + (kv * shape.slots + own.start) * dim, (own.stop - own.start) * dim, T(0));
            std::fill_n(to_value + (kv * shape.slots + own.start) * dim, (own.stop - own.start) * dim, T(0));
            for (long i = pieces.first(piece); i < pieces.last(piece); ++i)
                for (long head = kv * shape.group(); head < (kv + 1) * shape.group(); ++head) {
                    const LocalTile& tile = pieces.tiles[i];
                    const long place = head * row + tile.begin * dim;
                    const T* rows_lse = lse + head * shape.slots + tile.begin;
                    softmax_delta<T>(grad + place, out + place, tile.rows, dim, scratch.delta);
                    // Calls step(keys, band, sums of their gradients, of their values') for all tiles of
                    // keys.
                    const auto for_keys = [&](auto step) {
                        for_local_keys(tile, reach, key + kv * row, value + kv * row, cache,
                                       [&](const Keys<T>& keys, const Band& band, long begin) {
                                           const bool inside = begin >= own.start && begin < own.stop;
                                           T* key_sums = inside ? to_key + kv * row + begin * dim
                                                                : others.data() + own.place(begin) * dim;
                                           T* value_sums = inside ? to_value + kv * row + begin * dim
                                                                  : key_sums + (own.past + own.future) * dim;
                                           step(keys, band, key_sums, value_sums);
                                       });
                    };
                    const T* sums = scratch.to_query.data();
                    if constexpr (std::is_same_v<S, BFloat16>) {
                        if (shape.packs) {
                            copy_row(packed.rows.data(), query + place, tile.rows * dim);
                            copy_row(packed.grads.data(), grad + place, tile.rows * dim);
                            for (int r = 0; r < tile.rows; ++r) packed.put(r, rows_lse[r], scratch.delta[r]);
                            packed.pack(tile.rows);
                            packed_scratch.clear(dim);
                            for_keys([&](const Keys<T>& keys, const Band& band, T* key_sums, T* value_sums) {
                                attend_packed_backward(packed, keys, band, scale, CloseNothing{}, key_sums,
                                                       value_sums, packed_scratch);
                            });
                            sums = packed_scratch.gradients(dim);
                        }
                    }
                    if (!shape.packs) {
                        T* collected = scratch.to_query.data();
                        scale_row<T>(scratch.query.data(), query + place, scale, tile.rows * dim);
                        const T* rows_grad = widened<T>(grad + place, tile.rows * dim, scratch.grad.data());
                        std::fill_n(collected, tile.rows * dim, T(0));
                        for_keys([&](const Keys<T>& keys, const Band& band, T* key_sums, T* value_sums) {
                            attend_tile_backward<T>(scratch.query.data(), dim, rows_grad, tile.rows, keys,
                                                    dim, band, CloseNothing{}, rows_lse, scratch.delta,
                                                    collected, key_sums, value_sums, scratch);
                        });
                        scale_row<T>(collected, collected, scale, tile.rows * dim);
                    }
                    put_numbers(to_query + place, sums, tile.rows * dim);
                    std::fill_n(to_query + place + tile.rows * dim, tile.gap * dim, S{});
                }
        }
#pragma omp parallel for num_threads(shape.threads)
    for (long kv = 0; kv < shape.kv_heads; ++kv)
        for (long piece = 0; piece < pieces.count; ++piece) {
            const LocalSpan own(pieces, piece, reach);
            const T* sums = outside[kv * pieces.count + piece].data();
            for (T* to : {to_key + kv * row, to_value + kv * row}) {
                add_row<T>(to + (own.start - own.past) * dim, sums, T(1), own.past * dim);
                add_row<T>(to + own.stop * dim, sums + own.past * dim, T(1), own.future * dim);
                sums += (own.past + own.future) * dim;
            }
        }
}
