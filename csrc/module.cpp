// semantica._C: how the compiled part was built, and what the running processor offers it
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#define SEMANTICA_X86 1
#endif

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

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled part of semantica. It takes raw pointers, so one build serves every torch.";
    m.def("build_info", &build_info,
          "Compiler, C++ standard, whether OpenMP is in, and how many threads it would use now.");
    m.def("cpu_features", &cpu_features,
          "Vector extensions of the running processor, as far as its operating system allows them; empty where they "
          "cannot be asked for.");
}
