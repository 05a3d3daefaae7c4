#pragma once
// Private: the steps of a trained layer in libtorch's operations, where model::compute() is the engine `tensors`. Each
// does what the function of the same name in elementwise.h, attend.h, layer.cpp and loss.h says.

#include <headfold/model/product.h>

#include "attend.h"
#include "elementwise.h"
#include "loss.h"

namespace headfold::finetune::tensors {

/// Whether they are to be used.
bool in_use();

/// c = op(a) op(b), or c += it; c may be wider than a and b.
void product(const at::Tensor& a, const at::Tensor& b, const model::Operation& operation, const at::Tensor& c);

at::Tensor normalise(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps);
void normalise_backward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                        const at::Tensor& dy, const at::Tensor& dx, const at::Tensor& dweight, const at::Tensor& dbias);
void rotate(const at::Tensor& x, const Rotation& rotation, bool inverse);
at::Tensor silu_times(const at::Tensor& gate, const at::Tensor& up);
void silu_times_backward(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& dy);
at::Tensor gelu_of(const at::Tensor& x);
void gelu_gradient(const at::Tensor& x, const at::Tensor& dy);
/// x times the mask, new tensor.
at::Tensor drop(const at::Tensor& x, const DropoutMask& mask);

/// y = x M^T head by head (HeadProducts of layer.cpp).
struct HeadShape {
  std::int64_t items = 0;
  std::int64_t inputs_shared = 1;
  std::int64_t matrices_shared = 1;
  bool transposed = false;
};
at::Tensor head_products(const at::Tensor& x, const at::Tensor& matrices, const HeadShape& shape);
at::Tensor head_products_backward(const at::Tensor& x, const at::Tensor& matrices, const HeadShape& shape,
                                  const at::Tensor& dy, const at::Tensor& dmatrices);

void attend(const AttentionPlan& plan, const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
            const at::Tensor& output);
void attend_backward(const AttentionPlan& plan, const at::Tensor& queries, const at::Tensor& keys,
                     const at::Tensor& values, const at::Tensor& doutput, const at::Tensor& dqueries,
                     const at::Tensor& dkeys, const at::Tensor& dvalues);

LossSums loss_of_rows(const at::Tensor& logits, const at::Tensor& targets, const TeacherRows& teacher,
                      const LossOptions& options, double scale, bool gradient);

}  // namespace headfold::finetune::tensors
