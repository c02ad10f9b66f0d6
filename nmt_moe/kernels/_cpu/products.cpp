// Products of matrices in training, in float32. Right-hand sides are copied into panels, a few columns at a time, so
// that they are read in order. Both sides may be transposed views.
#include "operators.h"

namespace nmt_moe {
namespace {

// Number of columns that a thread takes at a time, and number of rows of the right-hand side that are copied at a time.
// The copy stays in a cache close to the core.
constexpr int64_t COLUMNS = 2 * PANEL, INNER = 1024;
// Number of elements of a transposed left-hand side that are copied at a time, and number of rows that a thread copies.
constexpr int64_t TURNED = 1 << 21, TURNED_ROWS = 32;

// A batch of left-hand sides (C, rows, inner) with consecutive elements in each row.
struct Lefts {
  const float* rows;
  int64_t batch_stride, row_stride;
};

// Computes the product for `rows` rows of each batch. The results start at `outs`, with the strides of `out`.
void multiply_rows(const Lefts& left, const Tensor& right, const Tensor& out, float* outs, int64_t rows,
                   bool accumulate, bool relu) {
  const int64_t inner = right.size(1), width = right.size(2), blocks = (width + COLUMNS - 1) / COLUMNS;
  const auto& loops = choose_inference_loops();
  const auto* rights = right.const_data_ptr<float>();
  at::parallel_for(0, right.size(0) * blocks, 1, [&](int64_t start, int64_t stop) {
    std::vector<float> panels(std::min(INNER, inner) * COLUMNS);
    for (int64_t task = start; task < stop; ++task) {
      const int64_t batch = task / blocks, column = task % blocks * COLUMNS;
      const int64_t columns = std::min(COLUMNS, width - column), number = (columns + PANEL - 1) / PANEL;
      auto* own = outs + batch * out.stride(0) + column;
      for (int64_t first = 0; first < inner; first += INNER) {
        const int64_t count = std::min(INNER, inner - first);
        const auto* from = rights + batch * right.stride(0) + first * right.stride(1) + column * right.stride(2);
        loops.pack_panels(from, right.stride(1), right.stride(2), panels.data(), count, columns);
        const float* addend = accumulate || first > 0 ? own : nullptr;
        loops.multiply_panels({left.rows + batch * left.batch_stride + first, left.row_stride, panels.data(), addend,
                               out.stride(1), own, out.stride(1), count, columns},
                              rows, 0, number);
      }
      if (!relu) continue;
      for (int64_t row = 0; row < rows; ++row) loops.relu(own + row * out.stride(1), columns);
    }
  });
}

// Computes out (C, M, N) = left (C, M, K) * right (C, K, N), or adds the products to `out`. With `relu`, negative
// results become 0. The elements of a row of `out` are consecutive.
void multiply_matrices(const Tensor& left, const Tensor& right, Tensor out, bool accumulate, bool relu) {
  const int64_t batches = left.size(0), rows = left.size(1), inner = left.size(2), width = right.size(2);
  TORCH_CHECK_VALUE(right.size(0) == batches && right.size(1) == inner && out.size(0) == batches &&
                        out.size(1) == rows && out.size(2) == width && (width == 1 || out.stride(2) == 1),
                    "the shapes of a product do not match: ", left.sizes(), ", ", right.sizes(), ", ", out.sizes(),
                    ".");
  if (batches == 0 || rows == 0 || width == 0) return;
  if (inner == 0) {
    if (!accumulate) out.zero_();
    return;
  }
  const bool has_whole_rows = left.stride(2) == 1 || inner == 1;
  auto* outs = out.data_ptr<float>();
  if (has_whole_rows || left.stride(1) != 1) {
    const Tensor whole = has_whole_rows ? left : left.contiguous();
    const Lefts lefts{whole.const_data_ptr<float>(), whole.stride(0), whole.stride(1)};
    return multiply_rows(lefts, right, out, outs, rows, accumulate, relu);
  }
  // A transposed left-hand side is copied, a part of its rows at a time.
  const auto& loops = choose_inference_loops();
  const int64_t most = TURNED / (batches * inner * TURNED_ROWS) * TURNED_ROWS;
  const int64_t part = std::min(rows, std::max(TURNED_ROWS, most));
  Tensor turned = at::empty({batches, part, inner}, left.options());
  const auto* from = left.const_data_ptr<float>();
  auto* to = turned.data_ptr<float>();
  for (int64_t first = 0; first < rows; first += part) {
    const int64_t count = std::min(part, rows - first), pieces = (count + TURNED_ROWS - 1) / TURNED_ROWS;
    at::parallel_for(0, batches * pieces, 1, [&](int64_t start, int64_t stop) {
      for (int64_t task = start; task < stop; ++task) {
        const int64_t batch = task / pieces, row = task % pieces * TURNED_ROWS;
        loops.transpose(from + batch * left.stride(0) + first + row, left.stride(2), to + (batch * part + row) * inner,
                        std::min(TURNED_ROWS, count - row), inner);
      }
    });
    multiply_rows({to, part * inner, inner}, right, out, outs + first * out.stride(1), count, accumulate, relu);
  }
}

// Returns whether these products are faster than torch's. They are if torch uses MKL, which is made for Intel's
// processors, on a processor of another maker: there, MKL does not use 512-bit vectors.
bool is_faster_than_torch() {
#ifdef NMT_MOE_X86
  __builtin_cpu_init();
  const std::string level = at::get_cpu_capability();
  return at::hasMKL() && !__builtin_cpu_is("intel") && (level == "AVX2" || level == "AVX512");
#else
  return false;
#endif
}

}  // namespace

void multiply_into(const Tensor& left, const Tensor& right, Tensor out, bool accumulate, bool relu) {
  static const bool is_faster = is_faster_than_torch();
  at::AutoDispatchBelowADInplaceOrView guard;
  const bool is_batch = left.dim() == 3;
  if (is_faster && out.scalar_type() == at::kFloat && out.stride(-1) == 1) {
    if (is_batch) return multiply_matrices(left, right, out, accumulate, relu);
    return multiply_matrices(left.unsqueeze(0), right.unsqueeze(0), out.unsqueeze(0), accumulate, relu);
  }
  if (accumulate && is_batch) {
    out.baddbmm_(left, right);
  } else if (accumulate) {
    out.addmm_(left, right);
  } else if (is_batch) {
    at::bmm_out(out, left, right);
  } else {
    at::mm_out(out, left, right);
  }
  if (relu) out.relu_();
}

TORCH_LIBRARY_FRAGMENT(nmt_moe, library) {
  library.def("multiply_matrices(Tensor left, Tensor right, Tensor(a!) out, bool accumulate, bool relu) -> ()");
  library.def("multiply_into(Tensor left, Tensor right, Tensor(a!) out, bool accumulate, bool relu) -> ()");
}

TORCH_LIBRARY_IMPL(nmt_moe, CPU, library) {
  library.impl("multiply_matrices", multiply_matrices);
  library.impl("multiply_into", multiply_into);
}

}  // namespace nmt_moe
