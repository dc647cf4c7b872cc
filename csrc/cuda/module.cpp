// semantica._cuda: the CUDA operators, how they were built, and CUDA's errors as exceptions
#include <pybind11/pybind11.h>

#include <cuda_runtime.h>

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
    m.def("trouble", &trouble, "Why CUDA does not run here, in its own words; None where it does.");
}
