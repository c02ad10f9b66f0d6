// Products with weights in panels. Vectors are spelt out, because the sums of a block of rows must stay in registers.
// This file is compiled so that a product and the addition that follows are one instruction.
#include <algorithm>
#include <array>
#include <utility>

#include "inference_loops.h"

namespace nmt_moe {
namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, REGISTERS = 24, MOST_ROWS = 12;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 12, MOST_ROWS = 6;
#else
constexpr int LANES = 4, REGISTERS = 12, MOST_ROWS = 3;
#endif
constexpr int VECTORS = PANEL / LANES;  // in a row of a panel
// How many panels MOST_ROWS rows are multiplied by at a time: as many as there are registers for.
constexpr int64_t TOGETHER = std::max(1, REGISTERS / (MOST_ROWS * VECTORS));
// How many groups of MOST_ROWS rows are multiplied by a panel before the next panel is read. Weights with few inputs are
// short, so reading them again costs little, and fewer rows of a wide result need fewer address translations.
constexpr int64_t SHORT_BLOCKS = 8, LONG_BLOCKS = 16, LONG_FROM = 512;

using Vector = float __attribute__((vector_size(LANES * sizeof(float))));
using Unaligned = float __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector vector) { *reinterpret_cast<Unaligned*>(to) = vector; }

struct Product {
  const float* x;
  const float* panels;
  const float* addend;
  int64_t stride;
  float* out;
  int64_t inner, width;
};

// Computes ROWS rows of COUNT panels, from the given row and panel on.
template <int ROWS, int COUNT>
inline void multiply_block(const Product& product, int64_t row, int64_t panel) {
  constexpr int ALL = COUNT * VECTORS;
  const int64_t inner = product.inner, first = panel * PANEL;
  const int64_t columns = std::min<int64_t>(COUNT * PANEL, product.width - first);
  const bool is_full = columns == COUNT * PANEL;
  float edge[COUNT * PANEL] = {};
  Vector sums[ROWS][ALL];
  for (int at = 0; at < ROWS; ++at) {
    const float* from = edge;
    if (product.addend != nullptr) {
      from = product.addend + (row + at) * product.stride + first;
      if (!is_full) {
        std::copy_n(from, columns, edge);
        from = edge;
      }
    }
#pragma GCC unroll 8
    for (int vector = 0; vector < ALL; ++vector) sums[at][vector] = load(from + vector * LANES);
  }
  const float* x = product.x + row * inner;
  const float* weight = product.panels + panel * inner * PANEL;
  for (int64_t step = 0; step < inner; ++step, weight += PANEL) {
    Vector weights[ALL];
#pragma GCC unroll 8
    for (int vector = 0; vector < ALL; ++vector) {
      weights[vector] = load(weight + vector / VECTORS * inner * PANEL + vector % VECTORS * LANES);
    }
#pragma GCC unroll 12
    for (int at = 0; at < ROWS; ++at) {
      const float factor = x[at * inner + step];
#pragma GCC unroll 8
      for (int vector = 0; vector < ALL; ++vector) sums[at][vector] += factor * weights[vector];
    }
  }
  for (int at = 0; at < ROWS; ++at) {
    float* to = product.out + (row + at) * product.width + first;
    float* whole = is_full ? to : edge;
#pragma GCC unroll 8
    for (int vector = 0; vector < ALL; ++vector) store(whole + vector * LANES, sums[at][vector]);
    if (!is_full) std::copy_n(edge, columns, to);
  }
}

// Multiplies ROWS rows by as many panels at a time as there are registers for, because each sum waits for its last
// addition.
template <int ROWS>
void multiply_rows(const Product& product, int64_t row, int64_t first, int64_t last) {
  constexpr int COUNT = std::min(4, std::max(1, REGISTERS / (ROWS * VECTORS)));
  int64_t panel = first;
  for (; panel + COUNT <= last; panel += COUNT) multiply_block<ROWS, COUNT>(product, row, panel);
  for (; panel < last; ++panel) multiply_block<ROWS, 1>(product, row, panel);
}

using MultiplyRows = void (*)(const Product& product, int64_t row, int64_t first, int64_t last);

template <int... ROWS>
constexpr std::array<MultiplyRows, MOST_ROWS> tabulate(std::integer_sequence<int, ROWS...>) {
  return {multiply_rows<ROWS + 1>...};
}

constexpr auto BY_ROWS = tabulate(std::make_integer_sequence<int, MOST_ROWS>());  // [n - 1] multiplies n rows

}  // namespace

#define JOIN_(left, right) left##right
#define JOIN(left, right) JOIN_(left, right)
void JOIN(NMT_MOE_LEVEL, _multiply_panels)(const float* x, const float* panels, const float* addend, int64_t stride,
                                           float* out, int64_t rows, int64_t inner, int64_t width, int64_t first,
                                           int64_t last) {
  const Product product{x, panels, addend, stride, out, inner, width};
  if (rows <= MOST_ROWS) {
    if (rows > 0) BY_ROWS[rows - 1](product, 0, first, last);
    return;
  }
  const int64_t step = MOST_ROWS * (inner < LONG_FROM ? SHORT_BLOCKS : LONG_BLOCKS);
  for (int64_t start = 0; start < rows; start += step) {
    const int64_t stop = std::min(rows, start + step);
    const int64_t groups = (stop - start + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t panel = first; panel < last; panel += TOGETHER) {
      // The sizes of the groups differ by at most one row.
      for (int64_t group = 0, row = start; group < groups; ++group) {
        const int64_t size = (stop - row) / (groups - group);
        BY_ROWS[size - 1](product, row, panel, std::min(last, panel + TOGETHER));
        row += size;
      }
    }
  }
}

}  // namespace nmt_moe
