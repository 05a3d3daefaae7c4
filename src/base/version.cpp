#include <fmt/format.h>
#include <headfold/base/version.h>

#include "build_info.h"

namespace headfold {

std::string version() {
  return HEADFOLD_VERSION;
}

std::string build_description() {
  return fmt::format(
      "headfold {}\n"
      "  build     {}, {}{}\n"
      "  libtorch  {}\n"
      "  MPI       {}\n"
      "  HDF5      {} (parallel)\n"
      "  oneDNN    {}\n"
      "  CUDA      {} (runtime, cuSOLVER, cuBLAS, NCCL)\n",
      HEADFOLD_VERSION, HEADFOLD_BUILD_TYPE, HEADFOLD_COMPILER,
      std::string(HEADFOLD_SANITIZERS).empty() ? "" : ", sanitizers " HEADFOLD_SANITIZERS, HEADFOLD_TORCH_VERSION,
      HEADFOLD_MPI_VERSION, HEADFOLD_HDF5_VERSION, HEADFOLD_ONEDNN, HEADFOLD_CUDA_STATE);
}

}  // namespace headfold
