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
// Number of panels that MOST_ROWS rows are multiplied by at a time: as many as there are registers for.
constexpr int64_t TOGETHER = std::max(1, REGISTERS / (MOST_ROWS * VECTORS));
// Number of groups of MOST_ROWS rows that are multiplied by a panel before the next panel is read. Weights with few
// inputs are short, so reading them again costs little, and fewer rows of a wide result need fewer address
// translations.
constexpr int64_t SHORT_BLOCKS = 8, LONG_BLOCKS = 16, LONG_FROM = 512;

using Vector = float __attribute__((vector_size(LANES * sizeof(float))));
using Unaligned = float __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector vector) { *reinterpret_cast<Unaligned*>(to) = vector; }

// Computes ROWS rows of the products with COUNT panels, starting at the given row and panel.
template <int ROWS, int COUNT>
inline void multiply_block(const PanelProduct& product, int64_t row, int64_t panel) {
  constexpr int ALL = COUNT * VECTORS;
  const int64_t inner = product.inner, first = panel * PANEL;
  const int64_t columns = std::min<int64_t>(COUNT * PANEL, product.width - first);
  const bool is_full = columns == COUNT * PANEL;
  float edge[COUNT * PANEL] = {};
  Vector sums[ROWS][ALL];
  for (int at = 0; at < ROWS; ++at) {
    const float* from = edge;
    if (product.addend != nullptr) {
      from = product.addend + (row + at) * product.addend_stride + first;
      if (!is_full) {
        std::copy_n(from, columns, edge);
        from = edge;
      }
    }
#pragma GCC unroll 8
    for (int vector = 0; vector < ALL; ++vector) sums[at][vector] = load(from + vector * LANES);
  }
  const int64_t x_stride = product.x_stride;
  const float* x = product.x + row * x_stride;
  const float* weight = product.panels + panel * inner * PANEL;
  for (int64_t step = 0; step < inner; ++step, weight += PANEL) {
    Vector weights[ALL];
#pragma GCC unroll 8
    for (int vector = 0; vector < ALL; ++vector) {
      weights[vector] = load(weight + vector / VECTORS * inner * PANEL + vector % VECTORS * LANES);
    }
#pragma GCC unroll 12
    for (int at = 0; at < ROWS; ++at) {
      const float factor = x[at * x_stride + step];
#pragma GCC unroll 8
      for (int vector = 0; vector < ALL; ++vector) sums[at][vector] += factor * weights[vector];
    }
  }
  for (int at = 0; at < ROWS; ++at) {
    float* to = product.out + (row + at) * product.out_stride + first;
    float* whole = is_full ? to : edge;
#pragma GCC unroll 8
    for (int vector = 0; vector < ALL; ++vector) store(whole + vector * LANES, sums[at][vector]);
    if (!is_full) std::copy_n(edge, columns, to);
  }
}

// Multiplies ROWS rows by as many panels at a time as there are registers for, because each addition to a
// sum waits for the previous one.
template <int ROWS>
void multiply_rows(const PanelProduct& product, int64_t row, int64_t first, int64_t last) {
  constexpr int COUNT = std::min(4, std::max(1, REGISTERS / (ROWS * VECTORS)));
  int64_t panel = first;
  for (; panel + COUNT <= last; panel += COUNT) multiply_block<ROWS, COUNT>(product, row, panel);
  for (; panel < last; ++panel) multiply_block<ROWS, 1>(product, row, panel);
}

using MultiplyRows = void (*)(const PanelProduct& product, int64_t row, int64_t first, int64_t last);

template <int... ROWS>
constexpr std::array<MultiplyRows, MOST_ROWS> tabulate(std::integer_sequence<int, ROWS...>) {
  return {multiply_rows<ROWS + 1>...};
}

constexpr auto BY_ROWS = tabulate(std::make_integer_sequence<int, MOST_ROWS>());  // [n - 1] multiplies n rows

using Indices = int32_t __attribute__((vector_size(LANES * sizeof(int32_t))));

// Swaps the off-diagonal blocks of all (2 SIZE, 2 SIZE) blocks of a square of vectors.
template <int SIZE>
inline void swap_blocks(Vector* rows) {
  Indices upper, lower;
  for (int at = 0; at < LANES; ++at) {
    const bool is_left = at % (2 * SIZE) < SIZE;
    upper[at] = is_left ? at : LANES + at - SIZE;
    lower[at] = is_left ? at + SIZE : LANES + at;
  }
#pragma GCC unroll 16
  for (int at = 0; at < LANES; ++at) {
    if (at % (2 * SIZE) >= SIZE) continue;
    const Vector first = rows[at], second = rows[at + SIZE];
    rows[at] = __builtin_shuffle(first, second, upper);
    rows[at + SIZE] = __builtin_shuffle(first, second, lower);
  }
  if constexpr (SIZE > 1) swap_blocks<SIZE / 2>(rows);
}

// Transposes a square of LANES x LANES elements.
inline void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Vector rows[LANES];
#pragma GCC unroll 16
  for (int at = 0; at < LANES; ++at) rows[at] = load(from + at * from_stride);
  swap_blocks<LANES / 2>(rows);
#pragma GCC unroll 16
  for (int at = 0; at < LANES; ++at) store(to + at * to_stride, rows[at]);
}

}  // namespace

#define JOIN_(left, right) left##right
#define JOIN(left, right) JOIN_(left, right)
void JOIN(NMT_MOE_LEVEL, _multiply_panels)(const PanelProduct& product, int64_t rows, int64_t first, int64_t last) {
  if (rows <= MOST_ROWS) {
    if (rows > 0) BY_ROWS[rows - 1](product, 0, first, last);
    return;
  }
  const int64_t step = MOST_ROWS * (product.inner < LONG_FROM ? SHORT_BLOCKS : LONG_BLOCKS);
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

void JOIN(NMT_MOE_LEVEL, _pack_panels)(const float* matrix, int64_t row_stride, int64_t column_stride, float* panels,
                                       int64_t inner, int64_t columns) {
  for (int64_t first = 0; first < columns; first += PANEL, panels += inner * PANEL) {
    const int64_t count = std::min(PANEL, columns - first);
    const float* from = matrix + first * column_stride;
    int64_t row = 0;
    if (count == PANEL && column_stride == 1) {
      for (; row < inner; ++row) {
        for (int at = 0; at < PANEL; at += LANES) store(panels + row * PANEL + at, load(from + row * row_stride + at));
      }
    } else if (count == PANEL && row_stride == 1) {
      for (; row + LANES <= inner; row += LANES) {
        for (int at = 0; at < PANEL; at += LANES) {
          transpose_square(from + row + at * column_stride, column_stride, panels + row * PANEL + at, PANEL);
        }
      }
    }
    for (; row < inner; ++row) {
      for (int64_t at = 0; at < PANEL; ++at) {
        panels[row * PANEL + at] = at < count ? from[row * row_stride + at * column_stride] : 0.0f;
      }
    }
  }
}

void JOIN(NMT_MOE_LEVEL, _transpose)(const float* from, int64_t stride, float* to, int64_t rows, int64_t inner) {
  const int64_t whole_rows = rows - rows % LANES, whole_inner = inner - inner % LANES;
  for (int64_t row = 0; row < whole_rows; row += LANES) {
    for (int64_t at = 0; at < whole_inner; at += LANES) {
      transpose_square(from + at * stride + row, stride, to + row * inner + at, inner);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t at = row < whole_rows ? whole_inner : 0; at < inner; ++at) {
      to[row * inner + at] = from[at * stride + row];
    }
  }
}

}  // namespace nmt_moe
