// The operators dualroute::decode_layer and dualroute::int8_product: tensors, and the addresses of caches, ->
// `decode_layer` and `int8_product` on memory.
//
// They are C functions by the names that a compiled step calls them by, once or four times a layer: by way of
// torch's dispatcher a call would take as long as the attention of a short text. The dispatcher, which anyone
// else goes through, is given the same functions, by torch's stable interface.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <stdexcept>
#include <string>

#include "decode.h"
#include "int8_product.h"

// A row of `cache_memory` in decode.py: pointers, 0 where there is nothing, and sizes.
struct CacheMemory {
    int64_t far[2], near[2], features, summary_keys, summary_values;
    int64_t key_grids, value_grids, tail_keys, tail_values;  // of a quantised global cache
    int64_t far_rows, far_tokens, block, router, parts, far_width;
    int64_t near_rows, window, exact, bits;   // bits: 0 = not quantised
    int64_t chosen, chosen_columns, follows;  // a choice shared by several layers, (far_rows, columns)
};

template <class N>
N* numbers(int64_t address) {
    return reinterpret_cast<N*>(address);
}
template <class S>
Cache<S> cache_of(const int64_t (&a)[2]) {
    return {numbers<S>(a[0]), numbers<S>(a[1])};
}

inline void check(AOTITorchError error) {
    if (error) throw std::runtime_error("torch refused a call of dualroute's kernels");
}

template <class N>
N* numbers(AtenTensorHandle tensor) {
    void* data;
    check(aoti_torch_get_data_ptr(tensor, &data));
    return static_cast<N*>(data);
}
template <class N>
N* numbers(const AtenTensorHandle* tensor) {
    return tensor ? numbers<N>(*tensor) : nullptr;
}
inline long size(AtenTensorHandle tensor, int64_t dim) {
    int64_t size;
    check(aoti_torch_get_size(tensor, dim, &size));
    return size;
}
inline long dimensions(AtenTensorHandle tensor) {
    int64_t count;
    check(aoti_torch_get_dim(tensor, &count));
    return count;
}
inline bool contiguous(AtenTensorHandle tensor) {
    int64_t expected = 1;
    for (long dim = dimensions(tensor) - 1; dim >= 0; --dim) {
        int64_t stride;
        check(aoti_torch_get_stride(tensor, dim, &stride));
        if (size(tensor, dim) != 1 && stride != expected) return false;
        expected *= size(tensor, dim);
    }
    return true;
}
inline int32_t type(AtenTensorHandle tensor) {
    int32_t type;
    check(aoti_torch_get_dtype(tensor, &type));
    return type;
}

// An uninitialised (count, width) tensor of the type of `like`.
inline AtenTensorHandle new_rows(AtenTensorHandle like, int64_t count, int64_t width) {
    const int64_t sizes[] = {count, width}, strides[] = {width, 1};
    AtenTensorHandle made;
    check(aoti_torch_empty_strided(2, sizes, strides, type(like), aoti_torch_device_type_cpu(), 0, &made));
    return made;
}

// Python's ValueError.
inline void require(bool fits, const std::string& what) {
    if (!fits) throw std::invalid_argument(what);
}

// Projections of one route: what they lack to fit the row of `memory` and the other arguments.
inline void check_projected(const char* name, AtenTensorHandle rows, int64_t batch, int64_t cache_rows,
                            int64_t width, int32_t dtype) {
    const std::string is = std::string(name) + " must be ";
    require(dimensions(rows) == 2 && contiguous(rows), is + "contiguous (batch, width)");
    require(type(rows) == dtype, is + "of one type with the other projection: float32, float64 or bfloat16");
    require(size(rows, 0) == batch && batch > 0 && cache_rows % batch == 0,
            is + "of as many texts as the cache in memory");
    require(cache_rows > 0 && size(rows, 1) == cache_rows / batch * width,
            is + "(heads + 2 kv_heads) * head_dim wide, for the heads of the cache in memory");
}

