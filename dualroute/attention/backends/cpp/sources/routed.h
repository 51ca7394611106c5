// What both directions of routed attention share: one softmax over a token's own block, the sink, its chosen
// blocks and the far summary of all others.
//
// The chosen blocks are read block by block: the tokens that chose a block are gathered into tiles. Work is
// cut into pieces of neighbouring slots of one key head, which own their queries; as in local.h, a piece
// collects what it adds to keys before its own in a buffer, and the buffers are added up in order.
//
// A block's turn comes once. First the tokens that chose it read it, then its own tokens read it, the sink
// and the summaries. Causal, they are done: they have already met all blocks before it. Where tokens see both
// sides, all are done after the last block.
#pragma once

#include "tiles.h"

// Pseudo-keys of all blocks of a stream: (kv_heads, blocks, width) and (kv_heads, blocks, dim).
template <class T>
struct Far {
    const T *keys, *values;
    long width;  // 0: none
    Far of_head(long kv, const Shape& shape) const {
        if (!width) return *this;
        return {keys + kv * shape.blocks() * width, values + kv * shape.blocks() * shape.dim, width};
    }
};

template <class T, class S>
struct RoutedProblem {
    Shape shape;
    T scale;                       // 1 / sqrt(d)
    const S *query, *key, *value;  // (heads, slots, dim), (kv_heads, slots, dim)
    Far<T> far;
    const int32_t* selected;  // (kv_heads, slots, columns): the sink, then the chosen blocks, -1 = none
    int columns;
};

// Pieces of whole blocks. More than one for each key head only where the heads do not keep all threads busy:
// the fewer tokens a piece has, the fewer share a block's tile.
struct Pieces {
    long count, blocks;  // pieces of each key head; blocks of each piece
    explicit Pieces(const Shape& shape) {
        const long threads = shape.threads, least = std::max(1L, 1024 / shape.block);
        const long wanted =
            shape.kv_heads % threads == 0 ? 1 : (4 * threads + shape.kv_heads - 1) / shape.kv_heads;
        blocks = std::max((shape.blocks() + wanted - 1) / wanted, least);
        count = (shape.blocks() + blocks - 1) / blocks;
    }
};

// Calls work(piece, key head, first block, last + 1 block) for all pieces in parallel, the longest ones
// first.
template <class Work>
void for_pieces(const Shape& shape, Work work) {
    const Pieces pieces(shape);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(shape.threads)
    for (long order = 0; order < pieces.count; ++order)
        for (long kv = 0; kv < shape.kv_heads; ++kv) {
            const long piece = pieces.count - 1 - order, first = piece * pieces.blocks;
            work(piece, kv, first, std::min(shape.blocks(), first + pieces.blocks));
        }
}

// Whether all chosen blocks are -1 or others of the token's document, causal past ones.
inline bool readable(const Shape& shape, const int32_t* selected, int columns) {
    bool all = true;
#pragma omp parallel for reduction(&& : all) num_threads(shape.threads)
    for (long row = 0; row < shape.kv_heads * shape.slots; ++row) {
        const long own = row % shape.slots / shape.block;
        const int32_t first = shape.first_block[own];
        for (int c = 1; c < columns; ++c) {
            const int32_t block = selected[row * columns + c];
            all = all && (block < 0 || (block >= first && block < shape.end(own) && block != own &&
                                        !shape.hides(own, block, block + 1)));
        }
    }
    return all;
}

// Which tokens of a piece chose each block: tokens[start[b - first] .. start[b + 1 - first]), ascending.
struct Readers {
    std::vector<int32_t> start, tokens;
    Readers(const int32_t* selected, int columns, long begin, long end, long first, long last)
        : start(last - first + 2) {
        const auto for_choices = [&](auto step) {
            for (long token = begin; token < end; ++token)
                for (int c = 1; c < columns; ++c)
                    if (selected[token * columns + c] >= 0)
                        step(token, selected[token * columns + c] - first);
        };
        for_choices([&](long, long block) { ++start[block + 2]; });
        for (size_t i = 2; i < start.size(); ++i) start[i] += start[i - 1];
        tokens.resize(start.back());
        for_choices([&](long token, long block) { tokens[start[block + 1]++] = token; });
    }
};

