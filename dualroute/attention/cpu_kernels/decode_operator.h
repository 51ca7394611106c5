// The operator dualroute::cpu_decode_layer: tensors, and the addresses of caches, -> `decode_layer` on
// memory.
//
// Registered with torch's stable interface, in C++, because a compiled step calls it once a layer: by way of
// Python a call would take as long as the attention of a short text.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "decode.h"

// A row of `cache_memory` in decode.py: pointers, 0 where there is nothing, and sizes.
struct CacheMemory {
    int64_t far[4], near[4], features, summary_keys, summary_values;
    int64_t far_rows, far_tokens, block, router, parts, far_width;
    int64_t near_rows, window, exact, int8;
};

template <class N>
N* numbers(int64_t address) {
    return reinterpret_cast<N*>(address);
}
template <class S>
Cache<S> cache_of(const int64_t (&a)[4]) {
    return {numbers<S>(a[0]), numbers<S>(a[1]), numbers<float>(a[2]), numbers<float>(a[3])};
}

using torch::stable::Tensor;

template <class N>
const N* numbers(const Tensor& tensor) {
    return static_cast<const N*>(tensor.const_data_ptr());
}
template <class N>
const N* numbers(const std::optional<Tensor>& tensor) {
    return tensor ? numbers<N>(*tensor) : nullptr;
}

// An uninitialised (count, width) tensor of the type of `like`; not `new_empty`, which asks the dispatcher.
inline Tensor new_rows(const Tensor& like, int64_t count, int64_t width) {
    const int64_t sizes[] = {count, width}, strides[] = {width, 1};
    int32_t type;
    AtenTensorHandle made;
    if (aoti_torch_get_dtype(like.get(), &type) ||
        aoti_torch_empty_strided(2, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &made))
        throw std::runtime_error("the heads of a token cannot be allocated");
    return Tensor(made);
}

// See `decode_layer` in decode.py.
inline Tensor cpu_decode_layer(const Tensor& position, const Tensor& cos, const Tensor& sin,
                               const std::optional<Tensor>& global_rows,
                               const std::optional<Tensor>& local_rows, const Tensor& memory, int64_t index,
                               int64_t dim, int64_t group, int64_t top_k) {
    const CacheMemory& m = numbers<CacheMemory>(memory)[index];
    const Tensor& rows = global_rows ? *global_rows : *local_rows;
    const long batch = rows.size(0), far_heads = m.far_rows / batch, near_heads = m.near_rows / batch;
    const Layer layer{batch,        group,        dim,      int(torch::stable::get_num_threads()),
                      far_heads,    m.far_tokens, m.block,  int(top_k),
                      m.exact != 0, near_heads,   m.window, *numbers<int64_t>(position)};
    const Tensor out = new_rows(rows, batch, (far_heads + near_heads) * group * dim);
    const auto run = [&](auto computed, auto model, auto stored) {
        using T = decltype(computed);
        using A = decltype(model);
        using S = decltype(stored);
        const Statistics<A> statistics{numbers<A>(m.features),
                                       numbers<A>(m.summary_keys),
                                       numbers<A>(m.summary_values),
                                       m.parts,
                                       m.far_width,
                                       Router(m.router)};
        decode_layer<T, A, S>(layer, numbers<T>(cos), numbers<T>(sin), numbers<A>(global_rows),
                              numbers<A>(local_rows), cache_of<S>(m.far), statistics, cache_of<S>(m.near),
                              static_cast<A*>(out.mutable_data_ptr()));
    };
    using torch::headeronly::ScalarType;
    switch (rows.scalar_type()) {
        case ScalarType::Double:
            run(double{}, double{}, double{});
            break;
        case ScalarType::BFloat16:
            m.int8 ? run(float{}, BFloat16{}, int8_t{}) : run(float{}, BFloat16{}, BFloat16{});
            break;
        default:
            m.int8 ? run(float{}, float{}, int8_t{}) : run(float{}, float{}, float{});
    }
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(dualroute, CPU, library) {
    library.impl("cpu_decode_layer", TORCH_BOX(&cpu_decode_layer));
}
