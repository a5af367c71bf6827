// The two passes of LAMB and LARS over memory: `measure` writes sums of squares only, `apply` takes the step.
//
// One call serves all tensors. `table` has a row for each: the addresses of weights, gradient and moments, the length,
// and whether the update and the weights are measured or the gradient alone. `scalars` has a row for each; `sums` gets
// [gradient, update, weights]. Blocks are summed in float with many partial sums and added up in double, in order: no
// result depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t BLOCK = 4096;   // elements of one float sum
constexpr int64_t WORK = 1 << 18; // elements that a thread takes at a time
constexpr int64_t AHEAD = 512;    // elements to fetch ahead: the hardware stops at page borders
constexpr int64_t LINE = 16;      // elements of a cache line

struct Lamb {
  static constexpr int64_t arrays = 4, numbers = 8;
  // 1 - b1, b2, 1 - b2, 1 / c1, 1 / c2, eps, weight decay, rate
  static inline float first(const float *const *a, const float *s, int64_t i) {
    return a[2][i] + s[0] * (a[1][i] - a[2][i]);
  }
  static inline float second(const float *const *a, const float *s, int64_t i) {
    return s[1] * a[3][i] + s[2] * a[1][i] * a[1][i];
  }
  static inline float direction(float m, float v, float x, const float *s) {
    return m * s[3] / (std::sqrt(v * s[4]) + s[5]) + s[6] * x;
  }
  static inline float update(const float *const *a, const float *s, int64_t i) {
    return direction(first(a, s, i), second(a, s, i), a[0][i], s);
  }
  static inline void apply(float *const *a, const float *s, int64_t i) {
    const float m = first(a, s, i), v = second(a, s, i);
    a[0][i] -= s[7] * direction(m, v, a[0][i], s);
    a[2][i] = m;
    a[3][i] = v;
  }
};

struct Lars {
  static constexpr int64_t arrays = 3, numbers = 4;
  // b, share of what comes in, weight decay, rate
  static inline float update(const float *const *a, const float *s, int64_t i) {
    return s[0] * a[2][i] + s[1] * (a[1][i] + s[2] * a[0][i]);
  }
  static inline void apply(float *const *a, const float *s, int64_t i) {
    const float m = update(a, s, i);
    a[0][i] -= s[3] * m;
    a[2][i] = m;
  }
};

struct Part {
  int64_t tensor, begin, end;
  double sums[3];
};

template <class Rule> struct Pass {
  const int64_t *table;
  const float *scalars;
  static constexpr int64_t columns = Rule::arrays + 2;

  std::vector<Part> parts(int64_t tensors) const {
    std::vector<Part> result;
    for (int64_t t = 0; t < tensors; t++) {
      const int64_t length = table[t * columns + Rule::arrays];
      for (int64_t begin = 0; begin < length; begin += WORK)
        result.push_back({t, begin, std::min(begin + WORK, length), {0, 0, 0}});
    }
    return result;
  }

  void measure(Part &part) const {
    float *a[Rule::arrays], s[Rule::numbers];
    const bool all = arguments(part, a, s);
    for (int64_t begin = part.begin; begin < part.end; begin += BLOCK) {
      const int64_t end = std::min(begin + BLOCK, part.end);
      float g = 0, u = 0, x = 0;
      for (int64_t line = begin; line < end; line += LINE) {
        const int64_t stop = std::min(line + LINE, end);
        if (!all) {
          for (int64_t i = line; i < stop; i++) g += a[1][i] * a[1][i];
          continue;
        }
        for (int64_t k = 0; k < Rule::arrays; k++) __builtin_prefetch(a[k] + line + AHEAD);
        for (int64_t i = line; i < stop; i++) {
          const float update = Rule::update(a, s, i);
          g += a[1][i] * a[1][i];
          u += update * update;
          x += a[0][i] * a[0][i];
        }
      }
      part.sums[0] += g;
      part.sums[1] += u;
      part.sums[2] += x;
    }
  }

  void apply(Part &part) const {
    float *a[Rule::arrays], s[Rule::numbers];
    arguments(part, a, s);
    for (int64_t line = part.begin; line < part.end; line += LINE) {
      const int64_t stop = std::min(line + LINE, part.end);
      for (int64_t k = 0; k < Rule::arrays; k++) __builtin_prefetch(a[k] + line + AHEAD, 1);
#pragma GCC ivdep
      for (int64_t i = line; i < stop; i++) Rule::apply(a, s, i);
    }
  }

  bool arguments(const Part &part, float **a, float *s) const {
    const int64_t *row = table + part.tensor * columns;
    for (int64_t k = 0; k < Rule::arrays; k++) a[k] = reinterpret_cast<float *>(row[k]);
    for (int64_t k = 0; k < Rule::numbers; k++) s[k] = scalars[part.tensor * Rule::numbers + k];
    return row[Rule::arrays + 1] != 0;
  }
};

template <class Work> void on_threads(std::vector<Part> &parts, int64_t threads, Work work) {
  const int64_t count = static_cast<int64_t>(parts.size());
  auto every = [&](int64_t first) {
    for (int64_t p = first; p < count; p += threads) work(parts[p]);
  };
  std::vector<std::thread> others;
  for (int64_t first = 1; first < threads && first < count; first++) others.emplace_back(every, first);
  every(0);
  for (auto &other : others) other.join();
}

template <class Rule>
void measure(const int64_t *table, int64_t tensors, const float *scalars, double *sums, int64_t threads) {
  const Pass<Rule> pass{table, scalars};
  std::vector<Part> parts = pass.parts(tensors);
  on_threads(parts, threads, [&](Part &part) { pass.measure(part); });
  for (const Part &part : parts)
    for (int k = 0; k < 3; k++) sums[part.tensor * 3 + k] += part.sums[k];
}

template <class Rule> void apply(const int64_t *table, int64_t tensors, const float *scalars, int64_t threads) {
  const Pass<Rule> pass{table, scalars};
  std::vector<Part> parts = pass.parts(tensors);
  std::reverse(parts.begin(), parts.end()); // a cache may still hold what was measured last
  on_threads(parts, threads, [&](Part &part) { pass.apply(part); });
}

} // namespace

extern "C" {
void measure_lamb(const int64_t *table, int64_t tensors, const float *scalars, double *sums, int64_t threads) {
  measure<Lamb>(table, tensors, scalars, sums, threads);
}
void measure_lars(const int64_t *table, int64_t tensors, const float *scalars, double *sums, int64_t threads) {
  measure<Lars>(table, tensors, scalars, sums, threads);
}
void apply_lamb(const int64_t *table, int64_t tensors, const float *scalars, int64_t threads) {
  apply<Lamb>(table, tensors, scalars, threads);
}
void apply_lars(const int64_t *table, int64_t tensors, const float *scalars, int64_t threads) {
  apply<Lars>(table, tensors, scalars, threads);
}
}
