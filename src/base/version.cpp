#include <elf.h>
#include <fmt/format.h>
#include <headfold/base/version.h>
#include <link.h>

#include <cstring>

#include "build_info.h"

namespace headfold {

std::string version() {
  return HEADFOLD_VERSION;
}

namespace {

/// Reads the note of type NT_GNU_BUILD_ID of the program itself, which comes first.
int find_build_id(dl_phdr_info* info, std::size_t, void* result) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& part = info->dlpi_phdr[i];
    if (part.p_type != PT_NOTE) continue;
    // NOLINTNEXTLINE(performance-no-int-to-ptr): dl_iterate_phdr gives addresses as numbers
    const auto* at = reinterpret_cast<const unsigned char*>(info->dlpi_addr + part.p_vaddr);
    const auto* end = at + part.p_memsz;
    const auto padded = [](std::size_t bytes) { return (bytes + 3) / 4 * 4; };
    while (at + sizeof(ElfW(Nhdr)) <= end) {
      ElfW(Nhdr) note;
      std::memcpy(&note, at, sizeof(note));
      const auto* name = at + sizeof(note);
      const auto* content = name + padded(note.n_namesz);
      if (content + note.n_descsz > end) break;
      if (note.n_type == NT_GNU_BUILD_ID && note.n_namesz == 4 && std::memcmp(name, "GNU", 4) == 0) {
        auto& text = *static_cast<std::string*>(result);
        for (const auto* byte = content; byte != content + note.n_descsz; ++byte) text += fmt::format("{:02x}", *byte);
        return 1;
      }
      at = content + padded(note.n_descsz);
    }
  }
  return 1;  // the program only, not its libraries
}

/// "13.0.88", or "OFF".
std::string compiled_in(const std::string& state, const std::string& version) {
  return state == "ON" ? version : "OFF";
}

}  // namespace

std::string build_id() {
  std::string id;
  ::dl_iterate_phdr(find_build_id, &id);
  return id;
}

std::string build_identity() {
  return fmt::format("{} {} ({}, {}, libtorch {}, MPI {}, HDF5 {}, oneDNN {}, CUDA {}, NCCL {}{})", HEADFOLD_VERSION,
                     build_id(), HEADFOLD_BUILD_TYPE, HEADFOLD_COMPILER, HEADFOLD_TORCH_VERSION, HEADFOLD_MPI_VERSION,
                     HEADFOLD_HDF5_VERSION, HEADFOLD_ONEDNN, compiled_in(HEADFOLD_CUDA_STATE, HEADFOLD_CUDA_VERSION),
                     compiled_in(HEADFOLD_NCCL_STATE, HEADFOLD_NCCL_VERSION), HEADFOLD_SANITIZERS);
}

std::string build_description() {
  return fmt::format(
      "headfold {}\n"
      "  build     {}, {}{}{}\n"
      "  libtorch  {}\n"
      "  MPI       {}\n"
      "  HDF5      {} (parallel)\n"
      "  oneDNN    {}\n"
      "  CUDA      {} (runtime, cuSOLVER, cuBLAS)\n"
      "  NCCL      {}\n",
      HEADFOLD_VERSION, HEADFOLD_BUILD_TYPE, HEADFOLD_COMPILER,
      std::string(HEADFOLD_SANITIZERS).empty() ? "" : ", sanitizers " HEADFOLD_SANITIZERS,
      build_id().empty() ? "" : ", ID " + build_id(), HEADFOLD_TORCH_VERSION, HEADFOLD_MPI_VERSION,
      HEADFOLD_HDF5_VERSION, HEADFOLD_ONEDNN, compiled_in(HEADFOLD_CUDA_STATE, HEADFOLD_CUDA_VERSION),
      compiled_in(HEADFOLD_NCCL_STATE, HEADFOLD_NCCL_VERSION));
}

}  // namespace headfold
