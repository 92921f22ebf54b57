// Panels and register tiles of csrc/cpu/kernels/gemm.h against the sum written out, for one instruction set.
// Prints each mistake; `gemm speed` prints GFLOP/s of one thread.
#include "cpu/kernels/gemm.h"
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/kernels/amx.h"
#endif

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace fastloss;

namespace {

double uniform() { return std::rand() / double(RAND_MAX) * 2 - 1; }

// The operands as they may lie in memory: rows, columns, or anything between.
template <class T, class R>
struct Matrix {
  std::vector<T> data;
  std::vector<R> wide;  // the same numbers, [rows][columns]
  int64_t row, column;
  Matrix(int64_t rows, int64_t columns, int64_t row_, int64_t column_) : row(row_), column(column_) {
    data.resize(rows * row + columns * column + 1);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        T& x = data[i * row + j * column];
        store_one(&x, R(uniform()));
        wide.push_back(widen(x));
      }
  }
};

int mistakes = 0;

template <class T>
void check(int64_t m, int64_t n, int64_t depth, bool transposed, bool add) {
  using R = acc_t<T>;
  using G = Gemm<R>;
  const Matrix<T, R> a(m, depth, transposed ? 1 : depth + 3, transposed ? m + 1 : 1);
  const Matrix<T, R> b(depth, n, transposed ? 1 : n + 2, transposed ? depth + 1 : 1);
  std::vector<R> left(round_up(m, G::kLeft) * depth), right(round_up(n, G::kRight) * depth), factor(m);
  for (R& f : factor) f = R(uniform());
  pack<G::kLeft>(a.data.data(), a.row, a.column, m, depth, left.data(), factor.data());
  pack<G::kRight>(b.data.data(), b.column, b.row, n, depth, right.data());
  const int64_t ldc = n + 5;
  std::vector<R> c(m * ldc + 1, R(7));
  multiply<R>(packed<R, G::kLeft>(left.data(), depth), packed<R, G::kRight>(right.data(), depth), m, n, depth,
              c.data(), ldc, add);
  const double tolerance = (sizeof(R) == 8 ? 1e-14 : 4e-6) * (1 + depth / 16.0);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < ldc; ++j) {
      double sum = add || j >= n ? 7 : 0;
      if (j < n)
        for (int64_t k = 0; k < depth; ++k)
          sum += double(a.wide[i * depth + k]) * factor[i] * b.wide[k * n + j];
      if (!(std::abs(sum - c[i * ldc + j]) <= tolerance)) {
        ++mistakes;
        std::printf("[%d, %d] of %d x %d x %d, transposed %d, add %d: %g, expected %g\n", int(i), int(j),
                    int(m), int(n), int(depth), transposed, add, double(c[i * ldc + j]), sum);
        return;
      }
    }
}

// The same through packed operands of bytes, P; S is what the left operand is made of.
template <class P, class S, class T>
void check_products(int64_t m, int64_t n, int64_t depth, int kind, double precision) {
  using R = acc_t<T>;
  [[maybe_unused]] const typename P::Scope scope{};
  const bool columns = kind & 1, add = kind & 2, strided = kind & 4;
  const Matrix<S, R> a(m, depth, columns ? 1 : depth + 3, columns ? m + 1 : 1 + strided * (depth + 3) * m);
  const Matrix<T, R> b(depth, n, columns ? 1 : n + 2, columns ? depth + 1 : 1 + strided * (n + 2) * depth);
  const auto allocate = [](int64_t bytes) {
    return static_cast<char*>(std::aligned_alloc(64, bytes / 64 * 64 + 64));
  };
  char *left = allocate(P::template packed_bytes<true>(m, depth)),
       *right = allocate(P::template packed_bytes<false>(n, depth));
  P::template pack<true>(a.data.data(), a.row, a.column, m, depth, left);
  P::template pack<false>(b.data.data(), b.column, b.row, n, depth, right);
  const int64_t ldc = n + 5;
  std::vector<R> c(m * ldc + 1, R(7));
  P::multiply(left, right, m, n, depth, c.data(), ldc, add);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < ldc; ++j) {
      double sum = add || j >= n ? 7 : 0, size = std::abs(sum) + 1;
      if (j < n)
        for (int64_t k = 0; k < depth; ++k) {
          const double term = double(a.wide[i * depth + k]) * b.wide[k * n + j];
          sum += term;
          size += std::abs(term);
        }
      if (!(std::abs(sum - c[i * ldc + j]) <= precision * size)) {
        ++mistakes;
        std::printf("products [%d, %d] of %d x %d x %d, kind %d: %g, expected %g\n", int(i), int(j), int(m),
                    int(n), int(depth), kind, double(c[i * ldc + j]), sum);
        i = m;
        break;
      }
    }
  std::free(left);
  std::free(right);
}

