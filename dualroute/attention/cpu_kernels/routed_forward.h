// Routed attention, forward: output (heads, slots, dim) and log-sum-exp (heads, slots).
#pragma once

#include "routed.h"

// While a piece is worked on, `out` holds sums of exp(logit - peak) * value and `lse` the peaks.
template <class T>
struct RoutedForward : Routed<T> {
    using Routed<T>::shape, Routed<T>::far, Routed<T>::scratch, Routed<T>::scale;
    T *out, *peaks;  // of the first head of the group
    std::vector<T> norms;
    long slots, begin;

    RoutedForward(const RoutedProblem<T>& problem, long kv, long first, long last, T* out, T* lse)
        : Routed<T>(problem, kv, first, last, false),
          out(out + kv * shape.group() * shape.slots * shape.dim),
          peaks(lse + kv * shape.group() * shape.slots),
          norms(shape.group() * (last - first) * shape.block, T(0)),
          slots((last - first) * shape.block),
          begin(first * shape.block) {
        for (long member = 0; member < shape.group(); ++member) {
            const long row = member * shape.slots + begin;
            std::fill_n(this->out + row * shape.dim, slots * shape.dim, T(0));
            std::fill_n(peaks + row, slots, T(UNSEEN));
        }
    }

    void run() {
        this->for_blocks([this](auto... part) { read(part...); }, [this](auto... part) { finish(part...); });
    }

    // Tokens that chose the block read it.
    void read(const Keys<T>& keys, long, long member, const int32_t* tokens, int rows) {
        const long dim = shape.dim;
        const T* query = this->query + member * shape.slots * dim;
        T *sums = out + member * shape.slots * dim, *peak = peaks + member * shape.slots;
        T* norm = norms.data() + member * slots - begin;
        std::fill_n(scratch.peak, TILE, T(UNSEEN));
        for (int i = 0; i < rows; ++i) {
            scale_row<T>(scratch.query.data() + i * dim, query + tokens[i] * dim, scale, dim);
            std::copy_n(sums + tokens[i] * dim, dim, scratch.output.data() + i * dim);
            scratch.peak[i] = peak[tokens[i]];
            scratch.norm[i] = norm[tokens[i]];
        }
        attend_tile<T>(scratch.query.data(), dim, rows, keys, dim, Band{}, close_nothing<T>,
                       scratch.output.data(), scratch);
        for (int i = 0; i < rows; ++i) {
            std::copy_n(scratch.output.data() + i * dim, dim, sums + tokens[i] * dim);
            peak[tokens[i]] = scratch.peak[i];
            norm[tokens[i]] = scratch.norm[i];
        }
    }

    // The block's own tokens read it, the sink and the summaries, and divide by the sum of their weights.
    void finish(const Keys<T>& keys, long block, long member, long offset, int rows) {
        const long dim = shape.dim, slot = block * shape.block + offset, document = shape.first_block[block],
                   row = member * shape.slots + slot;
        T *sums = out + row * dim, *peak = peaks + row, *norm = norms.data() + member * slots + slot - begin;
        std::fill_n(scratch.peak, TILE, T(UNSEEN));
        std::copy_n(peak, rows, scratch.peak);
        std::copy_n(norm, rows, scratch.norm);
        const T* query = scratch.query.data();
        scale_row<T>(scratch.query.data(), this->query + row * dim, scale, rows * dim);
        attend_tile<T>(query, dim, rows, keys, dim, Band{true, offset, shape.block}, close_nothing<T>, sums,
                       scratch);
        if (block > document)
            attend_tile<T>(query, dim, rows, this->sink_keys(document), dim, Band{}, close_nothing<T>, sums,
                           scratch);
        if (far.width) this->far_features(query, rows, scratch.to_query.data());
        this->for_far(block, [&](const Keys<T>& tile, long tile_begin) {
            attend_tile<T>(scratch.to_query.data(), far.width, rows, tile, dim, Band{},
                           this->close_far(slot, document, tile_begin), sums, scratch);
        });
        for (int i = 0; i < rows; ++i) {
            scale_row<T>(sums + i * dim, sums + i * dim, 1 / scratch.norm[i], dim);
            peak[i] = scratch.peak[i] + std::log(scratch.norm[i]);
        }
    }
};

template <class T>
void routed_forward(const RoutedProblem<T>& problem, T* out, T* lse) {
    for_pieces(problem.shape, [&](long, long kv, long first, long last) {
        RoutedForward<T>(problem, kv, first, last, out, lse).run();
    });
}
