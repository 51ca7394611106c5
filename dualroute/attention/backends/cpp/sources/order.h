// The order of keys that puts similar ones side by side: see core/clusters.py, `similar_order`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "stored.h"

// The channel of the keys numbers[0 .. size) that varies most; of equal ones the first.
template <class T, class S>
long widest_channel(const S* keys, long dim, const int32_t* numbers, long size, std::vector<double>& mean,
                    std::vector<double>& spread) {
    std::fill(mean.begin(), mean.end(), 0.0);
    std::fill(spread.begin(), spread.end(), 0.0);
    for (long i = 0; i < size; ++i)
        for (long j = 0; j < dim; ++j) mean[j] += double(widen<T>(keys[numbers[i] * dim + j]));
    for (long j = 0; j < dim; ++j) mean[j] /= size;
    for (long i = 0; i < size; ++i)
        for (long j = 0; j < dim; ++j) {
            const double off = double(widen<T>(keys[numbers[i] * dim + j])) - mean[j];
            spread[j] += off * off;
        }
    return std::max_element(spread.begin(), spread.end()) - spread.begin();
}

// order (spans, size): keys (spans, size, dim) are halved until cells of `cell` keys are left.
template <class T, class S>
void similar_order(const S* keys, long spans, long size, long dim, long cell, int threads, int32_t* order) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> mean(dim), spread(dim);
        std::vector<std::pair<double, int32_t>> values(size);
#pragma omp for schedule(dynamic)
        for (long span = 0; span < spans; ++span) {
            const S* of_span = keys + span * size * dim;
            int32_t* numbers = order + span * size;
            std::iota(numbers, numbers + size, 0);
            for (long count = size; count > cell; count /= 2)
                for (int32_t* part = numbers; part < numbers + size; part += count) {
                    const long channel = widest_channel<T>(of_span, dim, part, count, mean, spread);
                    for (long i = 0; i < count; ++i)
                        values[i] = {double(widen<T>(of_span[part[i] * dim + channel])), part[i]};
                    std::nth_element(values.begin(), values.begin() + count / 2, values.begin() + count);
                    for (long i = 0; i < count; ++i) part[i] = values[i].second;
                    std::sort(part, part + count / 2);  // a half is in the order of the text
                    std::sort(part + count / 2, part + count);
                }
        }
    }
}
