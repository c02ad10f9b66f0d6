// The operators of an inference step, in float32: LSTMs, attention, and the choice and mixture of experts.
#include <cmath>

#include "operators.h"

namespace nmt_moe {
namespace {

// Smallest numbers of multiplications and of rows of attention that are worth a thread of their own.
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 20, QUERIES_PER_THREAD = 16;
// Number of rows of logits that are computed at a time, and smallest number of logits that is worth a thread of its own.
constexpr int64_t LOGIT_ROWS = 24, LOGITS_PER_THREAD = 1 << 15;
// An LSTM with at most this many gates computes this many rows at a time, so that their gates stay in a cache. Wider
// LSTMs do not, because their weights would have to be read again for each block.
constexpr int64_t NARROW_GATES = 2048, BLOCK_ROWS = 96;

// Computes out (R, O) = addend + x (R, I) * weight, with the weight in panels. The addend is a row (O) or a matrix
// (R, O), which may be `out` itself; null stands for zeros.
void multiply(const float* x, int64_t rows, const Tensor& panels, const float* addend, bool is_matrix, float* out,
              int64_t width) {
  const auto& loops = choose_inference_loops();
  const int64_t inner = panels.size(-2), number = panels.size(-3), stride = is_matrix ? width : 0;
  const auto* weights = panels.const_data_ptr<float>();
  const int64_t products = std::max<int64_t>(1, inner * width * rows);
  if (rows < number) {  // a thread reads only its own panels
    const int64_t grain = std::max<int64_t>(1, number * PRODUCTS_PER_THREAD / products);
    at::parallel_for(0, number, grain, [&](int64_t first, int64_t last) {
      loops.multiply_panels({x, inner, weights, addend, stride, out, width, inner, width}, rows, first, last);
    });
    return;
  }
  const int64_t grain = std::max<int64_t>(1, rows * PRODUCTS_PER_THREAD / products);
  at::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    const float* own_addend = addend == nullptr ? nullptr : addend + first * stride;
    loops.multiply_panels(
        {x + first * inner, inner, weights, own_addend, stride, out + first * width, width, inner, width}, last - first,
        0, number);
  });
}

// Computes addend + x (R, I) * weight (R, O), with the weight in panels (P, I, PANEL), and an addend (O) or (R, O).
Tensor multiply_panels(const Tensor& x, const Tensor& panels, const optional<Tensor>& addend, int64_t width) {
  TORCH_CHECK_VALUE(x.size(1) == panels.size(1), "`x` must have ", panels.size(1), " columns, but has ", x.size(1),
                    ".");
  TORCH_CHECK_VALUE(!addend || (addend->size(-1) == width && (addend->dim() == 1 || addend->size(0) == x.size(0))),
                    "`addend` must be one row of ", width, " columns, or ", x.size(0), " such rows.");
  const Tensor rows = x.contiguous(), sum = addend ? addend->contiguous() : Tensor();
  Tensor out = at::empty({x.size(0), width}, x.options());
  multiply(rows.const_data_ptr<float>(), x.size(0), panels, addend ? sum.const_data_ptr<float>() : nullptr,
           addend && sum.dim() == 2, out.data_ptr<float>(), width);
  return out;
}

// Turns gates (R, 4 H), which are overwritten, into new cells and hidden values (R, H). Row r continues the row
// parents[r] of cell_before, or row r itself if there are no parents.
void finish_cells(float* gates, const float* cell_before, const int64_t* parents, float* cell, float* hidden,
                  int64_t rows, int64_t cells) {
  const auto& loops = choose_loops<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, CELLS_PER_THREAD / cells), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * cells, parent = parents == nullptr ? row : parents[row];
      loops.lstm_forward(gates + 4 * at, cell_before + parent * cells, cell + at, hidden + at, 1, cells);
    }
  });
}

// The used rows of a matrix, gathered, and for each reader, the index of its row among them.
struct Used {
  Tensor rows;
  std::vector<int64_t> number;
};

