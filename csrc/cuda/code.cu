// which of the code that was built a card runs
#include "code.h"

namespace semantica {
namespace {
__global__ void code_kernel() {}
}  // namespace

int code_architecture(int* version) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, code_kernel);
    if (error == cudaSuccess) *version = attributes.ptxVersion;
    return error;
}
}  // namespace semantica
