#pragma once
// Dense float64 / complex128 factorisations on Hermitian positive semi-definite matrices, the one low-rank kernel every
// fold uses, and Grams.

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace headfold::linalg {

/// Which library factorises. `cusolver` takes matrices that are on a GPU, and those of the host from gpu_threshold()
/// on; it falls back to LAPACK, with one warning, where no device is usable or its residual is too large.
enum class Backend { lapack, cusolver };
/// Process-wide choice; the default is LAPACK. Throws NotCompiled for `cusolver` in a build without CUDA.
void set_backend(Backend backend);
Backend backend();
/// Rows of the smallest matrix of the host that `cusolver` sends to the GPU; a batch of b matrices goes when b n^3 is
/// as large. 512 by default, which nobody has measured on a GPU yet: `bench_gpu eigen` prints both times by size.
void set_gpu_threshold(std::int64_t rows);
std::int64_t gpu_threshold();

/// Conjugate transpose of the last two dimensions.
inline at::Tensor conjugate_transpose(const at::Tensor& x) {
  return x.transpose(-2, -1).conj().resolve_conj();
}
/// (M + M^T) / 2 of a real matrix.
inline at::Tensor symmetric_part(const at::Tensor& m) {
  return 0.5 * (m + m.t());
}
/// Sum of squares, in float64.
inline double square_sum(const at::Tensor& x) {
  return x.to(at::kDouble).square().sum().item<double>();
}

/// map [m, n] times rows [n, columns], float64. A map with few entries other than zero, as those that commute with a
/// rotation (two per row and head), costs what they cost, and its result does not depend on the BLAS. NaN and Inf in
/// rows that only zeros meet do not show then. InternalError for other shapes or dtypes.
at::Tensor map_rows(const at::Tensor& map, const at::Tensor& rows);

/// Eigen-decomposition of a Hermitian matrix: values [n] descending float64; vectors [n, n], columns, same dtype as the
/// input.
struct Eigen {
  at::Tensor values;
  at::Tensor vectors;
};

/// `matrix` [n, n] float64 or complex128, Hermitian. Symmetrised and divided by its largest absolute entry before
/// LAPACK; the result's residual
/// ||A V - V L|| <= 1e-10 ||A|| (Frobenius) is checked (NumericalError). Each column's phase is fixed: its entry of
/// largest modulus (first among equals within 1e-9) is real and positive, and runs of equal eigenvalues (within 1e-12
/// of the largest; at most 1024 of them) get the basis that follows from their projector alone, so that results do not
/// depend on rank or thread count. A zero matrix gives the identity. NaN or Inf input: NumericalError. Another dtype or
/// shape: InternalError.
Eigen eigh(const at::Tensor& matrix);
/// The same of many matrices [batch, n, n]: values [batch, n], vectors [batch, n, n]; on the CPU with the bits of
/// eigh() of each. Tensors on a GPU are factorised there by either function, and the results stay there.
Eigen eigh_batched(const at::Tensor& matrices);

/// Thin singular value decomposition A = U diag(s) V^H of [m, n]: u [m, k], s [k] descending float64, vh [k, n], k =
/// min(m, n). Signs are the library's.
struct ThinSvd {
  at::Tensor u, s, vh;
};
/// `matrix` float64 or complex128; the results are where it is. Its residual ||A - U S V^H|| <= 1e-10 ||A|| (Frobenius)
/// is checked (NumericalError). NaN or Inf: NumericalError. Another dtype or shape: InternalError.
ThinSvd thin_svd(const at::Tensor& matrix);

/// Symmetric root L (L^H L = M) of a PSD matrix and its pseudo-inverse; eigenvalues <= tau * max are dropped
/// (methods.md 3, 12.1).
struct PsdRoot {
  at::Tensor root;          ///< [n, n]
  at::Tensor inverse_root;  ///< [n, n], pseudo-inverse
  std::int64_t width = 0;   ///< numerical rank
};
/// Eigenvalues <= `floor` (absolute) are dropped too. Errors as eigh().
PsdRoot psd_root(const at::Tensor& matrix, double tau = 1e-10, double floor = 0.0);

/// How far a PSD matrix is from singular.
struct Conditioning {
  double condition = 1;  ///< largest over smallest eigenvalue that is kept
  double dropped = 0;    ///< share of its directions whose eigenvalue is <= tau * max, in [0, 1]; a zero matrix: 1
};
/// Eigenvalues alone: a third of eigh()'s work. Errors as eigh().
Conditioning conditioning(const at::Tensor& psd, double tau = 1e-10);

/// Result of weighted_low_rank. p = rows of the stacked map, r = width.
struct LowRank {
  at::Tensor encoder;   ///< A [r, p]
  at::Tensor decoder;   ///< B [p, r]
  at::Tensor energies;  ///< s_j^2, all p of them, descending, float64
  double loss = 0;      ///< J = sum_{j > r} s_j^2, in the weighted norm
  double total = 0;     ///< tr F
  double relative_loss() const { return total > 0 ? loss / total : 0; }
};

/// methods.md section 3: minimise E || Lw (T x - B A T x) ||^2 over A [r, p], B [p, r], given Sigma = T M T^H [p, p]
/// and the diagonal blocks of Lambda = Lw^H Lw (square, sizes summing to p; an empty list means the identity; real
/// blocks may weigh a complex Sigma). Real or complex. A zero Sigma gives zero loss and the first r unit vectors.
/// `weight_ridge` adds weight_ridge * tr(Lambda)/p to the diagonal of Lambda.
/// Every block of Lambda is brought to a unit diagonal before its root is taken, so that a channel far louder than the
/// others does not drown them: Lw = root(D^-1 Lambda D^-1) D, D^2 its diagonal. Directions of the equilibrated block
/// below tau of its largest, channels below 1e-14 of their block's largest weight and blocks below tau^2 of the largest
/// of all count as weight zero: they are not reproduced (a dead head must not divide rounding errors by its tiny
/// weight), and what they cost is part of loss and total when it is more than rounding. The loss of the encoder and
/// decoder handed back is measured against Sigma and Lambda: NumericalError when it differs from the predicted one by
/// more than 1e-8 of the total. NaN or Inf: NumericalError; shapes that disagree: InternalError.
LowRank weighted_low_rank(const at::Tensor& sigma, const std::vector<at::Tensor>& lambda_blocks, std::int64_t width,
                          double weight_ridge = 0.0, double tau = 1e-10);

/// How a GramAccumulator forms its products. `automatic`: the processor's own kernels on the CPU, cuBLAS on a GPU.
/// `tensors`: the column blocks of a GPU with ATen's products (bfloat16 upcast to float32), on either device; slow, and
/// there so that all but cuBLAS's one call runs without a GPU too.
enum class GramEngine { automatic, tensors };

/// C += X^T X for X [tokens, n] float32, bfloat16 or float64, C symmetric [n, n] float64 of which only the lower
/// triangle is kept, packed by rows (entry (i, j), j <= i, at i (i + 1) / 2 + j): half the memory, and one contiguous
/// span to reduce over ranks and to write. float32: products accumulated in float32 over at most `tokens` rows (one
/// call), then added in float64. bfloat16: products are exact, accumulated in float32 likewise (oneDNN; without it,
/// upcast to float32). float64: all in float64.
///
/// On a GPU the sums are float64 column blocks of the lower triangle in its memory; each call adds float32 products of
/// cuBLAS (bfloat16 on the tensor cores; float32 without TF32) to them. For t rows of one call, a float32 unit roundoff
/// u and P = |X|^T |X| of these rows, an entry is off by at most t u / (1 - t u) P(i, j) (Higham 2002, section 3.1): u
/// = 2^-24, or 2^-23 on tensor cores, which cut off instead of rounding. Errors of calls do not grow with their number
/// beyond this share, since float64 adds them.
class GramAccumulator {
 public:
  /// `block`: columns per product on a GPU, 0 for its default. NotCompiled for a GPU and `automatic` in a build without
  /// CUDA.
  explicit GramAccumulator(std::int64_t n, at::Device device = at::kCPU, GramEngine engine = GramEngine::automatic,
                           std::int64_t block = 0);
  /// Rows before `skip` are left out (they must be finite all the same). InternalError unless x is [tokens, n] of one
  /// of the three dtypes on the accumulator's device.
  void add(const at::Tensor& x, std::int64_t skip = 0);
  /// Full symmetric matrix on the CPU, float64 [n, n].
  at::Tensor full() const;
  /// The accumulator itself on the CPU, float64 [n (n + 1) / 2]; may be changed (reduced, cleared, added to). Sums on a
  /// GPU move here and its memory is freed; the next add() moves them back, with the same bits.
  at::Tensor& packed();
  /// The same to be read only, valid until the next add(): sums on a GPU are copied and stay there too.
  const at::Tensor& packed() const;
  /// The sums where they grow in column blocks (on a GPU, or with `tensors`): contiguous float64 of one dimension, to
  /// be summed over ranks in place; zeros where nothing was added. Undefined where they grow on the host.
  at::Tensor blocks();
  std::int64_t size() const { return n_; }
  at::Device device() const { return device_; }

 private:
  bool in_blocks() const;
  void add_blocks(const at::Tensor& x);
  void download() const;

  std::int64_t n_;
  at::Device device_;
  GramEngine engine_;
  std::int64_t block_;
  mutable at::Tensor packed_;  // undefined: zero, or only on the device
  at::Tensor blocks_;          // undefined: zero, or only here; column blocks one after the other (gram_blocks.h)
};

/// Entries of the packed lower triangle of an n x n matrix: n (n + 1) / 2.
std::int64_t packed_size(std::int64_t n);
/// Packed lower triangle [n (n + 1) / 2] float64 -> full symmetric [n, n].
at::Tensor unpack_lower(const at::Tensor& packed, std::int64_t n);
/// Rows and columns `index` [m] int64 (each once) of a packed matrix -> [m, m].
at::Tensor packed_block(const at::Tensor& packed, const at::Tensor& index);
/// Row `row` of a packed [n, n] matrix -> [n].
at::Tensor packed_row(const at::Tensor& packed, std::int64_t n, std::int64_t row);
/// Diagonal of a packed [n, n] matrix -> [n].
at::Tensor packed_diagonal(const at::Tensor& packed, std::int64_t n);
/// Floating-point operations per row of x that GramAccumulator::add() carries out for n float32 or bfloat16 columns:
/// more than the triangle's n^2, since blocks on the diagonal are computed whole. On a GPU: for its default block.
double gram_operations(std::int64_t n, at::Device device = at::kCPU);
/// [n, n] float64 -> packed lower triangle.
at::Tensor pack_lower(const at::Tensor& matrix);

}  // namespace headfold::linalg
