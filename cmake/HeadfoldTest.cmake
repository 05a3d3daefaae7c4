# headfold_test(NAME SOURCES ... [LINK ...] [RANKS 1 2 4] [LABELS ...] [TIMEOUT seconds]):
# one GoogleTest program, registered once per rank count. Rank count 1 runs without mpirun. Tests with the label hostile read
# files of unknown origin; launch/test runs them under the sanitizers too.
set(HEADFOLD_MPIEXEC_FLAGS "--allow-run-as-root;--oversubscribe;--bind-to;none" CACHE STRING "Flags before -np for mpirun in tests")

add_custom_target(hostile_tests)  # builds the tests with that label

add_library(headfold_test_main OBJECT "${PROJECT_SOURCE_DIR}/tests/support/mpi_main.cpp")
target_link_libraries(headfold_test_main PUBLIC headfold::comm headfold::base GTest::gtest)
target_compile_definitions(headfold_test_main PUBLIC HEADFOLD_TESTS_FOLDER="${PROJECT_SOURCE_DIR}/tests")
target_include_directories(headfold_test_main PUBLIC "${PROJECT_SOURCE_DIR}/tests/support")
headfold_compile_settings(headfold_test_main QUICKLY)

# Under the sanitizers: an allocation of a GiB is one that a hostile file asked for, and fails. Leaks of Open MPI and HDF5 are not ours to find,
# and the leak check needs ptrace, which containers often forbid.
set(HEADFOLD_SANITIZER_OPTIONS "ASAN_OPTIONS=detect_leaks=0:max_allocation_size_mb=1024:detect_stack_use_after_return=1"
  "UBSAN_OPTIONS=print_stacktrace=1")

# Threads that wait must not spin: tests share the cores with each other. Starting twice for faster BLAS kernels (src/device) does not pay here.
# Registers COMMAND at each rank count; `name.ranks_N`.
function(headfold_register_ranks name)
  cmake_parse_arguments(arg "" "TIMEOUT" "COMMAND;RANKS;LABELS" ${ARGN})
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 300)
  endif()
  if(HEADFOLD_SANITIZE)
    math(EXPR arg_TIMEOUT "3 * ${arg_TIMEOUT}")
  endif()
  foreach(ranks IN LISTS arg_RANKS)
    if(NOT ranks MATCHES "^[1-9][0-9]*$")
      message(FATAL_ERROR "headfold_test(${name}): '${ranks}' is no rank count")
    endif()
    if(ranks EQUAL 1)
      add_test(NAME ${name}.ranks_1 COMMAND ${arg_COMMAND})
    else()
      add_test(NAME ${name}.ranks_${ranks} COMMAND ${MPIEXEC_EXECUTABLE} ${HEADFOLD_MPIEXEC_FLAGS} -np ${ranks} ${arg_COMMAND})
    endif()
    set_tests_properties(${name}.ranks_${ranks} PROPERTIES LABELS "${arg_LABELS};ranks_${ranks}" TIMEOUT ${arg_TIMEOUT} PROCESSORS ${ranks}
      ENVIRONMENT "OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;${HEADFOLD_SANITIZER_OPTIONS};OMP_WAIT_POLICY=passive;HEADFOLD_RESTARTED=1;HEADFOLD_SHARE_GPUS=1")
  endforeach()
endfunction()

function(headfold_test name)
  cmake_parse_arguments(arg "" "TIMEOUT" "SOURCES;LINK;RANKS;LABELS" ${ARGN})
  if(NOT arg_SOURCES)
    message(FATAL_ERROR "headfold_test(${name}): SOURCES is empty")
  endif()
  if(NOT arg_RANKS)
    set(arg_RANKS 1)
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 300)
  endif()
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE headfold_test_main GTest::gtest GTest::gmock ${arg_LINK})
  headfold_compile_settings(${name} QUICKLY)
  if("hostile" IN_LIST arg_LABELS)
    add_dependencies(hostile_tests ${name})
  endif()
  headfold_register_ranks(${name} COMMAND $<TARGET_FILE:${name}> RANKS ${arg_RANKS} LABELS ${arg_LABELS} TIMEOUT ${arg_TIMEOUT})
endfunction()

# headfold_test_without_avx512(NAME [ARGUMENT...]): registers a test of one rank a second time, as on an x86 processor without AVX-512, for which
# oneDNN has no products of bfloat16.
function(headfold_test_without_avx512 name)
  if(HEADFOLD_WITH_ONEDNN)
    headfold_register_ranks(${name}_without_avx512 COMMAND "${CMAKE_COMMAND}" -E env ONEDNN_MAX_CPU_ISA=AVX2 DNNL_MAX_CPU_ISA=AVX2
                            $<TARGET_FILE:${name}> ${ARGN} RANKS 1 LABELS unit)
  endif()
endfunction()
