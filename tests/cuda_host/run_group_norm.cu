// group_norm's CUDA kernels on the bench: problems from standard input, results to standard output; see
// tests/test_group_norm_cuda.py. Each problem runs under several seeds; other bits under another seed are a failure.
#include "group_norm.cu"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using namespace semantica;

namespace {

// exactly as large as it is, so that sanitizers see who goes past its end; filled with NaN
struct Array {
  size_t bytes;
  void* at;
  explicit Array(size_t size) : bytes(size), at(size ? std::malloc(size) : nullptr) {
    if (at) std::memset(at, 0xff, bytes);
  }
  Array(const Array&) = delete;
  ~Array() { std::free(at); }
  void read() {
    if (bytes && std::fread(at, 1, bytes, stdin) != bytes) std::exit(3);
  }
  template <typename T>
  T* as() { return static_cast<T*>(at); }
};

struct Outputs {
  Array y, mean, rstd, dx, dweight, dbias, dscale, dshift, daddend;
  std::vector<Array*> all() { return {&y, &mean, &rstd, &dx, &dweight, &dbias, &dscale, &dshift, &daddend}; }
};

Plan read_plan(const int64_t* n) {
  return {int(n[0]), int(n[1]), int(n[2]), int(n[3]), int(n[4]), n[5] != 0, n[6]};
}

void need(int error) {
  if (error) {
    std::fprintf(stderr, "launch: error %d\n", error);
    std::exit(4);
  }
}

}  // namespace

int main() {
  int64_t n[28];
  while (std::fread(n, sizeof n, 1, stdin)) {
    int64_t samples = n[0], channels = n[1], groups = n[2], pixels = n[3], seeds = n[11];
    auto size = [](int64_t type) { return type ? 2 : 4; };
    size_t x_bytes = size_t(samples * channels * pixels) * size(n[4]), affine = size_t(channels) * size(n[5]);
    size_t film = size_t(samples * channels) * size(n[6]), stats = size_t(samples * groups) * 4;
    Plan forth = read_plan(n + 14), back = read_plan(n + 21);
    cuda_host::set_resident(unsigned(n[12]));
    Array x(x_bytes), dy(x_bytes), weight(affine), bias(affine);
    Array scale(n[8] ? film : 0), shift(n[9] ? film : 0), addend(n[10] ? film : 0);
    for (Array* input : {&x, &dy, &weight, &bias, &scale, &shift, &addend}) input->read();
    Problem problem{x.at, weight.at, bias.at, scale.at, shift.at, addend.at, samples, channels, groups, pixels,
                    Type(n[4]), Type(n[5]), Type(n[6]), n[7] != 0};
    std::vector<std::vector<char>> first;
    for (int64_t seed = 0; seed < seeds; seed++) {
      cuda_host::set_seed(uint64_t(seed));
      Outputs out{Array(x_bytes), Array(stats), Array(stats), Array(x_bytes), Array(affine), Array(affine),
                  Array(scale.bytes), Array(shift.bytes), Array(addend.bytes)};
      int64_t units = samples * (channels / forth.width), units_back = samples * (channels / back.width);
      Array work(forth.grid ? size_t(units * (forth.chunks + 1) * 2 * forth.width) * 4 : 0);
      Array work_back(back.grid ? size_t(units_back * (back.chunks + 1) * 3 * back.width) * 4 : 0);
      Array partial(size_t(2 * samples * channels) * 4);
      need(group_norm_forward(problem, forth, 1e-5f, out.y.at, out.mean.as<float>(), out.rstd.as<float>(),
                              work.as<float>(), nullptr));
      need(group_norm_backward(problem, back, dy.at, out.mean.as<float>(), out.rstd.as<float>(), out.dx.at,
                               out.dweight.at, out.dbias.at, out.dscale.at, out.dshift.at, out.daddend.at,
                               partial.as<float>(), work_back.as<float>(), nullptr));
      auto all = out.all();
      for (size_t i = 0; i < all.size(); i++) {
        const char* at = all[i]->as<char>();
        if (seed == 0) {
          first.emplace_back(at, at + all[i]->bytes);
        } else if (all[i]->bytes && std::memcmp(at, first[i].data(), all[i]->bytes)) {
          std::fprintf(stderr, "result %zu has other bits with seed %lld\n", i, (long long)seed);
          return 5;
        }
      }
    }
    for (auto& result : first) {
      if (!result.empty()) std::fwrite(result.data(), 1, result.size(), stdout);
    }
    std::fflush(stdout);
  }
}
