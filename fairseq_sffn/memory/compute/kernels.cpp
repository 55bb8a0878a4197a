// CPU kernels in fp32 and fp64 for operations that are slow in stock PyTorch: many small matrix
// products in parallel, and sums over table rows that skip rows of weight 0.
//
// Shapes as in the Python modules: N tokens, A active blocks per token, P assignments sorted by
// block, B blocks, G cells per block, D width. kernels.py compiles this one file, so that a
// first use includes PyTorch's headers once.

#include <algorithm>
#include <optional>
#include <vector>

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using std::int64_t;

// Fewer multiplications than this do not repay another thread.
constexpr int64_t kThreadWork = 1 << 15;
// Number of rows to prefetch: the next block may be anywhere in memory.
constexpr int64_t kRowsAhead = 8;
constexpr int64_t kCacheLine = 64;
// Bytes of rows that are read repeatedly, so that they stay in a core's cache.
constexpr int64_t kTile = 1 << 18;
// Minimum number of rows per sum and tile.
constexpr int64_t kRowsOfSum = 16;

template <typename T>
void fetch(const T* row, int64_t width) {
  constexpr int64_t step = kCacheLine / sizeof(T);
  for (int64_t d = 0; d < width; d += step) __builtin_prefetch(row + d);
}

// out[i] = x . row(i), for rows anywhere in memory.
template <typename T, typename Row>
void dot_rows(const T* __restrict x, const Row& row, int64_t count, int64_t width, T* out) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    if (i + kRowsAhead + 4 <= count)
      for (int64_t j = 0; j < 4; ++j) fetch(row(i + kRowsAhead + j), width);
    const T *__restrict r0 = row(i), *__restrict r1 = row(i + 1);
    const T *__restrict r2 = row(i + 2), *__restrict r3 = row(i + 3);
    T sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
    for (int64_t d = 0; d < width; ++d) {
      sum0 += x[d] * r0[d];
      sum1 += x[d] * r1[d];
      sum2 += x[d] * r2[d];
      sum3 += x[d] * r3[d];
    }
    out[i] = sum0, out[i + 1] = sum1, out[i + 2] = sum2, out[i + 3] = sum3;
  }
  for (; i < count; ++i) {
    const T* __restrict r = row(i);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; ++d) sum += x[d] * r[d];
    out[i] = sum;
  }
}

// A weighted sum of rows, which skips rows of weight 0.
template <typename T>
class WeightedSum {
 public:
  void clear() { rows_.clear(), weights_.clear(); }

  void add(const T* row, T weight) {
    if (weight != 0) rows_.push_back(row), weights_.push_back(weight);
  }

  // Adds the columns from begin to end to out.
  void add_to(T* __restrict out, int64_t begin, int64_t end) const {
    const int64_t count = rows_.size();
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      if (i + kRowsAhead + 4 <= count)
        for (int64_t j = 0; j < 4; ++j) fetch(rows_[i + kRowsAhead + j] + begin, end - begin);
      const T *__restrict r0 = rows_[i], *__restrict r1 = rows_[i + 1];
      const T *__restrict r2 = rows_[i + 2], *__restrict r3 = rows_[i + 3];
      const T w0 = weights_[i], w1 = weights_[i + 1], w2 = weights_[i + 2], w3 = weights_[i + 3];
#pragma omp simd
      for (int64_t d = begin; d < end; ++d)
        out[d] += (w0 * r0[d] + w1 * r1[d]) + (w2 * r2[d] + w3 * r3[d]);
    }
    for (; i < count; ++i) {
      const T* __restrict r = rows_[i];
      const T w = weights_[i];
#pragma omp simd
      for (int64_t d = begin; d < end; ++d) out[d] += w * r[d];
    }
  }

 private:
  std::vector<const T*> rows_;
  std::vector<T> weights_;
};

void check_blocks(const int64_t* blocks, int64_t assignments, int64_t num_blocks) {
  for (int64_t p = 0; p < assignments; ++p)
    TORCH_CHECK_INDEX(
        0 <= blocks[p] && blocks[p] < num_blocks, "block ", blocks[p], " of ", num_blocks);
}

// (N, D), (B, G, D), (B, G), (N, A) -> (N * A * G): x[n] . table[blocks[n, a], g] + bias.
Tensor dots(
    const Tensor& x, const Tensor& table, const std::optional<Tensor>& bias, const Tensor& blocks) {
  const int64_t active = blocks.size(1), cells = table.size(1), width = table.size(2);
  Tensor out = at::empty({blocks.numel() * cells}, x.options());
  const auto x_c = x.expect_contiguous(), table_c = table.expect_contiguous();
  const auto blocks_c = blocks.expect_contiguous();
  const Tensor bias_c = bias ? bias->contiguous() : Tensor();
  const int64_t* block = blocks_c->const_data_ptr<int64_t>();
  check_blocks(block, blocks.numel(), table.size(0));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "dots", [&] {
    const auto* xs = x_c->const_data_ptr<scalar_t>();
    const auto* rows = table_c->const_data_ptr<scalar_t>();
    const auto* biases = bias ? bias_c.const_data_ptr<scalar_t>() : nullptr;
    auto* to = out.mutable_data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, kThreadWork / std::max<int64_t>(1, width));
    at::parallel_for(0, out.numel(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t assignment = i / cells, token = assignment / active;
        const auto with_rows = [&](const auto& row, int64_t count) {
          const auto at = [=](int64_t j) { return rows + row(j) * width; };
          dot_rows(xs + token * width, at, count, width, to + i);
          if (biases)
            for (int64_t j = 0; j < count; ++j) to[i + j] += biases[row(j)];
          i += count;
        };
        if (cells == 1) {  // the rows of all blocks of a token, anywhere in memory
          const auto row = [=](int64_t j) { return block[i + j]; };
          with_rows(row, std::min(end, (token + 1) * active) - i);
        } else {
          const int64_t first = block[assignment] * cells + i % cells;
          const int64_t last = std::min(end, (assignment + 1) * cells);
          with_rows([=](int64_t j) { return first + j; }, last - i);
        }
      }
    });
  });
  return out;
}

