// The operators of a step of the beam search, in float32. A row is a hypothesis. A sentence's rows are consecutive.
#include <algorithm>
#include <cmath>
#include <limits>

#include "operators.h"

namespace nmt_moe {
namespace {

// Smallest number of log-probabilities that is worth a thread of its own.
constexpr int64_t VALUES_PER_THREAD = 1 << 15;
constexpr float NONE = -std::numeric_limits<float>::infinity();

template <typename Work>
void for_each_row(int64_t rows, int64_t width, const Work& work) {
  at::parallel_for(0, rows, std::max<int64_t>(1, VALUES_PER_THREAD / width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) work(row);
  });
}

// Replaces logits (R, V) with log-probabilities.
void log_softmax(Tensor logits) {
  const int64_t width = logits.size(1);
  const auto& loops = choose_inference_loops();
  auto* all = logits.data_ptr<float>();
  for_each_row(logits.size(0), width, [&](int64_t row) { loops.log_softmax(all + row * width, width); });
}

// Returns the smallest log-probability that GNMT's pruning keeps for the next tokens of one sentence's rows. `found`
// (rows, count) contains the largest log-probabilities of each row.
float lowest_kept(const float* found, int64_t rows, int64_t count, float margin) {
  float best = NONE;
  for (int64_t row = 0; row < rows; ++row) {
    if (std::isfinite(found[row * count])) best = std::max(best, found[row * count]);
  }
  return best - margin;
}

struct Candidate {
  float log_prob;
  int64_t token, row;
};

// Finds the best continuations of each sentence: at most C = 2 W, with the best first. Equal ones are ordered by row,
// then by token. log_probs (R, V) are those of the next token, and so_far (R) those of the rows. sentence (R) ascends.
// A token that is more than `margin` below the best one of its sentence is removed, unless the margin is 0.
//
// Returns the log-probabilities (B, C) of the whole hypotheses (-inf for no candidate), their last tokens (B, C) and
// their rows (B, C), and the sentence and rank of each candidate among the first W that ends with `eos`.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> best_candidates(const Tensor& log_probs, const Tensor& so_far,
                                                                   const Tensor& sentence, int64_t sentences,
                                                                   int64_t width, double margin, int64_t eos) {
  const int64_t rows = log_probs.size(0), symbols = log_probs.size(1), count = std::min(width + 1, symbols);
  const int64_t columns = std::min(2 * width, width * count);
  const auto& loops = choose_inference_loops();
  const Tensor next = log_probs.contiguous(), previous = so_far.contiguous(), numbers = sentence.contiguous();
  const auto* values = next.const_data_ptr<float>();
  const auto* totals = previous.const_data_ptr<float>();
  const auto* owners = numbers.const_data_ptr<int64_t>();
  std::vector<float> found(rows * count);
  std::vector<int64_t> places(rows * count);
  for_each_row(rows, symbols, [&](int64_t row) {
    loops.find_largest(values + row * symbols, symbols, count, found.data() + row * count, places.data() + row * count);
  });

  const auto integers = sentence.options();
  Tensor best = at::full({sentences, columns}, NONE, log_probs.options());
  Tensor tokens = at::zeros({sentences, columns}, integers), parents = at::zeros({sentences, columns}, integers);
  auto* all_best = best.data_ptr<float>();
  auto* all_tokens = tokens.data_ptr<int64_t>();
  auto* all_parents = parents.data_ptr<int64_t>();
  std::vector<int64_t> ended_sentence, ended_rank;
  std::vector<Candidate> candidates;
  for (int64_t first = 0; first < rows;) {
    const int64_t owner = owners[first];
    TORCH_CHECK_INDEX(owner >= 0 && owner < sentences, "`sentence` must be from 0 to ", sentences - 1, ", but is ",
                      owner, ".");
    int64_t last = first;
    while (last < rows && owners[last] == owner) ++last;
    const float* own = found.data() + first * count;
    const float lowest = margin > 0 ? lowest_kept(own, last - first, count, float(margin)) : NONE;
    candidates.clear();
    for (int64_t row = first; row < last; ++row) {
      for (int64_t at = row * count; at < (row + 1) * count; ++at) {
        candidates.push_back({found[at] < lowest ? NONE : totals[row] + found[at], places[at], row});
      }
    }
    const auto kept = std::min<int64_t>(columns, int64_t(candidates.size()));
    std::stable_sort(candidates.begin(), candidates.end(), [](const Candidate& left, const Candidate& right) {
      return left.log_prob > right.log_prob || (std::isnan(left.log_prob) && !std::isnan(right.log_prob));
    });
    for (int64_t rank = 0; rank < kept; ++rank) {
      const int64_t at = owner * columns + rank;
      const Candidate& candidate = candidates[rank];
      all_best[at] = candidate.log_prob, all_tokens[at] = candidate.token, all_parents[at] = candidate.row;
      if (rank < width && candidate.token == eos && candidate.log_prob > NONE) {
        ended_sentence.push_back(owner);
        ended_rank.push_back(rank);
      }
    }
    first = last;
  }
  return {best, tokens, parents, at::tensor(ended_sentence, integers), at::tensor(ended_rank, integers)};
}

