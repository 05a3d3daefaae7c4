#pragma once
// A pretend GPU: the functions of CUDA's libraries that headfold calls, as their documentation describes them, on host
// memory. It takes the place of the libraries in one test program, and shows that calls come in a legal order, that
// matrices are laid out as the libraries want them, and that nothing leaks. It says nothing about a real GPU.

#include <ATen/ATen.h>

#include <functional>
#include <string>

namespace headfold::pretend {

/// A tensor that libtorch takes for one of GPU 0, over memory of the host [tensor's elements]; strides of `like`.
at::Tensor on_gpu(const at::Tensor& like);
/// PCI address of the one GPU, by which ranks tell whether they share it.
void set_address(const std::string& address);
/// Work of the default stream, done only when somebody waits for it.
void in_default_stream(std::function<void()> work);
/// From the n-th poll on, NCCL reports a remote error.
void fail_nccl_after(int polls);
/// cuSOLVER reports no convergence from now on, or no longer.
void fail_cusolver(bool fail);
/// Streams, events, buffers, handles and communicators that exist.
int alive();
/// Communicators that were aborted, and that were finished in the proper order.
int aborted();
int finished();
/// Breaches of an interface's rules, one a line; empty: none.
std::string breaches();

}  // namespace headfold::pretend
