// Declarations for all files of operators. The callers in Python check shapes and types, and pass tensors on the CPU.
// Threads divide the work between rows or blocks of columns, never within a sum, so that results do not depend on the
// number of threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "inference_loops.h"
#include "loops.h"

namespace nmt_moe {

using at::Tensor;
using std::optional;

// Returns the loops of this processor's level.
#ifdef NMT_MOE_X86
#define CHOOSE(TYPE, NAME, SUFFIX)                               \
  inline const TYPE& NAME() {                                    \
    static const std::string level = at::get_cpu_capability();   \
    if (level == "AVX512") return avx512_##SUFFIX();             \
    return level == "AVX2" ? avx2_##SUFFIX() : plain_##SUFFIX(); \
  }
#else
#define CHOOSE(TYPE, NAME, SUFFIX) \
  inline const TYPE& NAME() { return plain_##SUFFIX(); }
#endif
CHOOSE(Loops<float>, choose_float_loops, float)
CHOOSE(Loops<double>, choose_double_loops, double)
CHOOSE(InferenceLoops, choose_inference_loops, inference)
#undef CHOOSE

template <typename T>
const Loops<T>& choose_loops() {
  if constexpr (std::is_same_v<T, float>) {
    return choose_float_loops();
  } else {
    return choose_double_loops();
  }
}

// Computes out = left * right, or adds the product to `out`, for matrices or batches of them. With `relu`, negative
// results become 0. torch computes the product, except on processors that its library is not made for.
void multiply_into(const Tensor& left, const Tensor& right, Tensor out, bool accumulate, bool relu = false);

// Smallest number of LSTM cells that is worth a thread of its own.
constexpr int64_t CELLS_PER_THREAD = 4096;

}  // namespace nmt_moe