Used gather_used(const Tensor& matrix, const Tensor& readers) {
  const int64_t width = matrix.size(1), count = readers.numel();
  const auto* wanted = readers.const_data_ptr<int64_t>();
  std::vector<int64_t> place(matrix.size(0), -1), used;
  Used result{{}, std::vector<int64_t>(count)};
  for (int64_t reader = 0; reader < count; ++reader) {
    const int64_t row = wanted[reader];
    TORCH_CHECK_INDEX(row >= 0 && row < matrix.size(0), "a row must be from 0 to ", matrix.size(0) - 1, ", but is ",
                      row, ".");
    if (place[row] < 0) {
      place[row] = int64_t(used.size());
      used.push_back(row);
    }
    result.number[reader] = place[row];
  }
  if (int64_t(used.size()) == count && std::is_sorted(used.begin(), used.end()) && count == matrix.size(0)) {
    result.rows = matrix;
    return result;
  }
  result.rows = at::empty({int64_t(used.size()), width}, matrix.options());
  const auto* from = matrix.const_data_ptr<float>();
  auto* to = result.rows.data_ptr<float>();
  for (const int64_t row : used) to = std::copy_n(from + row * width, width, to);
  return result;
}

// Computes the log-softmax of x (R, I) * weight (R, O), with the weight in panels, for a few rows at a time, so that
// their logits are still in a cache.
Tensor log_probabilities(const Tensor& x, const Tensor& panels, int64_t width) {
  TORCH_CHECK_VALUE(x.size(1) == panels.size(1), "`x` must have ", panels.size(1), " columns, but has ", x.size(1),
                    ".");
  const Tensor inputs = x.contiguous();
  const int64_t rows = x.size(0), inner = x.size(1);
  Tensor out = at::empty({rows, width}, x.options());
  const auto& loops = choose_inference_loops();
  const auto* from = inputs.const_data_ptr<float>();
  auto* to = out.data_ptr<float>();
  if (rows <= LOGIT_ROWS) multiply(from, rows, panels, nullptr, false, to, width);
  const int64_t size = rows <= LOGIT_ROWS ? 1 : LOGIT_ROWS;
  at::parallel_for(0, (rows + size - 1) / size, std::max<int64_t>(1, LOGITS_PER_THREAD / (size * width)),
                   [&](int64_t start, int64_t stop) {
    for (int64_t first = start * size; first < std::min(rows, stop * size); first += size) {
      const int64_t count = std::min(size, rows - first);
      auto* own = to + first * width;
      if (size > 1) {
        loops.multiply_panels({from + first * inner, inner, panels.const_data_ptr<float>(), nullptr, 0, own, width, inner,
                               width}, count, 0, panels.size(0));
      }
      for (int64_t row = 0; row < count; ++row) loops.log_softmax(own + row * width, width);
    }
  });
  return out;
}