void speed(int64_t m, int64_t n, int64_t depth) {
  using G = Gemm<float>;
  std::vector<float> x(round_up(m, G::kLeft) * depth, 1), left(x.size()),
      right(round_up(n, G::kRight) * depth, 1), c(m * n);
  double best[2] = {1e9, 1e9};
  for (int r = 0; r < 50; ++r) {
    const auto t0 = std::chrono::steady_clock::now();
    pack<G::kLeft>(x.data(), depth, int64_t{1}, m, depth, left.data());
    const auto t1 = std::chrono::steady_clock::now();
    multiply<float>(packed<float, G::kLeft>(left.data(), depth),
                    packed<float, G::kRight>(right.data(), depth), m, n, depth, c.data(), n, false);
    const auto t2 = std::chrono::steady_clock::now();
    best[0] = std::min(best[0], std::chrono::duration<double>(t1 - t0).count());
    best[1] = std::min(best[1], std::chrono::duration<double>(t2 - t1).count());
  }
  std::printf("%d x %d x %d: multiply %.0f GFLOP/s, pack %.2f ns an element\n", int(m), int(n), int(depth),
              2e-9 * m * n * depth / best[1], 1e9 * best[0] / (m * depth));
}

}  // namespace

int main(int count, char**) {
  if (count > 1) {
    speed(384, 192, 256);
    speed(384, 192, 768);
    speed(192, 768, 384);
    return 0;
  }
  for (int64_t m : {1, 5, 12, 40})
    for (int64_t n : {1, 8, 33, 70})
      for (int64_t depth : {1, 17, 48, 200, 500})
        for (int kind = 0; kind < 4; ++kind) {
          check<float>(m, n, depth, kind & 1, kind & 2);
          check<double>(m, n, depth, kind & 1, kind & 2);
          check<BFloat16>(m, n, depth, kind & 1, kind & 2);
          check<Half>(m, n, depth, kind & 1, kind & 2);
        }
#if defined(__AMX_BF16__)
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return std::puts("no permission to use tiles"), 2;
#endif
  for (int64_t m : {1, 16, 37, 70})
    for (int64_t n : {1, 32, 51, 70})
      for (int64_t depth : {1, 32, 77, 400})
        for (int kind = 0; kind < 8; ++kind) {
          check_products<VectorProducts<float>, float, float>(m, n, depth, kind, 4e-7);
          check_products<VectorProducts<double>, double, double>(m, n, depth, kind, 2e-15);
          check_products<VectorProducts<float>, float, BFloat16>(m, n, depth, kind, 4e-7);
#if defined(__AMX_BF16__)
          check_products<TileProducts<3>, float, float>(m, n, depth, kind, 4e-7);
          check_products<TileProducts<2>, float, Half>(m, n, depth, kind, 1.2e-5);
          check_products<TileProducts<1>, BFloat16, BFloat16>(m, n, depth, kind, 4e-7);
#endif
        }
  std::printf("%d mistakes\n", mistakes);
  return mistakes != 0;
}