// Chooses the rows of the next step: for each open sentence, the first W candidates that do not end with `eos`, except
// those that `is_kept` (B, C) rules out. The other arguments are results of `best_candidates`; is_open is (B).
//
// Returns the sentence, rank, parent, last token and log-probability of each new row.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> next_rows(const Tensor& log_probs, const Tensor& tokens,
                                                             const Tensor& parents, const Tensor& is_open,
                                                             const optional<Tensor>& is_kept, int64_t width,
                                                             int64_t eos) {
  const int64_t sentences = log_probs.size(0), columns = log_probs.size(1);
  const Tensor open_flags = is_open.contiguous(), kept_flags = is_kept ? is_kept->contiguous() : Tensor();
  const auto* values = log_probs.const_data_ptr<float>();
  const auto* all_tokens = tokens.const_data_ptr<int64_t>();
  const auto* all_parents = parents.const_data_ptr<int64_t>();
  const auto* open = open_flags.const_data_ptr<bool>();
  const auto* keeps = is_kept ? kept_flags.const_data_ptr<bool>() : nullptr;
  std::vector<int64_t> sentence, rank, parent, token;
  std::vector<float> log_prob;
  for (int64_t number = 0; number < sentences; ++number) {
    if (!open[number]) continue;
    int64_t continuing = 0, kept = 0;
    for (int64_t at = number * columns; at < (number + 1) * columns && continuing < width; ++at) {
      if (all_tokens[at] == eos || !(values[at] > NONE)) continue;
      ++continuing;
      if (keeps != nullptr && !keeps[at]) continue;
      sentence.push_back(number);
      rank.push_back(kept++);
      parent.push_back(all_parents[at]);
      token.push_back(all_tokens[at]);
      log_prob.push_back(values[at]);
    }
  }
  const auto integers = tokens.options();
  return {at::tensor(sentence, integers), at::tensor(rank, integers), at::tensor(parent, integers),
          at::tensor(token, integers), at::tensor(log_prob, log_probs.options())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nmt_moe, library) {
  library.def("log_softmax(Tensor(a!) logits) -> ()");
  library.def(
      "best_candidates(Tensor log_probs, Tensor so_far, Tensor sentence, int sentences, int width, float margin, "
      "int eos) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "next_rows(Tensor log_probs, Tensor tokens, Tensor parents, Tensor is_open, Tensor? is_kept, int width, "
      "int eos) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(nmt_moe, CPU, library) {
  library.impl("log_softmax", log_softmax);
  library.impl("best_candidates", best_candidates);
  library.impl("next_rows", next_rows);
}

}  // namespace nmt_moe
