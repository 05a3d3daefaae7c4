#pragma once
// Where a rank computes: its share of the host's cores, memory figures, the BLAS underneath.

#include <headfold/comm/communicator.h>
#include <cstdint>
#include <string>

namespace headfold::device {

/// Sets the threads of this rank: `threads`, or when 0 the cores this process may use divided by the ranks on this host
/// (at least 1). Collective over `world`. Returns the number.
int use_threads(const comm::Communicator& world, int threads);
/// Tells the C library to keep freed memory for the next tensor of the same size instead of giving every one back to
/// the kernel, which would clear its pages anew each time (a fifth of the time on small models). Call once, first thing
/// in main. Larger blocks than `largest` bytes (at most 32 MiB) go back all the same: they are few, and kept ones would
/// leave holes that nothing else fits into.
void keep_freed_memory(int largest = 32 << 20);
/// Makes libtorch's tensors on the CPU fit into the places of freed ones of the same size. Its own allocator asks for
/// aligned blocks, for which glibc before 2.38 wants a place that is larger than the block: among tensors that live on,
/// the place of a freed one then fits no other, and every step of a training takes new memory. For all tensors made
/// after the call. Call once.
void reuse_freed_tensors();
/// Gives memory that was freed and kept (keep_freed_memory) back to the kernel: between stages of a job whose sizes
/// have nothing in common.
void release_freed_memory();
/// Starts this program again, once, with OPENBLAS_CORETYPE set when OpenBLAS does not know this processor and fell back
/// to kernels for processors without AVX: releases up to 0.3.21 do so on CPUs newer than themselves, at a fifth of the
/// speed. OpenBLAS reads the variable only while it is being loaded, so nothing less helps. Call before MPI starts.
/// Does nothing when the user set it.
void restart_with_fast_blas(char** argv);
/// Name of the kernels that OpenBLAS runs ("SkylakeX", "Prescott", …); empty for another BLAS.
std::string blas_kernels();
/// Cores this process may run on (its affinity mask).
int usable_cores();
/// The same as a list, "0-3,8".
std::string cores_text();
/// File name of the BLAS library this process has loaded ("libopenblas.so.0", "libmkl_rt.so.2", "libblas.so.3", …), or
/// "unknown".
std::string blas_library();
/// Logs a warning that names the package to install when the BLAS is the reference one (tens of times slower).
void warn_about_slow_blas();
/// Whether bfloat16 products have hardware support here (AMX or AVX512-BF16).
bool fast_bfloat16();
/// One line: host, threads, memory available, BLAS.
std::string describe_device();

}  // namespace headfold::device
