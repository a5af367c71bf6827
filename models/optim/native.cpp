// Sums of squares of gradient, update and weights in one pass over memory: what LAMB and LARS measure before a step.
//
// One call serves all tensors. `table` has a row for each: the addresses of weights, gradient and moments, and the
// length. `scalars` has a row for each; `sums` gets [gradient, update, weights]. Blocks are summed in float with many
// partial sums and added up in double, in order: the result does not depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t BLOCK = 4096;   // elements of one float sum
constexpr int64_t WORK = 1 << 18; // elements that a thread takes at a time
constexpr int64_t AHEAD = 512;    // elements to fetch ahead: the hardware stops at page borders

struct Part {
  int64_t tensor, begin, end;
  double sums[3];
};

struct Lamb {
  static constexpr int64_t arrays = 4, numbers = 7;
  static inline float update(const float *const *a, const float *s, int64_t i) {
    const float m = a[2][i] + s[0] * (a[1][i] - a[2][i]);
    const float v = s[1] * a[3][i] + s[2] * a[1][i] * a[1][i];
    return m * s[3] / (std::sqrt(v * s[4]) + s[5]) + s[6] * a[0][i];
  }
};

struct Lars {
  static constexpr int64_t arrays = 3, numbers = 3;
  static inline float update(const float *const *a, const float *s, int64_t i) {
    return s[0] * a[2][i] + s[1] * (a[1][i] + s[2] * a[0][i]);
  }
};

template <class Rule> void measure(const int64_t *row, const float *scalars, Part &part) {
  const float *arrays[Rule::arrays];
  float numbers[Rule::numbers];
  for (int64_t k = 0; k < Rule::arrays; k++) arrays[k] = reinterpret_cast<const float *>(row[k]);
  for (int64_t k = 0; k < Rule::numbers; k++) numbers[k] = scalars[k];
  for (int64_t begin = part.begin; begin < part.end; begin += BLOCK) {
    const int64_t end = begin + BLOCK < part.end ? begin + BLOCK : part.end;
    float g = 0, u = 0, x = 0;
    for (int64_t line = begin; line < end; line += 16) {
      for (int64_t k = 0; k < Rule::arrays; k++) __builtin_prefetch(arrays[k] + line + AHEAD);
      const int64_t stop = line + 16 < end ? line + 16 : end;
      for (int64_t i = line; i < stop; i++) {
        const float update = Rule::update(arrays, numbers, i);
        g += arrays[1][i] * arrays[1][i];
        u += update * update;
        x += arrays[0][i] * arrays[0][i];
      }
    }
    part.sums[0] += g;
    part.sums[1] += u;
    part.sums[2] += x;
  }
}

template <class Rule>
void measure_all(const int64_t *table, int64_t tensors, const float *scalars, double *sums, int64_t threads) {
  std::vector<Part> parts;
  for (int64_t t = 0; t < tensors; t++) {
    const int64_t length = table[t * (Rule::arrays + 1) + Rule::arrays];
    for (int64_t begin = 0; begin < length; begin += WORK)
      parts.push_back({t, begin, begin + WORK < length ? begin + WORK : length, {0, 0, 0}});
  }
  const int64_t count = static_cast<int64_t>(parts.size());
  auto work = [&](int64_t first) {
    for (int64_t p = first; p < count; p += threads)
      measure<Rule>(table + parts[p].tensor * (Rule::arrays + 1), scalars + parts[p].tensor * Rule::numbers, parts[p]);
  };
  std::vector<std::thread> others;
  for (int64_t first = 1; first < threads && first < count; first++) others.emplace_back(work, first);
  work(0);
  for (auto &other : others) other.join();
  for (const Part &part : parts)
    for (int k = 0; k < 3; k++) sums[part.tensor * 3 + k] += part.sums[k];
}

} // namespace

extern "C" void lamb(const int64_t *table, int64_t tensors, const float *scalars, double *sums, int64_t threads) {
  measure_all<Lamb>(table, tensors, scalars, sums, threads);
}

extern "C" void lars(const int64_t *table, int64_t tensors, const float *scalars, double *sums, int64_t threads) {
  measure_all<Lars>(table, tensors, scalars, sums, threads);
}