inline void check_decode(AtenTensorHandle position, AtenTensorHandle cos, AtenTensorHandle sin,
                         const AtenTensorHandle* global_rows, const AtenTensorHandle* local_rows,
                         AtenTensorHandle memory, int64_t index, int64_t dim, int64_t group, int64_t top_k) {
    require(dim > 0 && dim % 2 == 0, "head_dim must be even and at least 2");
    require(group > 0, "group must be at least 1");
    require(top_k >= 0, "top_k must be at least 0");
    require(type(position) == aoti_torch_dtype_int64() && dimensions(position) == 0,
            "position must be () int64");
    require(type(memory) == aoti_torch_dtype_int64() && dimensions(memory) == 2 && contiguous(memory) &&
                size(memory, 1) == long(sizeof(CacheMemory) / sizeof(int64_t)),
            "memory must be what cache_memory gives");
    require(index >= 0 && index < size(memory, 0), "layer must be a row of memory");
    require(global_rows || local_rows, "global_rows or local_rows must be given");
    const CacheMemory& m = numbers<CacheMemory>(memory)[index];
    const AtenTensorHandle rows = *(global_rows ? global_rows : local_rows);
    const int32_t dtype = type(rows);
    const bool twice = dtype == aoti_torch_dtype_float64();
    require(twice || dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_bfloat16(),
            "global_rows and local_rows must be float32, float64 or bfloat16");
    require((global_rows != nullptr) == (m.far_rows > 0),
            "global_rows must be given where memory has a global cache, and only there");
    require(!m.chosen || m.chosen_columns == top_k, "top_k must be that of the choice in memory");
    require((local_rows != nullptr) == (m.near_rows > 0),
            "local_rows must be given where memory has a local cache, and only there");
    require(dimensions(rows) == 2, "global_rows and local_rows must be contiguous (batch, width)");
    if (global_rows)
        check_projected("global_rows", *global_rows, size(rows, 0), m.far_rows, (group + 2) * dim, dtype);
    if (local_rows)
        check_projected("local_rows", *local_rows, size(rows, 0), m.near_rows, (group + 2) * dim, dtype);
    for (const AtenTensorHandle table : {cos, sin}) {
        require(type(table) == (twice ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32()),
                "cos and sin must be float64 for float64 projections, else float32");
        require(
            dimensions(table) == 2 && contiguous(table) && size(table, 0) == 2 && size(table, 1) == dim / 2,
            "cos and sin must be contiguous (2, head_dim / 2)");
    }
    const int64_t at = *numbers<int64_t>(position);
    require(at >= 0 && (!global_rows || at < m.far_tokens), "position must lie in the room of the cache");
}

inline AtenTensorHandle decode_layer(AtenTensorHandle position, AtenTensorHandle cos, AtenTensorHandle sin,
                                     const AtenTensorHandle* global_rows, const AtenTensorHandle* local_rows,
                                     AtenTensorHandle memory, int64_t index, int64_t dim, int64_t group,
                                     int64_t top_k) {
    check_decode(position, cos, sin, global_rows, local_rows, memory, index, dim, group, top_k);
    const CacheMemory& m = numbers<CacheMemory>(memory)[index];
    const AtenTensorHandle rows = *(global_rows ? global_rows : local_rows);
    const long batch = size(rows, 0), far_heads = m.far_rows / batch, near_heads = m.near_rows / batch;
    const Layer layer{batch,
                      group,
                      dim,
                      int(torch::stable::get_num_threads()),
                      far_heads,
                      m.far_tokens,
                      m.block,
                      int(top_k),
                      m.exact != 0,
                      near_heads,
                      m.window,
                      *numbers<int64_t>(position),
                      {numbers<int32_t>(m.chosen), m.follows != 0}};
    const AtenTensorHandle out = new_rows(rows, batch, (far_heads + near_heads) * group * dim);
    const auto run = [&](auto computed, auto model) {
        using T = decltype(computed);
        using A = decltype(model);
        const auto kept = [&](auto* as, const auto& memory) {
            using K = std::remove_pointer_t<decltype(as)>;
            using F = typename K::Statistic;
            const Statistics<F> statistics{numbers<F>(m.features),
                                           numbers<F>(m.summary_keys),
                                           numbers<F>(m.summary_values),
                                           m.parts,
                                           m.far_width,
                                           Router(m.router)};
            decode_layer<T, A, K>(layer, numbers<T>(cos), numbers<T>(sin), numbers<A>(global_rows),
                                  numbers<A>(local_rows), memory, statistics, cache_of<A>(m.near),
                                  numbers<A>(out));
        };
        const QuantizedMemory<A> quantized{numbers<uint8_t>(m.far[0]),     numbers<uint8_t>(m.far[1]),
                                           numbers<BFloat16>(m.key_grids), numbers<BFloat16>(m.value_grids),
                                           numbers<A>(m.tail_keys),        numbers<A>(m.tail_values)};
        if (m.bits == 4)
            kept(static_cast<Quantized<T, A, 4>*>(nullptr), quantized);
        else if (m.bits == 8)
            kept(static_cast<Quantized<T, A, 8>*>(nullptr), quantized);
        else
            kept(static_cast<Stored<T, A>*>(nullptr), cache_of<A>(m.far));
    };
    const int32_t dtype = type(rows);
    if (dtype == aoti_torch_dtype_float64())
        run(double{}, double{});
    else if (dtype == aoti_torch_dtype_bfloat16())
        run(float{}, BFloat16{});
    else
        run(float{}, float{});
    return out;
}

