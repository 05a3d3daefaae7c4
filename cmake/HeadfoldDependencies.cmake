# Finds every library headfold builds on and gives each one imported target.

# libtorch: Debian's package keeps TorchConfig.cmake in a multiarch folder; a pip-installed torch is found through CMAKE_PREFIX_PATH.
# Only the CPU part is needed to compile. A libtorch with CUDA nevertheless looks for the toolkit, in places of its own, and for
# nvcc: it is told what CMake's search finds.
if(NOT TARGET torch)
  find_package(CUDAToolkit QUIET)
  if(CUDAToolkit_FOUND AND NOT DEFINED CUDA_TOOLKIT_ROOT_DIR)
    get_filename_component(CUDA_TOOLKIT_ROOT_DIR "${CUDAToolkit_BIN_DIR}" DIRECTORY)
  endif()
  if(CUDAToolkit_NVCC_EXECUTABLE AND NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER "${CUDAToolkit_NVCC_EXECUTABLE}")
  endif()
  find_package(Torch REQUIRED)
endif()
add_library(headfold_torch INTERFACE IMPORTED GLOBAL)
target_link_libraries(headfold_torch INTERFACE ${TORCH_LIBRARIES})
target_include_directories(headfold_torch SYSTEM INTERFACE ${TORCH_INCLUDE_DIRS})
separate_arguments(_torch_flags UNIX_COMMAND "${TORCH_CXX_FLAGS}")
target_compile_options(headfold_torch INTERFACE ${_torch_flags})

find_package(MPI REQUIRED COMPONENTS C)
# mpi.h must not pull in the removed C++ bindings: only the C library is linked.
target_compile_definitions(MPI::MPI_C INTERFACE OMPI_SKIP_MPICXX MPICH_SKIP_MPICXX)

# Parallel HDF5, C interface: Debian ships it beside the serial one.
set(HDF5_PREFER_PARALLEL ON)
find_package(HDF5 REQUIRED COMPONENTS C)
if(NOT HDF5_IS_PARALLEL)
  message(FATAL_ERROR "headfold needs HDF5 built with MPI (Debian: libhdf5-openmpi-dev); found a serial one in ${HDF5_INCLUDE_DIRS}")
endif()
add_library(headfold_hdf5 INTERFACE IMPORTED GLOBAL)
target_include_directories(headfold_hdf5 SYSTEM INTERFACE ${HDF5_INCLUDE_DIRS})
target_link_libraries(headfold_hdf5 INTERFACE ${HDF5_LIBRARIES} MPI::MPI_C)

find_package(Boost 1.74 REQUIRED COMPONENTS program_options)
find_package(nlohmann_json 3.11 REQUIRED)
find_package(spdlog 1.10 REQUIRED)
find_package(fmt 9 REQUIRED)
find_package(OpenSSL 3.0 REQUIRED COMPONENTS Crypto)
find_package(OpenMP REQUIRED COMPONENTS CXX)
find_package(Threads REQUIRED)

find_path(SENTENCEPIECE_INCLUDE_DIR sentencepiece_processor.h REQUIRED)
find_library(SENTENCEPIECE_LIBRARY sentencepiece REQUIRED)
add_library(headfold_sentencepiece INTERFACE IMPORTED GLOBAL)
target_include_directories(headfold_sentencepiece SYSTEM INTERFACE ${SENTENCEPIECE_INCLUDE_DIR})
target_link_libraries(headfold_sentencepiece INTERFACE ${SENTENCEPIECE_LIBRARY})

# BLAS for symmetric rank-k updates. libtorch is already linked to libblas.so.3; this asks for the C interface of the same one.
find_path(CBLAS_INCLUDE_DIR cblas.h PATH_SUFFIXES x86_64-linux-gnu aarch64-linux-gnu openblas
          HINTS /usr/include/${CMAKE_LIBRARY_ARCHITECTURE})
find_library(CBLAS_LIBRARY NAMES blas openblas)