// Runs one step of an LSTM.
//
// The input's part of the gates is bias (4 H) + x (R, I) * of_input or, if `tokens` (R) are given, their rows of x,
// which is then a table (V, 4 H). The state consists of previous outputs (P, D) and cells (P, H). Row r continues row
// parents[r], or row r itself if there are no parents. A previous output is multiplied once for all rows that continue
// it. The weights are in panels. Returns the outputs (R, O) and the new cells.
std::tuple<Tensor, Tensor> packed_lstm_step(const Tensor& x, const optional<Tensor>& tokens, const Tensor& of_input,
                                            const Tensor& bias, const Tensor& previous, const Tensor& of_previous,
                                            const Tensor& cell, const optional<Tensor>& parents,
                                            const optional<Tensor>& projection, int64_t output_dim) {
  const int64_t rows = tokens ? tokens->numel() : x.size(0), cells = cell.size(1), width = 4 * cells;
  TORCH_CHECK_VALUE(x.size(1) == (tokens ? width : of_input.size(1)) && previous.size(1) == of_previous.size(1) &&
                        bias.numel() == width,
                    "the LSTM reads inputs and outputs of widths ", of_input.size(1), " and ", of_previous.size(1),
                    ", but got ", x.size(1), " and ", previous.size(1), ".");
  TORCH_CHECK_VALUE(previous.size(0) == cell.size(0) && (parents ? parents->numel() : cell.size(0)) == rows,
                    "the LSTM must have ", rows, " parents or, without parents, a state of ", rows, " rows.");
  const Tensor inputs = x.contiguous(), outputs = previous.contiguous(), before = cell.contiguous();
  const Tensor numbers = tokens ? tokens->contiguous() : Tensor(), owners = parents ? parents->contiguous() : Tensor();
  const Used used = parents ? gather_used(outputs, owners) : Used{outputs, {}};
  Tensor recurrent = at::empty({used.rows.size(0), width}, x.options());
  multiply(used.rows.const_data_ptr<float>(), used.rows.size(0), of_previous, nullptr, false,
           recurrent.data_ptr<float>(), width);

  const int64_t block = std::max<int64_t>(1, width <= NARROW_GATES ? std::min(BLOCK_ROWS, rows) : rows);
  Tensor gates = at::empty({block, width}, x.options()), now = at::empty({rows, cells}, x.options());
  Tensor hidden = at::empty({projection ? block : rows, cells}, x.options());
  Tensor output = projection ? at::empty({rows, output_dim}, x.options()) : hidden;
  const auto& loops = choose_inference_loops();
  const auto* all_inputs = inputs.const_data_ptr<float>();
  const auto* products = recurrent.const_data_ptr<float>();
  auto* own_gates = gates.data_ptr<float>();
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t count = std::min(block, rows - first);
    if (tokens) {
      for (int64_t row = 0; row < count; ++row) {
        const int64_t token = numbers.const_data_ptr<int64_t>()[first + row];
        TORCH_CHECK_INDEX(token >= 0 && token < x.size(0), "a token must be from 0 to ", x.size(0) - 1, ", but is ",
                          token, ".");
        std::copy_n(all_inputs + token * width, width, own_gates + row * width);
      }
    } else {
      multiply(all_inputs + first * x.size(1), count, of_input, bias.const_data_ptr<float>(), false, own_gates, width);
    }
    for (int64_t row = 0; row < count; ++row) {
      const int64_t from = parents ? used.number[first + row] : first + row;
      loops.add_scaled(products + from * width, 1.0f, own_gates + row * width, width);
    }
    auto* own_hidden = hidden.data_ptr<float>() + (projection ? 0 : first * cells);
    const int64_t offset = parents ? 0 : first * cells;
    finish_cells(own_gates, before.const_data_ptr<float>() + offset,
                 parents ? owners.const_data_ptr<int64_t>() + first : nullptr, now.data_ptr<float>() + first * cells,
                 own_hidden, count, cells);
    if (projection) {
      multiply(own_hidden, count, *projection, nullptr, false, output.data_ptr<float>() + first * output_dim,
               output_dim);
    }
  }
  return {output, now};
}

// Runs an LSTM over sentences, of which the first counts[t] still have a token at step t. gates (S, B, 4 H) contain the
// input's part and are overwritten. Returns the outputs (S, B, O), with 0 after a sentence's end.
Tensor packed_lstm(Tensor gates, const Tensor& of_previous, const optional<Tensor>& projection, at::IntArrayRef counts,
                   int64_t output_dim) {
  const int64_t steps = gates.size(0), batch = gates.size(1), cells = gates.size(2) / 4;
  Tensor outputs = at::zeros({steps, batch, output_dim}, gates.options());
  Tensor cell = at::zeros({batch, cells}, gates.options());
  Tensor hidden = projection ? at::empty({batch, cells}, gates.options()) : Tensor();
  auto* all_gates = gates.data_ptr<float>();
  auto* all_outputs = outputs.data_ptr<float>();
  auto* own_cells = cell.data_ptr<float>();
  for (int64_t at = 0; at < steps; ++at) {
    auto* own_gates = all_gates + at * batch * 4 * cells;
    auto* output = all_outputs + at * batch * output_dim;
    auto* own_hidden = projection ? hidden.data_ptr<float>() : output;
    if (at > 0) multiply(output - batch * output_dim, counts[at], of_previous, own_gates, true, own_gates, 4 * cells);
    finish_cells(own_gates, own_cells, nullptr, own_cells, own_hidden, counts[at], cells);
    if (projection) multiply(own_hidden, counts[at], *projection, nullptr, false, output, output_dim);
  }
  return outputs;
}