inline AtenTensorHandle int8_product(AtenTensorHandle row, AtenTensorHandle panels, int64_t columns) {
    const int32_t dtype = type(row);
    require(dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_bfloat16(),
            "row must be float32 or bfloat16");
    require(dimensions(row) == 2 && contiguous(row) && size(row, 0) == 1,
            "row must be contiguous (1, inner)");
    require(type(panels) == aoti_torch_dtype_int8() && dimensions(panels) == 3 && contiguous(panels) &&
                size(panels, 2) == PANEL_COLUMNS,
            "panels must be what int8_panels gives");
    const long inner = size(row, 1), room = size(panels, 0) * PANEL_COLUMNS;
    require(size(panels, 1) == inner + long(sizeof(float)) && columns > 0 && columns <= room,
            "a row of " + std::to_string(inner) + " numbers or " + std::to_string(columns) +
                " columns do not fit these panels");
    const AtenTensorHandle out = new_rows(row, 1, columns);
    const auto run = [&](auto model) {
        using A = decltype(model);
        int8_product<float, A>(numbers<A>(row), numbers<int8_t>(panels), columns, inner,
                               int(torch::stable::get_num_threads()), numbers<A>(out));
    };
    dtype == aoti_torch_dtype_bfloat16() ? run(BFloat16{}) : run(float{});
    return out;
}

// What a compiled step calls: c_functions.py.
template <class F>
AOTITorchError returned(AtenTensorHandle* out, F call) {
    try {
        *out = call();
        return 0;
    } catch (const std::exception& error) {  // whoever called says only that it failed
        std::fprintf(stderr, "dualroute: %s\n", error.what());
        return 1;
    }
}
DUALROUTE_CALLED AOTITorchError aoti_torch_cpu_decode_layer(
    AtenTensorHandle position, AtenTensorHandle cos, AtenTensorHandle sin, AtenTensorHandle* global_rows,
    AtenTensorHandle* local_rows, AtenTensorHandle memory, int64_t layer, int64_t dim, int64_t group,
    int64_t top_k, AtenTensorHandle* out) {
    return returned(out, [&] {
        return decode_layer(position, cos, sin, global_rows, local_rows, memory, layer, dim, group, top_k);
    });
}
DUALROUTE_CALLED AOTITorchError aoti_torch_cpu_int8_product(AtenTensorHandle row, AtenTensorHandle panels,
                                                            int64_t columns, AtenTensorHandle* out) {
    return returned(out, [&] { return int8_product(row, panels, columns); });
}

// What the dispatcher calls: see `decode_layer` in decode.py and `int8_product` in int8_product.py.
using torch::stable::Tensor;

inline Tensor dispatched_decode_layer(const Tensor& position, const Tensor& cos, const Tensor& sin,
                                      const std::optional<Tensor>& global_rows,
                                      const std::optional<Tensor>& local_rows, const Tensor& memory,
                                      int64_t layer, int64_t dim, int64_t group, int64_t top_k) {
    const AtenTensorHandle far = global_rows ? global_rows->get() : nullptr;
    const AtenTensorHandle near = local_rows ? local_rows->get() : nullptr;
    return Tensor(decode_layer(position.get(), cos.get(), sin.get(), far ? &far : nullptr,
                               near ? &near : nullptr, memory.get(), layer, dim, group, top_k));
}
inline Tensor dispatched_int8_product(const Tensor& row, const Tensor& panels, int64_t columns) {
    return Tensor(int8_product(row.get(), panels.get(), columns));
}

STABLE_TORCH_LIBRARY_IMPL(dualroute, CPU, library) {
    library.impl("decode_layer", TORCH_BOX(&dispatched_decode_layer));
    library.impl("int8_product", TORCH_BOX(&dispatched_int8_product));
}
