// semantica._C: the CPU operators, how they were built, and what the running processor offers them
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cross_attention.h"
#include "group_norm.h"

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#define SEMANTICA_X86 1
#endif

// a macro's value as text
#define TEXT_OF(NAME) #NAME
#define TEXT(NAME) TEXT_OF(NAME)

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
    return std::string("Clang ") + __clang_version__;
#elif defined(__GNUC__)
    return std::string("GCC ") + __VERSION__;
#elif defined(_MSC_VER)
    return "MSVC " + std::to_string(_MSC_VER);
#else
    return "unknown";
#endif
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = compiler();
    info["sources"] = TEXT(SEMANTICA_SOURCES);
#ifdef _MSVC_LANG
    info["cxx_standard"] = _MSVC_LANG / 100 % 100;
#else
    info["cxx_standard"] = __cplusplus / 100 % 100;
#endif
#ifdef _OPENMP
    info["openmp"] = true;
    info["threads"] = omp_get_max_threads();
#else
    info["openmp"] = false;
    info["threads"] = 1;
#endif
    return info;
}

#ifdef SEMANTICA_X86
// the tile unit counts only where the operating system saves its registers (XCR0 bits 17 and 18)
bool has_amx_bf16() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3u) != 3u || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    return (d >> 24 & 1u) && (d >> 22 & 1u);
}
#endif