// Computes the attention of query (R, D), which may be overwritten, to each row's sentence (R). keys and source are
// (B, S, D), scale (D), padding (B, S). Returns the context (R, D) and the weights (R, S).
std::tuple<Tensor, Tensor> attend_rows(Tensor query, const Tensor& scale, const Tensor& keys, const Tensor& source,
                                       const Tensor& padding, const Tensor& sentence, bool is_product) {
  TORCH_CHECK_VALUE(query.is_contiguous() && scale.is_contiguous() && keys.is_contiguous() && source.is_contiguous() &&
                        padding.is_contiguous() && sentence.is_contiguous(),
                    "the attention's tensors must be contiguous.");
  const int64_t rows = query.size(0), length = keys.size(1), width = keys.size(2);
  Tensor context = at::empty({rows, width}, query.options()), weights = at::empty({rows, length}, query.options());
  const auto& loops = choose_loops<float>();
  const auto& additive = choose_inference_loops();
  auto* queries = query.data_ptr<float>();
  auto* contexts = context.data_ptr<float>();
  auto* all_weights = weights.data_ptr<float>();
  const auto* scales = scale.const_data_ptr<float>();
  const auto* all_keys = keys.const_data_ptr<float>();
  const auto* sources = source.const_data_ptr<float>();
  const auto* paddings = padding.const_data_ptr<bool>();
  const auto* sentences = sentence.const_data_ptr<int64_t>();
  at::parallel_for(0, rows, QUERIES_PER_THREAD, [&](int64_t first, int64_t last) {
    std::vector<float> scaled(width);
    for (int64_t row = first; row < last; ++row) {
      const int64_t number = sentences[row], start = number * length * width;
      TORCH_CHECK_INDEX(number >= 0 && number < keys.size(0), "`sentence` must be from 0 to ", keys.size(0) - 1,
                        ", but is ", number, " in row ", row, ".");
      auto* own = queries + row * width;
      auto* own_weights = all_weights + row * length;
      auto* own_context = contexts + row * width;
      if (is_product) {
        loops.attend(own, scales, all_keys + start, sources + start, paddings + number * length, scaled.data(),
                     own_weights, own_context, length, width);
      } else {
        additive.attend_additively(own, scales, all_keys + start, sources + start, paddings + number * length,
                                own_weights, own_context, length, width);
      }
    }
  });
  return {context, weights};
}

// Finds the `count` largest logits of each row (N, E), with the largest first. Returns the softmax over them, (N, K),
// and their experts, (N, K) int64; of equal logits, those of the first experts are found.
std::tuple<Tensor, Tensor> choose_experts(const Tensor& logits, int64_t count) {
  const int64_t rows = logits.size(0), experts = logits.size(1);
  Tensor gates = at::empty({rows, count}, logits.options());
  Tensor ids = at::empty({rows, count}, logits.options().dtype(at::kLong));
  const auto& loops = choose_inference_loops();
  const Tensor whole = logits.contiguous();
  const auto* all = whole.const_data_ptr<float>();
  auto* all_gates = gates.data_ptr<float>();
  auto* all_ids = ids.data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row) {
    auto* own = all_gates + row * count;
    loops.find_largest(all + row * experts, experts, count, own, all_ids + row * count);
    const float largest = own[0];
    float sum = 0;
    for (int64_t at = 0; at < count; ++at) sum += own[at] = std::exp(own[at] - largest);
    for (int64_t at = 0; at < count; ++at) own[at] /= sum;
  }
  return {gates, ids};
}