// One piece of one key head. T is computed in, S how queries, keys and values are stored.
template <class T, class S>
struct Routed {
    const Shape& shape;
    const Far<T> far;  // of this head
    const T scale;
    const S *query, *key, *value;  // of the first head of the group
    const int32_t* selected;
    const int columns;
    const long first, last, start, stop;  // blocks of the piece, and of all that its tokens may read
    const long begin, slots;              // the same in slots: the first one, and how many
    const bool backward;
    const Readers readers;
    TurnedKeys<T, S> block_turned, sink_turned;
    Buffer<T> far_turned, far_values;  // summaries of the document `summarised`, in tiles
    long sink = -1, summarised = -1;
    Scratch<T> scratch;

    Routed(const RoutedProblem<T, S>& p, long kv, long first, long last, bool backward)
        : shape(p.shape),
          far(p.far.of_head(kv, shape)),
          scale(p.scale),
          query(p.query + kv * shape.group() * shape.slots * shape.dim),
          key(p.key + kv * shape.slots * shape.dim),
          value(p.value + kv * shape.slots * shape.dim),
          selected(p.selected + kv * shape.slots * p.columns),
          columns(p.columns),
          first(first),
          last(last),
          start(shape.first_block[first]),
          stop(std::max(last, shape.end(last - 1))),
          begin(first * shape.block),
          slots((last - first) * shape.block),
          backward(backward),
          readers(selected, columns, first * shape.block, last * shape.block, start, stop),
          block_turned(shape.dim, shape.block, backward),
          sink_turned(shape.dim, shape.block, backward),
          far_turned(far_tiles() * far.width * TILE),
          far_values(backward ? far_tiles() * shape.dim * TILE : 0),
          scratch(shape.dim, std::max(shape.dim, far.width), std::max<long>(TILE, block_turned.row)) {}

    const Keys<T>& turn(long block, TurnedKeys<T, S>& turned) const {
        const long place = block * shape.block * shape.dim;
        return turned.turn(key + place, value + place, shape.tokens(block));
    }
    const Keys<T>& sink_keys(long block) {
        if (sink == block) return sink_turned.view;
        sink = block;
        return turn(block, sink_turned);
    }

    // Last + 1 block of a document, as far as this piece looks.
    long end_of(long document) const {
        long end = document;
        while (end < stop && shape.first_block[end] == document) ++end;
        return end;
    }
    // Tiles of summaries of the longest document.
    long far_tiles() const {
        long most = 0;
        for (long document = start; far.width && document < stop;) {
            const long end = end_of(document);
            most = std::max(most, (end - document + TILE - 1) / TILE);
            document = end;
        }
        return most;
    }

    // Tiles begin with their document: nothing of another one is ever multiplied, not even by a weight of 0.
    void turn_summaries(long document) {
        if (summarised == document) return;
        summarised = document;
        const long end = end_of(document);
        for (long tile = 0; document + tile * TILE < end; ++tile) {
            const long block = document + tile * TILE, count = std::min<long>(TILE, end - block);
            transpose<T>(far_turned.data() + tile * far.width * TILE, TILE, far.keys + block * far.width,
                         far.width, count, far.width);
            if (backward)
                transpose<T>(far_values.data() + tile * shape.dim * TILE, TILE,
                             far.values + block * shape.dim, shape.dim, count, shape.dim);
        }
    }

    // Calls step(summaries, their first block) for the tiles of summaries that block `own` may read.
    template <class Step>
    void for_far(long own, Step step) {
        const long document = shape.first_block[own], end = shape.end(own);
        if (!far.width || end <= document + 1) return;
        turn_summaries(document);
        for (long tile = 0; document + tile * TILE < end; ++tile) {
            const long block = document + tile * TILE;
            if (shape.hides(own, block, block + TILE)) continue;
            step(Keys<T>{far.keys + block * far.width, far_turned.data() + tile * far.width * TILE,
                         far.values + block * shape.dim, far_values.data() + tile * shape.dim * TILE, TILE,
                         int(std::min<long>(TILE, end - block))},
                 block);
        }
    }