py::dict cpu_features() {
    py::dict features;
#ifdef SEMANTICA_X86
    __builtin_cpu_init();
    features["avx2"] = __builtin_cpu_supports("avx2") != 0;
    features["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
    features["avx512_bf16"] = __builtin_cpu_supports("avx512bf16") != 0;
    features["amx_bf16"] = has_amx_bf16();
#endif
    return features;
}

#ifdef SEMANTICA_LANES
using semantica::CrossAttentionShape;
using semantica::GroupNormShape;
using semantica::Target;

// widest first
const std::pair<const char*, Target> TARGETS[] = {{"AVX-512 BF16", Target::avx512_bf16},
                                                  {"AVX-512", Target::avx512},
                                                  {"AVX2", Target::avx2},
                                                  {"baseline vectors", Target::baseline}};

using Runs = bool(Target);

template <Runs& runs>
py::list targets() {
    py::list names;
    for (const auto& [name, target] : TARGETS)
        if (runs(target)) names.append(name);
    return names;
}

Target find_target(const std::string& wanted, Runs& runs) {
    for (const auto& [name, target] : TARGETS)
        if (name == wanted && runs(target)) return target;
    throw py::value_error("target '" + wanted + "' does not run here");
}

// addresses come as integers: no torch header, so that one build serves every torch
template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void define_group_norm(py::module_& m) {
    py::class_<GroupNormShape>(m, "GroupNormShape")
        .def(py::init([](int64_t batch, int64_t channels, int64_t spatial, int64_t groups, bool channels_last,
                         bool silu, bool bfloat16, int threads, const std::string& target) {
                 if (batch < 1 || channels < 1 || spatial < 1 || groups < 1 || channels % groups || threads < 1)
                     throw py::value_error("sizes must be positive, and groups must divide channels");
                 return GroupNormShape{batch, channels, spatial, groups,  channels_last,
                                       silu,  bfloat16, threads, find_target(target, semantica::group_norm_runs)};
             }),
             py::kw_only(), py::arg("batch"), py::arg("channels"), py::arg("spatial"), py::arg("groups"),
             py::arg("channels_last"), py::arg("silu"), py::arg("bfloat16"), py::arg("threads"),
             py::arg("target"));
    m.def(
        "group_norm_forward",
        [](const GroupNormShape& shape, uintptr_t x, uintptr_t y, uintptr_t mean, uintptr_t rstd, uintptr_t weight,
           uintptr_t bias, uintptr_t scale, uintptr_t shift, uintptr_t addend, double eps) {
            semantica::group_norm_forward(shape, at<void>(x), at<void>(y), at<float>(mean), at<float>(rstd),
                                          at<float>(weight), at<float>(bias), at<float>(scale), at<float>(shift),
                                          at<float>(addend), eps);
        },
        py::call_guard<py::gil_scoped_release>(),
        "Addresses of x, y, mean, rstd, weight, bias, scale, shift, addend (0 for none), eps; see csrc/group_norm.h.");
    m.def(
        "group_norm_backward",
        [](const GroupNormShape& shape, uintptr_t dy, uintptr_t x, uintptr_t mean, uintptr_t rstd, uintptr_t weight,
           uintptr_t bias, uintptr_t scale, uintptr_t shift, uintptr_t addend, uintptr_t dx, uintptr_t dweight,
           uintptr_t dbias, uintptr_t dscale, uintptr_t dshift) {
            semantica::group_norm_backward(shape, at<void>(dy), at<void>(x), at<float>(mean), at<float>(rstd),
                                           at<float>(weight), at<float>(bias), at<float>(scale), at<float>(shift),
                                           at<float>(addend), at<void>(dx), at<float>(dweight), at<float>(dbias),
                                           at<float>(dscale), at<float>(dshift));
        },
        py::call_guard<py::gil_scoped_release>(),
        "Addresses of dy, x, mean, rstd, weight, bias, scale, shift, addend, dx, dweight, dbias, dscale, dshift.");
    m.def("group_norm_targets", &targets<semantica::group_norm_runs>,
          "Instruction sets for which the loops can run on this processor, best first.");
}

void define_cross_attention(py::module_& m) {
    using Three = std::array<int64_t, 3>;
    py::class_<CrossAttentionShape>(m, "CrossAttentionShape")
        .def(py::init([](int64_t batch, int64_t queries, int64_t heads, int64_t dim, std::vector<int64_t> sizes, Three q,
                         Three k, Three v, bool bfloat16, int threads, const std::string& target) {
                 if (batch < 1 || queries < 1 || heads < 1 || dim < 2 || dim % 2 || sizes.empty() || threads < 1)
                     throw py::value_error("sizes must be positive, and dim even");
                 for (const int64_t size : sizes)
                     if (size < 1) throw py::value_error("sizes must be positive");
                 auto strides = [](const Three& a) { return semantica::Strides{a[0], a[1], a[2]}; };
                 return CrossAttentionShape{batch,      queries,    heads,      dim,      std::move(sizes), strides(q),
                                            strides(k), strides(v), bfloat16, threads,
                                            find_target(target, semantica::cross_attention_runs)};
             }),
             py::kw_only(), py::arg("batch"), py::arg("queries"), py::arg("heads"), py::arg("dim"), py::arg("sizes"),
             py::arg("q"), py::arg("k"), py::arg("v"), py::arg("bfloat16"), py::arg("threads"), py::arg("target"));
    m.def(
        "cross_attention_forward",
        [](const CrossAttentionShape& shape, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o, uintptr_t lse,
           uintptr_t lengths, uintptr_t gates, uintptr_t q_weight) {
            semantica::cross_attention_forward(shape, at<void>(q), at<void>(k), at<void>(v), at<void>(o), at<float>(lse),
                                               at<int64_t>(lengths), at<float>(gates), at<float>(q_weight));
        },
        py::call_guard<py::gil_scoped_release>(),
        "Addresses of q, k, v, o, lse, lengths, gates, q_weight (0 for none); see csrc/cross_attention.h.");
    m.def("cross_attention_targets", &targets<semantica::cross_attention_runs>,
          "Instruction sets for which the loops can run on this processor, best first.");
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled part of semantica. It takes raw pointers, so one build serves every torch.";
    m.def("build_info", &build_info,
          "Compiler, hash of the sources, C++ standard, whether OpenMP is in, and how many threads it would use now.");
    m.def("cpu_features", &cpu_features,
          "Vector extensions of the running processor, as far as its operating system allows them; empty where they "
          "cannot be asked for.");
#ifdef SEMANTICA_LANES
    define_group_norm(m);
    define_cross_attention(m);
#endif
}
