// Routed attention, forward: output (heads, slots, dim) and log-sum-exp (heads, slots).
#pragma once

#include "routed.h"

// While a piece is worked on, `sums` holds sums of exp(logit - peak) * value and `lse` the peaks.
template <class T, class S>
struct RoutedForward : Routed<T, S> {
    using Base = Routed<T, S>;
    using Base::shape, Base::far, Base::scratch, Base::scale, Base::begin, Base::slots;
    S* out;    // of the first head of the group
    T* peaks;  // likewise
    std::vector<T> norms;
    Buffer<T> sums;

    RoutedForward(const RoutedProblem<T, S>& problem, long kv, long first, long last, S* out, T* lse)
        : Base(problem, kv, first, last, false),
          out(out + kv * shape.group() * shape.slots * shape.dim),
          peaks(lse + kv * shape.group() * shape.slots),
          norms(shape.group() * slots, T(0)),
          sums(std::is_same_v<T, S> ? 0 : norms.size() * shape.dim) {
        for (long member = 0; member < shape.group(); ++member) {
            std::fill_n(sums_of(member, begin), slots * shape.dim, T(0));
            std::fill_n(peaks + member * shape.slots + begin, slots, T(UNSEEN));
        }
    }

    T* sums_of(long member, long token) {
        return in_place(out + (member * shape.slots + token) * shape.dim,
                        sums.data() + (member * slots + token - begin) * shape.dim);
    }

    void run() {
        this->for_blocks([this](auto... part) { read(part...); }, [this](auto... part) { own(part...); },
                         [this](auto... part) { finish(part...); });
    }

    // Tokens that chose the block read it.
    void read(const Keys<T>& keys, long, long member, const int32_t* tokens, int rows) {
        const long dim = shape.dim;
        const S* query = this->query + member * shape.slots * dim;
        T* peak = peaks + member * shape.slots;
        T* norm = norms.data() + member * slots - begin;
        std::fill_n(scratch.peak, TILE, T(UNSEEN));
        for (int i = 0; i < rows; ++i) {
            scale_row<T>(scratch.query.data() + i * dim, query + tokens[i] * dim, scale, dim);
            std::copy_n(sums_of(member, tokens[i]), dim, scratch.output.data() + i * dim);
            scratch.peak[i] = peak[tokens[i]];
            scratch.norm[i] = norm[tokens[i]];
        }
        attend_tile<T>(scratch.query.data(), dim, rows, keys, dim, Band{}, close_nothing<T>,
                       scratch.output.data(), scratch);
        for (int i = 0; i < rows; ++i) {
            std::copy_n(scratch.output.data() + i * dim, dim, sums_of(member, tokens[i]));
            peak[tokens[i]] = scratch.peak[i];
            norm[tokens[i]] = scratch.norm[i];
        }
    }

    // The block's own tokens read it, the sink and the summaries.
    void own(const Keys<T>& keys, long block, long member, long offset, int rows) {
        const long dim = shape.dim, slot = block * shape.block + offset, document = shape.first_block[block],
                   row = member * shape.slots + slot;
        T *sums = sums_of(member, slot), *peak = peaks + row,
          *norm = norms.data() + member * slots + slot - begin;
        std::fill_n(scratch.peak, TILE, T(UNSEEN));
        std::copy_n(peak, rows, scratch.peak);
        std::copy_n(norm, rows, scratch.norm);
        const T* query = scratch.query.data();
        scale_row<T>(scratch.query.data(), this->query + row * dim, scale, rows * dim);
        attend_tile<T>(query, dim, rows, keys, dim, this->own_band(offset), close_nothing<T>, sums, scratch);
        if (block > document)
            attend_tile<T>(query, dim, rows, this->sink_keys(document), dim, Band{}, close_nothing<T>, sums,
                           scratch);
        if (far.width) this->far_features(query, rows, scratch.to_query.data());
        this->for_far(block, [&](const Keys<T>& tile, long tile_begin) {
            attend_tile<T>(scratch.to_query.data(), far.width, rows, tile, dim, Band{},
                           this->close_far(slot, document, tile_begin), sums, scratch);
        });
        std::copy_n(scratch.peak, rows, peak);
        std::copy_n(scratch.norm, rows, norm);
    }

    // They have read all, and divide by the sum of their weights.
    void finish(long block, long member, long offset, int rows) {
        const long dim = shape.dim, slot = block * shape.block + offset, row = member * shape.slots + slot;
        T *sums = sums_of(member, slot), *norm = norms.data() + member * slots + slot - begin;
        for (int i = 0; i < rows; ++i) {
            scale_row<T>(sums + i * dim, sums + i * dim, 1 / norm[i], dim);
            peaks[row + i] += std::log(norm[i]);
        }
        put_numbers(out + row * dim, sums, rows * dim);
    }
};

// False, and nothing is done, where a token would read what it may not: memory beyond its piece.
template <class T, class S>
bool routed_forward(const RoutedProblem<T, S>& problem, S* out, T* lse) {
    if (!readable(problem.shape, problem.selected, problem.columns)) return false;
    for_pieces(problem.shape, [&](long, long kv, long first, long last) {
        RoutedForward<T, S>(problem, kv, first, last, out, lse).run();
    });
    return true;
}
