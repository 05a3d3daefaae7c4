#include "pretend_cuda.h"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <cusolverDn.h>
#include <fmt/format.h>
#include <mpi.h>
#include <nccl.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

namespace {

/// One piece of a stream's work: whether it is done; if not, it is asked again.
using Step = std::function<bool()>;
struct Recorded {
  std::shared_ptr<bool> done = std::make_shared<bool>(true);
};
struct Operation {
  cudaStream_t stream = nullptr;
  std::function<void()> work;
  bool sends = false;
};

std::map<cudaStream_t, std::deque<Step>> streams;  // the default one too, which nobody makes
std::map<void*, std::string> owned;                // what must be given back, and what it is
std::string gpu_address = "0000:01:00.0", rules_broken;
int polls_until_failure = -1, aborted_communicators = 0, finished_communicators = 0;
bool cusolver_fails = false;

void breach(const std::string& text) {
  rules_broken += text + "\n";
}
void* own(void* address, const std::string& what) {
  owned[address] = what;
  return address;
}
void give_back(void* address, const std::string& what) {
  const auto found = owned.find(address);
  if (found == owned.end() || found->second != what)
    breach(fmt::format("{} gives back what is none", what));
  else
    owned.erase(found);
}
/// Every stream does one step.
void progress() {
  for (auto& [stream, steps] : streams)
    if (!steps.empty() && steps.front()()) steps.pop_front();
}
void drain(cudaStream_t stream) {
  while (!streams[stream].empty()) progress();
}

int ranks() {
  int initialized = 0, size = 1;
  MPI_Initialized(&initialized);
  if (initialized != 0) MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

}  // namespace

struct CUevent_st {
  Recorded recorded;
};
struct CUstream_st {};
struct cublasContext {};
struct cusolverDnContext {};
struct cusolverDnParams {};
struct ncclComm {
  MPI_Comm comm = MPI_COMM_NULL;
  int rank = 0, size = 1;
  int polls = 0;  // until what was asked for is taken
  bool finalized = false;
  std::vector<Operation> asked;
};

namespace {

ncclComm* current = nullptr;  // of the open group
int group_depth = 0;

/// NCCL takes work only after some polls, and refuses more before that.
ncclResult_t ask(ncclComm_t comm, cudaStream_t stream, std::function<void()> work, bool sends = false) {
  if (comm->polls > 0) {
    breach("NCCL was called before it had taken the call before");
    return ncclInvalidUsage;
  }
  comm->asked.push_back({stream, std::move(work), sends});
  current = comm;
  if (group_depth == 0) comm->polls = 3;
  return ncclInProgress;
}

std::size_t width_of(ncclDataType_t type) {
  switch (type) {
    case ncclUint8:
      return 1;
    case ncclFloat32:
      return 4;
    case ncclFloat64:
      return 8;
    default:
      breach("a data type that is not used");
      return 1;
  }
}
MPI_Datatype mpi_type(ncclDataType_t type) {
  return type == ncclFloat64 ? MPI_DOUBLE : type == ncclFloat32 ? MPI_FLOAT : MPI_BYTE;
}
std::vector<char> copied(const void* data, std::size_t bytes) {
  const auto* from = static_cast<const char*>(data);
  return {from, from + bytes};
}

}  // namespace

namespace headfold::pretend {

at::Tensor on_gpu(const at::Tensor& like) {
  at::Tensor memory = like.clone();
  return at::for_blob(memory.data_ptr(), memory.sizes())
      .strides(memory.strides())
      .deleter([memory](void*) {})
      .options(at::TensorOptions().dtype(memory.scalar_type()).device(at::Device(at::kCUDA, 0)))
      .target_device(at::Device(at::kCUDA, 0))
      .make_tensor();
}
void set_address(const std::string& address) {
  gpu_address = address;
}
void in_default_stream(std::function<void()> work) {
  // Slower than anything that could overtake it.
  streams[nullptr].push_back([work = std::move(work), polls = 50]() mutable {
    if (--polls > 0) return false;
    work();
    return true;
  });
}
void fail_nccl_after(int polls) {
  polls_until_failure = polls;
}
void fail_cusolver(bool fail) {
  cusolver_fails = fail;
}
int alive() {
  return static_cast<int>(owned.size());
}
int aborted() {
  return aborted_communicators;
}
int finished() {
  return finished_communicators;
}
std::string breaches() {
  return rules_broken;
}

}  // namespace headfold::pretend

extern "C" {

// ---- CUDA runtime ------------------------------------------------------------------------------------------------
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  std::snprintf(text, static_cast<std::size_t>(size), "%s", gpu_address.c_str());
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) {
  return "pretended";
}
const char* cudaGetErrorName(cudaError_t) {
  return "pretended";
}
cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  *data = own(std::malloc(bytes), "device memory");
  std::memset(*data, 0x5a, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  give_back(data, "device memory");
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** data, std::size_t bytes, unsigned) {
  *data = own(std::malloc(bytes), "pinned memory");
  std::memset(*data, 0x5a, bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* data) {
  give_back(data, "pinned memory");
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  drain(nullptr);
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  if (flags != cudaStreamNonBlocking) breach("a stream that waits for the default one");
  *stream = new CUstream_st;
  own(*stream, "stream");
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  give_back(stream, "stream");
  if (!streams[stream].empty()) breach("a stream is destroyed with work in it");
  streams.erase(stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  own(*event, "event");
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  give_back(event, "event");
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->recorded.done = std::make_shared<bool>(false);
  streams[stream].push_back([done = event->recorded.done] { return *done = true; });
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  progress();
  return *event->recorded.done ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  streams[stream].push_back([done = event->recorded.done] { return *done; });
  return cudaSuccess;
}

// ---- cuBLAS: column-major, A [m, k], B [k, n] after their operations ----------------------------------------------
cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  *handle = new cublasContext;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}
const char* cublasGetStatusString(cublasStatus_t) {
  return "pretended";
}
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t a_op, cublasOperation_t b_op, int m, int n, int k,
                            const void* alpha, const void* a, cudaDataType a_type, int lda, const void* b,
                            cudaDataType b_type, int ldb, const void* beta, void* c, cudaDataType c_type, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t) {
  if (a_type != b_type || c_type != CUDA_R_32F || compute != CUBLAS_COMPUTE_32F ||
      (a_type != CUDA_R_16BF && a_type != CUDA_R_32F))
    return CUBLAS_STATUS_NOT_SUPPORTED;
  if (lda < (a_op == CUBLAS_OP_N ? m : k) || ldb < (b_op == CUBLAS_OP_N ? k : n) || ldc < m)
    return CUBLAS_STATUS_INVALID_VALUE;
  const auto entry = [&](const void* data, cublasOperation_t op, std::int64_t row, std::int64_t column,
                         std::int64_t stride) {
    const std::int64_t at = op == CUBLAS_OP_N ? row + column * stride : column + row * stride;
    if (a_type == CUDA_R_32F) return static_cast<const float*>(data)[at];
    return static_cast<float>(static_cast<const at::BFloat16*>(data)[at]);
  };
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < m; ++i) {
      float sum = 0;
      for (int l = 0; l < k; ++l) sum += entry(a, a_op, i, l, lda) * entry(b, b_op, l, j, ldb);
      float& out = static_cast<float*>(c)[i + static_cast<std::int64_t>(j) * ldc];
      const float scale = *static_cast<const float*>(beta);
      out = *static_cast<const float*>(alpha) * sum + (scale == 0 ? 0 : scale * out);
    }
  return CUBLAS_STATUS_SUCCESS;
}

