// group_norm's CUDA kernels on the bench: problems from standard input, results to standard output; see
// tests/test_group_norm_cuda.py. Each problem runs under several seeds; other bits under another seed are a failure.
#include "group_norm_backward.cu"
#include "group_norm_forward.cu"

#include <cstdio>
#include <cstdlib>
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

// the order of fields in the request
struct Numbers {
  int64_t samples, channels, groups, pixels, type, affine_f32, film_f32, channels_last, silu;
  // elements from one sample's to the next's, 0 where there are none
  int64_t scale, shift, addend;
  int64_t seeds, resident, offset;
  struct Way {
    int64_t path, vector, threads, rows, columns, width, repeat, parts, chunks, kept, rounds, blocks, shared, workspace;
  } forward, backward;
};

Plan plan_of(const Numbers::Way& n) {
  return {Path(n.path),  int(n.vector), int(n.threads), int(n.rows), int(n.columns), int(n.width), int(n.repeat),
          int(n.parts), int(n.chunks), int(n.kept),    int(n.rounds), int(n.blocks), n.shared};
}

void need(int error) {
  if (error) {
    std::fprintf(stderr, "launch: error %d\n", error);
    std::exit(4);
  }
}

}  // namespace

// without the barrier or wait at FILE LINE; or says, with one argument, which ones are reached
int main(int count, char** arguments) {
  const bool list = count == 2;
  if (list) cuda_host::record_barriers();
  if (count == 3) cuda_host::omit(arguments[1], std::atoi(arguments[2]));
  Numbers n;
  while (std::fread(&n, sizeof n, 1, stdin)) {
    const size_t item = n.type ? 2 : 4, film_item = n.film_f32 ? 4 : item, affine = n.channels * (n.affine_f32 ? 4 : item);
    // an offset of one element moves x, dy, y and dx from where 16 bytes are read at once
    const size_t skip = n.offset * item, x_bytes = n.samples * n.channels * n.pixels * item + skip;
    const size_t statistics = n.samples * n.groups * 4;
    cuda_host::set_resident(unsigned(n.resident));
    Array x(x_bytes), dy(x_bytes), weight(affine), bias(affine);
    Array scale(n.samples * n.scale * film_item), shift(n.samples * n.shift * film_item), addend(n.samples * n.addend * film_item);
    for (Array* input : {&x, &dy, &weight, &bias, &scale, &shift, &addend}) input->read();
    auto moved = [&](Array& a) { return a.as<char>() + skip; };
    Problem problem{moved(x),
                    {weight.at, 0, n.affine_f32 != 0},
                    {bias.at, 0, n.affine_f32 != 0},
                    {scale.at, n.scale, n.film_f32 != 0},
                    {shift.at, n.shift, n.film_f32 != 0},
                    {addend.at, n.addend, n.film_f32 != 0},
                    n.samples, n.channels, n.groups, n.pixels, Type(n.type), n.channels_last != 0, n.silu != 0};
    std::vector<std::vector<char>> first;
    for (int64_t seed = 0; seed < n.seeds; seed++) {
      cuda_host::set_seed(uint64_t(seed));
      auto film = [&](const Array& of) { return of.at ? n.samples * n.channels * film_item : 0; };
      Array y(x_bytes), mean(statistics), rstd(statistics), dx(x_bytes), dweight(affine), dbias(affine);
      Array dscale(film(scale)), dshift(film(shift)), daddend(film(addend));
      Array work(size_t(n.forward.workspace) * 4), work_back(size_t(n.backward.workspace) * 4);
      const Statistics found{mean.as<float>(), rstd.as<float>()};
      need(group_norm_forward(problem, plan_of(n.forward), 1e-5f, moved(y), found, work.as<float>(), nullptr));
      need(group_norm_backward(problem, plan_of(n.backward), moved(dy), found,
                               {moved(dx), dweight.at, dbias.at, dscale.at, dshift.at, daddend.at}, work_back.as<float>(),
                               nullptr));
      const Array* all[] = {&y, &mean, &rstd, &dx, &dweight, &dbias, &dscale, &dshift, &daddend};
      for (size_t i = 0; i < 9; i++) {
        const size_t from = all[i] == &y || all[i] == &dx ? skip : 0;
        const char* at = static_cast<const char*>(all[i]->at) + from;
        if (seed == 0) {
          first.emplace_back(at, at + all[i]->bytes - from);
        } else if (all[i]->bytes && std::memcmp(at, first[i].data(), first[i].size())) {
          std::fprintf(stderr, "result %zu has other bits with seed %lld\n", i, (long long)seed);
          return 5;
        }
      }
    }
    for (auto& result : first) {
      if (!list && !result.empty()) std::fwrite(result.data(), 1, result.size(), stdout);
    }
    std::fflush(stdout);
  }
  if (list) cuda_host::print_barriers();
}
