// Conversions of the bench's 16-bit floats: fp32 numbers from standard input, for each the bits of both types, and back.
#include "device.cuh"

#include <cstdio>

int main() {
  unsigned bits;
  while (std::fread(&bits, 4, 1, stdin)) {
    __nv_bfloat16 b = __float2bfloat16_rn(__uint_as_float(bits));
    __half h = __float2half_rn(__uint_as_float(bits));
    unsigned out[3] = {unsigned(b.bits) | unsigned(h.bits) << 16, __float_as_uint(__bfloat162float(b)),
                       __float_as_uint(__half2float(h))};
    std::fwrite(out, 4, 3, stdout);
  }
}