// Computes a mixture of experts for x (N, D), with gates and ids (N, K); the id E marks an empty slot. The experts'
// matrices are panels, (E, P, D, PANEL) and (E, Q, H, PANEL). Each token's sum runs in ascending order of experts.
Tensor mix_experts(const Tensor& x, const Tensor& gates, const Tensor& ids, const Tensor& panels_in,
                   const Tensor& panels_out, int64_t hidden_dim) {
  const int64_t experts = panels_in.size(0), width = x.size(1), slots = ids.numel(), top_k = ids.size(1);
  const Tensor tokens = x.contiguous(), chosen = ids.contiguous(), factors = gates.contiguous();
  const auto* all_ids = chosen.const_data_ptr<int64_t>();
  std::vector<int64_t> ends(experts + 1);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t expert = all_ids[slot];
    TORCH_CHECK_INDEX(expert >= 0 && expert <= experts, "an expert must be from 0 to ", experts, ", but is ", expert,
                      ".");
    if (expert < experts) ++ends[expert + 1];
  }
  for (int64_t expert = 0; expert < experts; ++expert) ends[expert + 1] += ends[expert];
  std::vector<int64_t> next(ends.begin(), ends.end() - 1), order(ends[experts]);
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (all_ids[slot] < experts) order[next[all_ids[slot]]++] = slot;
  }
  const auto rows = int64_t(order.size());
  Tensor sorted = at::empty({rows, width}, x.options()), hidden = at::empty({rows, hidden_dim}, x.options());
  auto* inputs = sorted.data_ptr<float>();
  auto* inner = hidden.data_ptr<float>();
  const auto& loops = choose_inference_loops();
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(tokens.const_data_ptr<float>() + order[row] / top_k * width, width, inputs + row * width);
  }
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t first = ends[expert], count = ends[expert + 1] - first;
    if (count == 0) continue;
    multiply(inputs + first * width, count, panels_in[expert], nullptr, false, inner + first * hidden_dim, hidden_dim);
    loops.relu(inner + first * hidden_dim, count * hidden_dim);
    multiply(inner + first * hidden_dim, count, panels_out[expert], nullptr, false, inputs + first * width, width);
  }
  Tensor y = at::zeros_like(tokens);
  const auto* all_gates = factors.const_data_ptr<float>();
  auto* sums = y.data_ptr<float>();
  for (int64_t row = 0; row < rows; ++row) {
    loops.add_scaled(inputs + row * width, all_gates[order[row]], sums + order[row] / top_k * width, width);
  }
  return y;
}

// The next two functions replace torch's operators, which compute the last elements of a tensor differently from the
// others, so that a row's bits would depend on the number of rows.

// Replaces y with sigmoid(y) + x.
void sigmoid_residual(Tensor y, const Tensor& x) {
  const Tensor residual = x.contiguous();
  choose_inference_loops().sigmoid_residual(y.data_ptr<float>(), residual.const_data_ptr<float>(), y.numel());
}

// Replaces x with tanh(x).
void tanh(Tensor x) { choose_inference_loops().tanh(x.data_ptr<float>(), x.numel()); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(nmt_moe, library) {
  library.def("log_probabilities(Tensor x, Tensor panels, int width) -> Tensor");
  library.def("multiply_panels(Tensor x, Tensor panels, Tensor? addend, int width) -> Tensor");
  library.def(
      "packed_lstm_step(Tensor x, Tensor? tokens, Tensor of_input, Tensor bias, Tensor previous, Tensor of_previous, "
      "Tensor cell, Tensor? parents, Tensor? projection, int output_dim) -> (Tensor, Tensor)");
  library.def(
      "packed_lstm(Tensor(a!) gates, Tensor of_previous, Tensor? projection, int[] counts, int output_dim) -> Tensor");
  library.def(
      "attend_rows(Tensor(a!) query, Tensor scale, Tensor keys, Tensor source, Tensor padding, Tensor sentence, "
      "bool is_product) -> (Tensor, Tensor)");
  library.def("choose_experts(Tensor logits, int count) -> (Tensor, Tensor)");
  library.def(
      "mix_experts(Tensor x, Tensor gates, Tensor ids, Tensor panels_in, Tensor panels_out, int hidden_dim) -> Tensor");
  library.def("sigmoid_residual(Tensor(a!) y, Tensor x) -> ()");
  library.def("tanh(Tensor(a!) x) -> ()");
}

TORCH_LIBRARY_IMPL(nmt_moe, CPU, library) {
  library.impl("log_probabilities", log_probabilities);
  library.impl("multiply_panels", multiply_panels);
  library.impl("packed_lstm_step", packed_lstm_step);
  library.impl("packed_lstm", packed_lstm);
  library.impl("attend_rows", attend_rows);
  library.impl("choose_experts", choose_experts);
  library.impl("mix_experts", mix_experts);
  library.impl("sigmoid_residual", sigmoid_residual);
  library.impl("tanh", tanh);
}

}  // namespace nmt_moe
