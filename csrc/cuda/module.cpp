// semantica._cuda: the CUDA operators, how they were built, and CUDA's errors as exceptions
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "code.h"
#include "group_norm.h"

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <sstream>
#include <string>

namespace py = pybind11;

namespace {

// what setup.py looks for in the file, to know whether it is of these sources: whole, though only parts of it are used
[[gnu::used]] const char built[] = SEMANTICA_BUILT;

// a CudaError in Python, with CUDA's own words; the GIL is held
[[noreturn]] void raise(cudaError_t code, const char* what) {
    // a launch error stays with the thread until it is read, and would be taken for the next call's
    cudaGetLastError();
    const char* name = cudaGetErrorName(code);
    py::object type = py::module_::import("semantica._cuda").attr("CudaError");
    py::object error = type(std::string(what) + ": " + cudaGetErrorString(code) + " (" + name + ")");
    error.attr("code") = static_cast<int>(code);
    error.attr("name") = name;
    PyErr_SetObject(type.ptr(), error.ptr());
    throw py::error_already_set();
}

void check(cudaError_t code, const char* what) {
    if (code != cudaSuccess) raise(code, what);
}

std::string release(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

py::dict build_info() {
    int runtime = 0;
    check(cudaRuntimeGetVersion(&runtime), "build_info");
    py::list architectures;
    std::istringstream names(SEMANTICA_ARCHITECTURES);
    for (std::string name; names >> name;) architectures.append(name);
    py::dict info;
    info["architectures"] = architectures;
    info["built"] = built;
    info["compiler"] = "nvcc " SEMANTICA_COMPILER;
    info["runtime"] = release(runtime);
    info["sources"] = SEMANTICA_SOURCES;
    return info;
}

py::object driver() {
    int version = 0;
    check(cudaDriverGetVersion(&version), "driver");
    return version ? py::object(py::str(release(version))) : py::none();
}

// why no kernel can run here, in CUDA's words; none where some can
py::object trouble() {
    int devices = 0;
    const cudaError_t code = cudaGetDeviceCount(&devices);
    if (code == cudaSuccess) return py::none();
    cudaGetLastError();
    return py::str(std::string(cudaGetErrorString(code)) + " (" + cudaGetErrorName(code) + ")");
}

// calls `start` while a device is current: kernels run where their tensors are, whichever device is current
template <class Start>
int on_device(int device, Start start) {
    int before = 0;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    const int result = start();
    if (before != device) cudaSetDevice(before);
    return result;
}

// the same without the GIL; CUDA's error as an exception
template <class Start>
void run(int device, const char* what, Start start) {
    int error = 0;
    {
        py::gil_scoped_release others;
        error = on_device(device, start);
    }
    check(static_cast<cudaError_t>(error), what);
}

int code(int device) {
    int version = 0;
    run(device, "code", [&] { return semantica::code_architecture(&version); });
    return version;
}

int clusters(int device, int blocks, int threads, int64_t shared) {
    if (blocks < 1 || threads < 1 || threads > 1024 || shared < 0)
        throw py::value_error("blocks and threads must be positive, threads at most 1024, shared not negative");
    int count = 0;
    run(device, "clusters", [&] { return semantica::group_norm_clusters(blocks, threads, shared, &count); });
    return count;
}

// addresses and streams come as integers: no torch header, so that one build serves every torch
template <class T = void>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

semantica::Type type_of(const std::string& name) {
    if (name == "float32") return semantica::Type::f32;
    if (name == "float16") return semantica::Type::f16;
    if (name == "bfloat16") return semantica::Type::bf16;
    throw py::value_error("type '" + name + "': give float32, float16 or bfloat16");
}

// sizes, types and plan of a call, made once for all calls that are alike
struct GroupNorm {
    int device;
    semantica::Problem problem;
    semantica::Plan plan;

    semantica::Problem of(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t scale, uintptr_t shift,
                          uintptr_t addend) const {
        semantica::Problem full = problem;
        full.x = at(x), full.weight.at = at(weight), full.bias.at = at(bias);
        full.scale.at = at(scale), full.shift.at = at(shift), full.addend.at = at(addend);
        return full;
    }
};

// f32 and strides: of weight, bias, scale, shift, addend; of those that are absent they say nothing
GroupNorm group_norm(int device, int64_t samples, int64_t channels, int64_t groups, int64_t pixels,
                     const std::string& type, bool channels_last, bool silu, std::array<bool, 5> f32,
                     std::array<int64_t, 5> strides, int path, int vector, int threads, int rows, int columns, int width,
                     int repeat, int parts, int chunks, int kept, int rounds, int blocks, int64_t shared) {
    if (samples < 1 || channels < 1 || groups < 1 || pixels < 1 || channels % groups)
        throw py::value_error("sizes must be positive, and groups must divide channels");
    const bool cut = path >= 0 && path <= 2 && vector > 0 && rows > 0 && columns > 0 && width > 0 && repeat > 0 &&
                     parts > 0 && chunks > 0 && kept >= 0 && rounds > 0 && blocks > 0 && shared >= 0 &&
                     threads <= 1024 && threads % 32 == 0 && int64_t(rows) * columns <= threads;
    if (!cut) throw py::value_error("the plan cannot be launched: see kernels/group_norm/cuda_plan.py");
    semantica::Problem problem{};
    problem.samples = samples, problem.channels = channels, problem.groups = groups, problem.pixels = pixels;
    problem.type = type_of(type), problem.channels_last = channels_last, problem.silu = silu;
    semantica::Values* values[] = {&problem.weight, &problem.bias, &problem.scale, &problem.shift, &problem.addend};
    for (int i = 0; i < 5; ++i) *values[i] = {nullptr, strides[i], f32[i]};
    const semantica::Plan plan{static_cast<semantica::Path>(path), vector, threads, rows, columns, width, repeat, parts,
                               chunks, kept, rounds, blocks, shared};
    return {device, problem, plan};
}

void define_group_norm(py::module_& m) {
    py::class_<GroupNorm>(m, "GroupNorm", "Sizes, types (such as \"bfloat16\") and plan; see csrc/cuda/group_norm.h.")
        .def(py::init(&group_norm), py::kw_only(), py::arg("device"), py::arg("samples"), py::arg("channels"),
             py::arg("groups"), py::arg("pixels"), py::arg("type"), py::arg("channels_last"), py::arg("silu"),
             py::arg("f32"), py::arg("strides"), py::arg("path"), py::arg("vector"), py::arg("threads"), py::arg("rows"),
             py::arg("columns"), py::arg("width"), py::arg("repeat"), py::arg("parts"), py::arg("chunks"),
             py::arg("kept"), py::arg("rounds"), py::arg("blocks"), py::arg("shared"))
        .def(
            "forward",
            [](const GroupNorm& self, uintptr_t stream, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t scale,
               uintptr_t shift, uintptr_t addend, float eps, uintptr_t y, uintptr_t mean, uintptr_t rstd,
               uintptr_t workspace) {
                run(self.device, "group_norm", [&] {
                    return semantica::group_norm_forward(self.of(x, weight, bias, scale, shift, addend), self.plan, eps,
                                                         at(y), {at<float>(mean), at<float>(rstd)}, at<float>(workspace),
                                                         at<CUstream_st>(stream));
                });
            },
            "A stream, addresses of x, weight, bias, scale, shift, addend (0 for none), eps, then of y, mean, rstd, "
            "workspace.")
        .def(
            "backward",
            [](const GroupNorm& self, uintptr_t stream, uintptr_t dy, uintptr_t x, uintptr_t mean, uintptr_t rstd,
               uintptr_t weight, uintptr_t bias, uintptr_t scale, uintptr_t shift, uintptr_t addend, uintptr_t dx,
               uintptr_t dweight, uintptr_t dbias, uintptr_t dscale, uintptr_t dshift, uintptr_t daddend,
               uintptr_t workspace) {
                run(self.device, "group_norm_backward", [&] {
                    return semantica::group_norm_backward(
                        self.of(x, weight, bias, scale, shift, addend), self.plan, at(dy),
                        {at<float>(mean), at<float>(rstd)},
                        {at(dx), at(dweight), at(dbias), at(dscale), at(dshift), at(daddend)}, at<float>(workspace),
                        at<CUstream_st>(stream));
                });
            },
            "A stream, addresses of dy, x, mean, rstd, weight, bias, scale, shift, addend, dx, dweight, dbias, dscale, "
            "dshift, daddend, workspace.");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "The CUDA kernels of semantica. It takes raw pointers and streams, and holds CUDA's runtime: one build "
              "serves every torch.";
    m.attr("CudaError") = py::reinterpret_steal<py::object>(
        PyErr_NewExceptionWithDoc("semantica._cuda.CudaError", "A call of CUDA failed: its `code` and its `name`.",
                                  PyExc_RuntimeError, nullptr));
    m.def("build_info", &build_info,
          "Architectures that there is code for, compiler, CUDA's release that is inside, and a hash of the sources.");
    m.def("driver", &driver, "The newest release of CUDA that this machine's driver knows, or None without a driver.");
    m.def("code", &code, py::arg("device"),
          "The architecture of the code that a device runs, such as 90; CudaError where it runs none of it.");
    m.def("clusters", &clusters, py::kw_only(), py::arg("device"), py::arg("blocks"), py::arg("threads"),
          py::arg("shared"),
          "How many clusters of so many blocks a device runs at once, each block with so many threads and bytes of shared "
          "memory; 0 where it has none so large.");
    define_group_norm(m);
    m.def("trouble", &trouble, "Why CUDA does not run here, in its own words; None where it does.");
}
