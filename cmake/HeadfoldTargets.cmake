# headfold_library(NAME SOURCES ... LINK ...): one static library per folder, `headfold_NAME` (alias headfold::NAME).
# Public headers are included as <headfold/NAME/header.h>; a symbolic link in the build folder maps that to src/NAME.
# SHARES_FOLDER: a second library of a folder whose headers another one brings. QUICKLY: see headfold_compile_settings.

set(HEADFOLD_INCLUDE_ROOT "${PROJECT_BINARY_DIR}/include")
file(MAKE_DIRECTORY "${HEADFOLD_INCLUDE_ROOT}/headfold")
foreach(_folder base comm device linalg checkpoint tokenizer model calibration folding finetune scale report)
  file(CREATE_LINK "${PROJECT_SOURCE_DIR}/src/${_folder}" "${HEADFOLD_INCLUDE_ROOT}/headfold/${_folder}" SYMBOLIC)
endforeach()
file(CREATE_LINK "${PROJECT_SOURCE_DIR}/evaluation" "${HEADFOLD_INCLUDE_ROOT}/headfold/evaluation" SYMBOLIC)

# Compile and link flags that every target of this project shares, so that the precompiled header can be shared too.
add_library(headfold_flags INTERFACE)
# -fPIC for programs too: the shared precompiled header must see one setting.
target_compile_options(headfold_flags INTERFACE -fPIC -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual -Wno-unknown-pragmas)
if(HEADFOLD_WARNINGS_AS_ERRORS)
  target_compile_options(headfold_flags INTERFACE -Werror)
endif()
if(HEADFOLD_SANITIZE)
  # The checks of null and vptr cost a fifth of the compile time; the address sanitizer stops at what they would find.
  target_compile_options(headfold_flags INTERFACE -fsanitize=${HEADFOLD_SANITIZE} -fno-sanitize=null,vptr -fno-sanitize-recover=undefined
                                                  -fno-omit-frame-pointer)
  target_link_options(headfold_flags INTERFACE -fsanitize=${HEADFOLD_SANITIZE})
endif()
target_compile_features(headfold_flags INTERFACE cxx_std_20)

# The precompiled header: libtorch, JSON and formatting headers take over ten seconds to parse.
file(WRITE "${PROJECT_BINARY_DIR}/pch/pch.cpp.in" "// compiled once for the precompiled header\n")
configure_file("${PROJECT_BINARY_DIR}/pch/pch.cpp.in" "${PROJECT_BINARY_DIR}/pch/pch.cpp" COPYONLY)
add_library(headfold_pch OBJECT "${PROJECT_BINARY_DIR}/pch/pch.cpp")
target_link_libraries(headfold_pch PRIVATE $<BUILD_INTERFACE:headfold_flags> $<BUILD_INTERFACE:headfold_torch> nlohmann_json::nlohmann_json spdlog::spdlog fmt::fmt OpenMP::OpenMP_CXX)
target_precompile_headers(headfold_pch PRIVATE <ATen/ATen.h> <nlohmann/json.hpp> <spdlog/spdlog.h> <fmt/format.h> <algorithm> <array>
  <chrono> <cmath> <complex> <cstdint> <filesystem> <functional> <map> <memory> <optional> <span> <stdexcept> <string> <string_view>
  <unordered_map> <utility> <vector>)

# Settings for any target of this project that is compiled with the shared precompiled header. QUICKLY: for code that waits for other code
# (tests, jobs, pages); -O1 takes a quarter less time than -O2 to compile it.
function(headfold_compile_settings target)
  if("QUICKLY" IN_LIST ARGN)
    target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:-O1>)
  endif()
  target_link_libraries(${target} PRIVATE $<BUILD_INTERFACE:headfold_flags>)
  target_precompile_headers(${target} REUSE_FROM headfold_pch)
  set_target_properties(${target} PROPERTIES UNITY_BUILD ${HEADFOLD_UNITY} UNITY_BUILD_BATCH_SIZE 6)
endfunction()

function(headfold_library name)
  cmake_parse_arguments(arg "SHARES_FOLDER;QUICKLY" "" "SOURCES;LINK;PRIVATE_LINK" ${ARGN})
  add_library(headfold_${name} STATIC ${arg_SOURCES})
  add_library(headfold::${name} ALIAS headfold_${name})
  set_target_properties(headfold_${name} PROPERTIES EXPORT_NAME ${name})
  target_include_directories(headfold_${name} PUBLIC $<BUILD_INTERFACE:${HEADFOLD_INCLUDE_ROOT}>
                                                     $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  target_compile_features(headfold_${name} PUBLIC cxx_std_20)  # of the headers, for projects that use the installed library
  target_link_libraries(headfold_${name} PUBLIC headfold_torch nlohmann_json::nlohmann_json spdlog::spdlog fmt::fmt
                                                OpenMP::OpenMP_CXX ${arg_LINK}
                                         PRIVATE ${arg_PRIVATE_LINK})
  if(arg_QUICKLY)
    headfold_compile_settings(headfold_${name} QUICKLY)
  else()
    headfold_compile_settings(headfold_${name})
  endif()
  set_property(GLOBAL APPEND PROPERTY HEADFOLD_LIBRARIES headfold_${name})
  if(NOT arg_SHARES_FOLDER)
    set_property(GLOBAL APPEND PROPERTY HEADFOLD_LIBRARY_FOLDERS "${CMAKE_CURRENT_SOURCE_DIR}|${name}")
  endif()
endfunction()