    // Adds log n to a tile of logits of summaries, and closes those that the tokens from `slot` on do not
    // read: the sink, chosen blocks and their own.
    auto close_far(long slot, long document, long tile_begin) const {
        return [this, slot, document, tile_begin](T* logits, int, int rows, int from, int to) {
            const T log_tokens = std::log(T(shape.block));
            const long block = slot / shape.block, own = block - tile_begin, last = shape.end(block) - 1;
            for (int r = 0; r < rows; ++r) {
                T* line = logits + r * TILE;
                for (int j = from; j < to; j += LANES<T>) store<T>(line + j, load<T>(line + j) + log_tokens);
                if (!shape.causal()) {  // the last block alone may be a part of one
                    if (last - tile_begin < to)
                        line[last - tile_begin] += std::log(T(shape.tokens(last))) - log_tokens;
                    if (own >= from && own < to) line[own] = NEG_INF<T>;
                }
                close_outside<T>(line, from, to, int(std::max(0L, document + 1 - tile_begin)), to);
                for (int range = 0; range < shape.ranges; ++range) {
                    const long shown = std::min<long>(to, shape.end(range, block) - tile_begin);
                    for (long j = std::max<long>(from, shape.begin(range, block) - tile_begin); j < shown;
                         ++j)
                        line[j] = NEG_INF<T>;
                }
                const int32_t* chosen = selected + (slot + r) * columns;
                for (int c = 1; c < columns; ++c) {
                    const long column = chosen[c] - tile_begin;
                    if (column >= from && column < to) line[column] = NEG_INF<T>;
                }
            }
        };
    }

    // Features of scaled queries: q, and q^2 / 2 where the width asks for it.
    void far_features(const T* scaled, int rows, T* features) const {
        for (int r = 0; r < rows; ++r)
            for (long j = 0; j < shape.dim; j += LANES<T>) {
                const Vector<T> q = load<T>(scaled + r * shape.dim + j);
                store<T>(features + r * far.width + j, q);
                if (far.width > shape.dim) store<T>(features + r * far.width + shape.dim + j, q * q * T(0.5));
            }
    }
    // Adds the gradient of the features, (rows, width), to that of the queries.
    void add_far_features(const T* gradient, const T* scaled, int rows, T* to_query) const {
        for (int r = 0; r < rows; ++r)
            for (long j = 0; j < shape.dim; j += LANES<T>) {
                const T* line = gradient + r * far.width + j;
                T* to = to_query + r * shape.dim + j;
                Vector<T> sum = load<T>(line);
                if (far.width > shape.dim)
                    sum += load<T>(line + shape.dim) * load<T>(scaled + r * shape.dim + j);
                store<T>(to, load<T>(to) + sum * scale);
            }
    }

    // For all blocks: calls read(keys, block, member of the group, tokens, rows) for the tiles of its
    // readers, and then, if the block is the piece's own, own(keys, block, member, offset inside it, rows)
    // for the tiles of its tokens; finish(block, member, offset, rows) when they have read all.
    template <class Read, class Own, class Finish>
    void for_blocks(Read read, Own own, Finish finish) {
        for (long block = start; block < stop; ++block) {
            const bool inside = block >= first && block < last;
            const int begin = readers.start[block - start], end = readers.start[block - start + 1];
            if (begin == end && !inside) continue;
            const Keys<T> keys = turn(block, block_turned);
            for (int at = begin; at < end; at += TILE)
                for (long member = 0; member < shape.group(); ++member)
                    read(keys, block, member, readers.tokens.data() + at, std::min(TILE, end - at));
            if (!inside || shape.copied(block)) continue;
            for_rows([&](long member, long offset, int rows) {
                own(keys, block, member, offset, rows);
                if (shape.causal()) finish(block, member, offset, rows);
            });
        }
        for (long block = first; block < last && !shape.causal(); ++block)
            for_rows([&](long member, long offset, int rows) { finish(block, member, offset, rows); });
    }
    // The tiles of a block's tokens.
    template <class Step>
    void for_rows(Step step) const {
        for (long member = 0; member < shape.group(); ++member)
            for (long offset = 0; offset < shape.block; offset += TILE)
                step(member, offset, int(std::min<long>(TILE, shape.block - offset)));
    }
    // What a block's own tokens see of it.
    Band own_band(long offset) const { return shape.causal() ? Band{true, offset, shape.block} : Band{}; }
};
