// which of the code that was built a card runs
#pragma once

#include <cuda_runtime.h>

namespace semantica {
// of the current device: 90 where it runs what was compiled for sm_90a, 80 where the driver compiles that for it
int code_architecture(int* version);
}  // namespace semantica