// (N, A * G), (B, G, D), (N, A) -> (N, D): the sum of weights[n, a, g] * table[blocks[n, a], g].
Tensor sums(const Tensor& weights, const Tensor& table, const Tensor& blocks) {
  const int64_t tokens = blocks.size(0), active = blocks.size(1);
  const int64_t cells = table.size(1), width = table.size(2);
  Tensor out = at::zeros({tokens, width}, weights.options());
  const auto weights_c = weights.expect_contiguous(), table_c = table.expect_contiguous();
  const auto blocks_c = blocks.expect_contiguous();
  const int64_t* block = blocks_c->const_data_ptr<int64_t>();
  check_blocks(block, blocks.numel(), table.size(0));
  AT_DISPATCH_FLOATING_TYPES(weights.scalar_type(), "sums", [&] {
    const auto* factors = weights_c->const_data_ptr<scalar_t>();
    const auto* rows = table_c->const_data_ptr<scalar_t>();
    auto* to = out.mutable_data_ptr<scalar_t>();
    // With few tokens the columns are divided too, so that every thread has work.
    const int64_t threads = at::get_num_threads();
    const int64_t parts =
        tokens < threads ? std::clamp<int64_t>(active * cells * width / kThreadWork, 1, threads) : 1;
    const int64_t part = (width + parts - 1) / parts;
    at::parallel_for(0, tokens * parts, 1, [&](int64_t begin, int64_t end) {
      WeightedSum<scalar_t> sum;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / parts, column = i % parts * part;
        sum.clear();
        for (int64_t a = 0; a < active; ++a) {
          const auto* first = rows + block[n * active + a] * cells * width;
          const auto* factor = factors + (n * active + a) * cells;
          for (int64_t g = 0; g < cells; ++g) sum.add(first + g * width, factor[g]);
        }
        sum.add_to(to + n * width, std::min(column, width), std::min(column + part, width));
      }
    });
  });
  return out;
}

// (N, A * G), (N, D) -> (B, G, D): the sum of weight * x over the assignments of each cell's block.
// order and tokens (P): index n * A + a and token n of the assignments sorted by block; starts (B):
// the start of each block's assignments. All three are contiguous.
//
// The assignments of a block are ordered by token, so that all blocks pass through the tokens
// together, one tile of tokens at a time.
Tensor table_sums(
    const Tensor& weights,
    const Tensor& x,
    const Tensor& order,
    const Tensor& tokens,
    const Tensor& starts,
    int64_t cells) {
  const int64_t num_blocks = starts.numel(), assignments = order.numel();
  const int64_t width = x.size(1);
  Tensor out = at::zeros({num_blocks, cells, width}, x.options());
  const int64_t bytes = x.numel() * x.element_size();
  const int64_t most = assignments / std::max<int64_t>(1, num_blocks * kRowsOfSum);
  const int64_t tiles = std::clamp<int64_t>(bytes / kTile, 1, std::max<int64_t>(1, most));
  const int64_t tile = (x.size(0) + tiles - 1) / tiles;
  const auto weights_c = weights.expect_contiguous(), x_c = x.expect_contiguous();
  const int64_t* index = order.const_data_ptr<int64_t>();
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  const int64_t* start = starts.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "table_sums", [&] {
    const auto* factors = weights_c->const_data_ptr<scalar_t>();
    const auto* xs = x_c->const_data_ptr<scalar_t>();
    auto* to = out.mutable_data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, kThreadWork / std::max<int64_t>(1, width));
    at::parallel_for(0, num_blocks * cells, grain, [&](int64_t begin, int64_t end) {
      WeightedSum<scalar_t> sum;
      std::vector<int64_t> next(end - begin);  // assignment of each cell
      for (int64_t i = begin; i < end; ++i) next[i - begin] = start[i / cells];
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / cells, g = i % cells;
          const int64_t stop = b + 1 < num_blocks ? start[b + 1] : assignments;
          int64_t& p = next[i - begin];
          sum.clear();
          for (; p < stop && (t + 1 == tiles || token[p] < (t + 1) * tile); ++p)
            sum.add(xs + token[p] * width, factors[index[p] * cells + g]);
          sum.add_to(to + i * width, 0, width);
        }
      }
    });
  });
  return out;
}

