#pragma once
// Tests that need a GPU say so when there is none, instead of passing.

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <headfold/device/gpu.h>

namespace headfold::testing_support {

/// Skips, visibly, what cannot be tested here.
class GpuTest : public testing::Test {
 protected:
  void SetUp() override {
    if (device::visible_gpus().empty()) GTEST_SKIP() << "no GPU: nothing was tested";
  }
};
/// The same for tests of tensors on the GPU, which libtorch must know.
class GpuTensorTest : public GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (!IsSkipped() && !at::hasCUDA()) GTEST_SKIP() << "this libtorch has no CUDA: tensors on the GPU were not tested";
  }
};

}  // namespace headfold::testing_support