# oneDNN (optional): bf16 x bf16 -> f32 products for Grams of bf16 activations. Debian's libtorch uses the same shared library.
find_path(ONEDNN_INCLUDE_DIR oneapi/dnnl/dnnl.hpp)
find_library(ONEDNN_LIBRARY dnnl)
set(HEADFOLD_WITH_ONEDNN OFF)
if(ONEDNN_INCLUDE_DIR AND ONEDNN_LIBRARY)
  set(HEADFOLD_WITH_ONEDNN ON)
  add_library(headfold_onednn INTERFACE IMPORTED GLOBAL)
  target_include_directories(headfold_onednn SYSTEM INTERFACE ${ONEDNN_INCLUDE_DIR})
  target_link_libraries(headfold_onednn INTERFACE ${ONEDNN_LIBRARY})
endif()

# CUDA: host code only (runtime, cuSOLVER, cuBLAS), so nvcc is not needed. NCCL beside it: without, tensors travel by MPI.
set(HEADFOLD_WITH_CUDA OFF)
set(HEADFOLD_WITH_NCCL OFF)
set(HEADFOLD_NCCL_VERSION "")
if(NOT HEADFOLD_CUDA STREQUAL "OFF")
  find_package(CUDAToolkit QUIET)
  if(CUDAToolkit_FOUND AND TARGET CUDA::cusolver AND TARGET CUDA::cublas)
    set(HEADFOLD_WITH_CUDA ON)
    add_library(headfold_cuda INTERFACE IMPORTED GLOBAL)
    target_include_directories(headfold_cuda SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
    target_link_libraries(headfold_cuda INTERFACE CUDA::cudart CUDA::cusolver CUDA::cublas)
    find_path(NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
    find_library(NCCL_LIBRARY nccl HINTS ${CUDAToolkit_LIBRARY_DIR} ${CUDAToolkit_LIBRARY_ROOT}/lib64)
    if(NCCL_INCLUDE_DIR AND NCCL_LIBRARY)
      file(STRINGS "${NCCL_INCLUDE_DIR}/nccl.h" _nccl REGEX "#define NCCL_(MAJOR|MINOR|PATCH) +[0-9]+")
      string(REGEX MATCHALL "[0-9]+" _nccl "${_nccl}")
      list(JOIN _nccl "." HEADFOLD_NCCL_VERSION)
    endif()
    if(HEADFOLD_NCCL_VERSION VERSION_GREATER_EQUAL 2.14)
      set(HEADFOLD_WITH_NCCL ON)
      add_library(headfold_nccl INTERFACE IMPORTED GLOBAL)
      target_include_directories(headfold_nccl SYSTEM INTERFACE ${NCCL_INCLUDE_DIR})
      target_link_libraries(headfold_nccl INTERFACE headfold_cuda ${NCCL_LIBRARY})
    elseif(HEADFOLD_NCCL_VERSION)
      message(STATUS "headfold: NCCL ${HEADFOLD_NCCL_VERSION} is too old, 2.14 is needed")
    endif()
  endif()
  if(HEADFOLD_CUDA STREQUAL "ON" AND NOT (HEADFOLD_WITH_CUDA AND HEADFOLD_WITH_NCCL))
    message(FATAL_ERROR "HEADFOLD_CUDA=ON, but the CUDA toolkit with cuSOLVER and cuBLAS (found: ${HEADFOLD_WITH_CUDA}) and NCCL 2.14 or later (found: ${HEADFOLD_WITH_NCCL}) "
                        "are needed; set CUDAToolkit_ROOT, NCCL_INCLUDE_DIR and NCCL_LIBRARY, or HEADFOLD_CUDA=AUTO")
  endif()
endif()
message(STATUS "headfold: oneDNN ${HEADFOLD_WITH_ONEDNN}, CUDA/cuSOLVER/cuBLAS ${HEADFOLD_WITH_CUDA}, NCCL ${HEADFOLD_WITH_NCCL} ${HEADFOLD_NCCL_VERSION}")