// out[tokens[p]] += rows[p]. The threads divide the columns, so that the order of additions does
// not depend on the number of threads.
template <typename T>
void add_columns(T* out, const int32_t* tokens, const T* rows, int64_t count, int64_t width) {
  at::parallel_for(0, width, kCacheLine, [&](int64_t begin, int64_t end) {
    for (int64_t p = 0; p < count; ++p) {
      const T* __restrict row = rows + p * width;
      T* __restrict sum = out + tokens[p] * width;
#pragma omp simd
      for (int64_t d = begin; d < end; ++d) sum[d] += row[d];
    }
  });
}

void add_rows(Tensor out, const Tensor& tokens, const Tensor& rows) {
  TORCH_CHECK(out.is_contiguous() && tokens.is_contiguous() && rows.is_contiguous());
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "add_rows", [&] {
    add_columns(
        out.mutable_data_ptr<scalar_t>(), tokens.const_data_ptr<int32_t>(),
        rows.const_data_ptr<scalar_t>(), rows.size(0), rows.size(1));
  });
}

// Multiplies each row (P, X) by the matrix (B, X, Y) of its block and adds the block's bias (B, Y).
// ends (B): the end of each block's rows. The threads divide the rows evenly.
void grouped_mm(
    const Tensor& rows,
    const Tensor& matrices,
    const Tensor& ends,
    Tensor out,
    const std::optional<Tensor>& bias) {
  const int32_t* end_of = ends.const_data_ptr<int32_t>();
  const int64_t work = std::max<int64_t>(1, matrices.size(1) * matrices.size(2));
  const int64_t grain = std::max<int64_t>(1, kThreadWork / work);
  at::parallel_for(0, rows.size(0), grain, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView without_autograd;  // the mode is per thread
    int64_t b = std::upper_bound(end_of, end_of + ends.numel(), begin) - end_of;
    for (int64_t p = begin; p < end; ++b) {
      const int64_t count = std::min<int64_t>(end, end_of[b]) - p;
      if (count == 0) continue;
      Tensor to = out.narrow(0, p, count);
      const Tensor from = rows.narrow(0, p, count), matrix = matrices.select(0, b);
      if (bias)
        at::cpu::addmm_out(to, bias->select(0, b), from, matrix, 1, 1);
      else
        at::cpu::mm_out(to, from, matrix);
      p += count;
    }
  });
}

// Multiplies the transposed left rows (P, X) of each block by its right rows (P, Y), into out
// (B, X, Y). If the rows continue a block, the first product is added to what is there.
void grouped_mm_transposed(
    const Tensor& left, const Tensor& right, const Tensor& ends, Tensor out, bool continues) {
  const int32_t* end_of = ends.const_data_ptr<int32_t>();
  const int64_t num_blocks = out.size(0), height = out.size(1);
  // Tall products are divided, so that threads have equal work even if one block has most rows.
  constexpr int64_t kLeast = 64;
  const int64_t parts = std::clamp<int64_t>(height / kLeast, 1, at::get_num_threads());
  const int64_t part = (height + parts - 1) / parts;
  at::parallel_for(0, parts * num_blocks, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView without_autograd;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i % num_blocks, row = i / num_blocks * part;
      const int64_t rows = std::min(part, height - row);
      if (rows <= 0) continue;
      const int64_t start = b ? end_of[b - 1] : 0, count = end_of[b] - start;
      Tensor to = out.select(0, b).narrow(0, row, rows);
      const Tensor from = left.narrow(0, start, count).narrow(1, row, rows).t();
      if (continues && b == 0)
        at::cpu::addmm_(to, from, right.narrow(0, start, count), 1, 1);
      else if (count == 0)
        to.zero_();
      else
        at::cpu::mm_out(to, from, right.narrow(0, start, count));
    }
  });
}

}  // namespace

TORCH_LIBRARY(fairseq_sffn, m) {
  m.def("dots(Tensor x, Tensor table, Tensor? bias, Tensor blocks) -> Tensor");
  m.def("sums(Tensor weights, Tensor table, Tensor blocks) -> Tensor");
  m.def(
      "table_sums(Tensor weights, Tensor x, Tensor order, Tensor tokens, Tensor starts, int cells)"
      " -> Tensor");
  m.def("add_rows(Tensor(a!) out, Tensor tokens, Tensor rows) -> ()");
  m.def(
      "grouped_mm(Tensor rows, Tensor matrices, Tensor ends, Tensor(a!) out, Tensor? bias)"
      " -> ()");
  m.def(
      "grouped_mm_transposed(Tensor left, Tensor right, Tensor ends, Tensor(a!) out, bool continues) -> ()");
}

TORCH_LIBRARY_IMPL(fairseq_sffn, CPU, m) {
  m.impl("dots", dots);
  m.impl("sums", sums);
  m.impl("table_sums", table_sums);
  m.impl("add_rows", add_rows);
  m.impl("grouped_mm", grouped_mm);
  m.impl("grouped_mm_transposed", grouped_mm_transposed);
}