// ---- cuSOLVER ----------------------------------------------------------------------------------------------------
cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle) {
  *handle = new cusolverDnContext;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t handle) {
  delete handle;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t* params) {
  *params = new cusolverDnParams;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnDestroyParams(cusolverDnParams_t params) {
  delete params;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t,
                                                   cublasFillMode_t, std::int64_t, cudaDataType, const void*,
                                                   std::int64_t, cudaDataType, const void*, cudaDataType,
                                                   std::size_t* device, std::size_t* host, std::int64_t) {
  *device = 100;
  *host = 10;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnXsyevd_bufferSize(cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t,
                                             cublasFillMode_t, std::int64_t, cudaDataType, const void*, std::int64_t,
                                             cudaDataType, const void*, cudaDataType, std::size_t* device,
                                             std::size_t* host) {
  *device = 200;
  *host = 0;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t mode,
                                        cublasFillMode_t triangle, std::int64_t n, cudaDataType type, void* a,
                                        std::int64_t lda, cudaDataType value_type, void* w, cudaDataType compute, void*,
                                        std::size_t, void*, std::size_t, int* info, std::int64_t batch) {
  if (mode != CUSOLVER_EIG_MODE_VECTOR || triangle != CUBLAS_FILL_MODE_LOWER || lda != n || value_type != CUDA_R_64F ||
      compute != type)
    return CUSOLVER_STATUS_INVALID_VALUE;
  const auto dtype = type == CUDA_C_64F ? at::kComplexDouble : at::kDouble;
  at::Tensor memory = at::from_blob(a, {batch, n, n}, dtype);
  // Column-major memory is the transpose; only its lower triangle counts.
  const auto [values, vectors] = at::linalg_eigh(memory.transpose(1, 2).clone(), "L");
  memory.copy_(vectors.resolve_conj().transpose(1, 2));
  at::from_blob(w, {batch, n}, at::kDouble).copy_(values);
  for (std::int64_t i = 0; i < batch; ++i) info[i] = cusolver_fails && i + 1 == batch ? 7 : 0;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnXsyevd(cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t mode,
                                  cublasFillMode_t triangle, std::int64_t n, cudaDataType type, void* a,
                                  std::int64_t lda, cudaDataType value_type, void* w, cudaDataType compute, void* work,
                                  std::size_t work_bytes, void* host, std::size_t host_bytes, int* info) {
  return cusolverDnXsyevBatched(handle, params, mode, triangle, n, type, a, lda, value_type, w, compute, work,
                                work_bytes, host, host_bytes, info, 1);
}
cusolverStatus_t cusolverDnXgesvd_bufferSize(cusolverDnHandle_t, cusolverDnParams_t, signed char, signed char,
                                             std::int64_t, std::int64_t, cudaDataType, const void*, std::int64_t,
                                             cudaDataType, const void*, cudaDataType, const void*, std::int64_t,
                                             cudaDataType, const void*, std::int64_t, cudaDataType, std::size_t* device,
                                             std::size_t* host) {
  *device = *host = 50;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnXgesvd(cusolverDnHandle_t, cusolverDnParams_t, signed char left, signed char right,
                                  std::int64_t m, std::int64_t n, cudaDataType type, void* a, std::int64_t lda,
                                  cudaDataType, void* s, cudaDataType, void* u, std::int64_t ldu, cudaDataType,
                                  void* vt, std::int64_t ldvt, cudaDataType, void*, std::size_t, void*, std::size_t,
                                  int* info) {
  if (m < n || left != 'S' || right != 'S' || lda != m || ldu != m || ldvt != n) return CUSOLVER_STATUS_INVALID_VALUE;
  const auto dtype = type == CUDA_C_64F ? at::kComplexDouble : at::kDouble;
  const at::Tensor matrix = at::from_blob(a, {n, m}, dtype).t().clone();
  const auto [found_u, found_s, found_vh] = at::linalg_svd(matrix, false);
  at::from_blob(u, {n, m}, dtype).copy_(found_u.t());
  at::from_blob(s, {n}, at::kDouble).copy_(found_s);
  at::from_blob(vt, {n, n}, dtype).copy_(found_vh.resolve_conj().t());
  std::memset(a, 0x5a, static_cast<std::size_t>(m * n) * (type == CUDA_C_64F ? 16 : 8));  // the input is destroyed
  *info = cusolver_fails ? 7 : 0;
  return CUSOLVER_STATUS_SUCCESS;
}

// ---- NCCL, without blocking, over MPI ----------------------------------------------------------------------------
const char* ncclGetErrorString(ncclResult_t) {
  return "pretended error";
}
const char* ncclGetLastError(ncclComm_t) {
  return "pretended detail";
}
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::memset(id, 'h', sizeof(*id));
  return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank, ncclConfig_t* config) {
  if (config->blocking != 0 || id.internal[127] != 'h' || size != ranks()) return ncclInvalidArgument;
  *comm = new ncclComm;
  own(*comm, "communicator");
  (*comm)->rank = rank;
  (*comm)->size = size;
  if (size > 1) MPI_Comm_dup(MPI_COMM_WORLD, &(*comm)->comm);
  (*comm)->polls = 5;
  return ncclInProgress;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  if (polls_until_failure >= 0 && polls_until_failure-- == 0) {
    *state = ncclRemoteError;
    return ncclSuccess;
  }
  *state = ncclSuccess;
  if (comm->polls == 0) return ncclSuccess;
  if (--comm->polls > 0) {
    *state = ncclInProgress;
    return ncclSuccess;
  }
  for (Operation& operation : comm->asked)
    streams[operation.stream].push_back([work = std::move(operation.work)] {
      work();
      return true;
    });
  comm->asked.clear();
  return ncclSuccess;
}
ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  if (comm->polls > 0) breach("a communicator is finished before it has taken a call");
  comm->finalized = true;
  comm->polls = 4;
  return ncclInProgress;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  if (!comm->finalized || comm->polls > 0) breach("a communicator is destroyed before it is finished");
  give_back(comm, "communicator");
  if (comm->comm != MPI_COMM_NULL) MPI_Comm_free(&comm->comm);
  delete comm;
  ++finished_communicators;
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  give_back(comm, "communicator");
  for (auto& [stream, steps] : streams)
    if (stream != nullptr) steps.clear();
  delete comm;
  ++aborted_communicators;
  return ncclSuccess;
}
ncclResult_t ncclGroupStart() {
  ++group_depth;
  current = nullptr;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  if (--group_depth < 0) breach("a group ends that never began");
  if (current != nullptr) {
    current->polls = 3;
    // A group's transfers depend on one another; here they come one by one.
    std::stable_partition(current->asked.begin(), current->asked.end(),
                          [](const Operation& operation) { return operation.sends; });
  }
  return current == nullptr ? ncclSuccess : ncclInProgress;
}
ncclResult_t ncclAllReduce(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
  if (op != ncclSum || from != to) return ncclInvalidArgument;
  return ask(comm, stream, [=] {
    if (comm->size > 1) MPI_Allreduce(MPI_IN_PLACE, to, static_cast<int>(count), mpi_type(type), MPI_SUM, comm->comm);
  });
}
ncclResult_t ncclReduce(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclRedOp_t, int root,
                        ncclComm_t comm, cudaStream_t stream) {
  return ask(comm, stream, [=] {
    if (comm->size > 1)
      MPI_Reduce(from, to, static_cast<int>(count), mpi_type(type), MPI_SUM, root, comm->comm);
    else
      std::memcpy(to, from, count * width_of(type));
  });
}
ncclResult_t ncclBroadcast(const void* from, void* to, std::size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
  if (from != to) return ncclInvalidArgument;
  return ask(comm, stream, [=] {
    if (comm->size > 1) MPI_Bcast(to, static_cast<int>(count * width_of(type)), MPI_BYTE, root, comm->comm);
  });
}
ncclResult_t ncclReduceScatter(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclRedOp_t,
                               ncclComm_t comm, cudaStream_t stream) {
  return ask(comm, stream, [=] {
    if (comm->size > 1)
      MPI_Reduce_scatter_block(from, to, static_cast<int>(count), mpi_type(type), MPI_SUM, comm->comm);
    else
      std::memcpy(to, from, count * width_of(type));
  });
}
ncclResult_t ncclAllGather(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  return ask(comm, stream, [=] {
    const std::vector<char> own_part = copied(from, count * width_of(type));
    const int bytes = static_cast<int>(own_part.size());
    if (comm->size > 1)
      MPI_Allgather(own_part.data(), bytes, MPI_BYTE, to, bytes, MPI_BYTE, comm->comm);
    else
      std::memcpy(to, own_part.data(), own_part.size());
  });
}
ncclResult_t ncclSend(const void* from, std::size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  if (group_depth == 0) breach("a send outside a group");
  // Blocks only where messages are long; ours are not.
  return ask(
      comm, stream, [=] { MPI_Send(from, static_cast<int>(count * width_of(type)), MPI_BYTE, peer, 0, comm->comm); },
      true);
}
ncclResult_t ncclRecv(void* to, std::size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  if (group_depth == 0) breach("a receive outside a group");
  return ask(comm, stream, [=] {
    MPI_Recv(to, static_cast<int>(count * width_of(type)), MPI_BYTE, peer, 0, comm->comm, MPI_STATUS_IGNORE);
  });
}

}  // extern "C"
