# headfold::headfold: all libraries behind one name; install and export for find_package(headfold).
include(CMakePackageConfigHelpers)

get_property(_libraries GLOBAL PROPERTY HEADFOLD_LIBRARIES)
add_library(headfold_all INTERFACE)
add_library(headfold::headfold ALIAS headfold_all)
set_target_properties(headfold_all PROPERTIES EXPORT_NAME headfold)
target_link_libraries(headfold_all INTERFACE ${_libraries})

# The wrappers around libraries without CMake packages are exported too, by what they link; their paths are looked up again by the
# consumer's package configuration, so nothing of this machine is written down.
set(_config_dir ${CMAKE_INSTALL_LIBDIR}/cmake/headfold)
install(TARGETS ${_libraries} headfold_all EXPORT headfoldTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT headfoldTargets NAMESPACE headfold:: DESTINATION ${_config_dir})

get_property(_folders GLOBAL PROPERTY HEADFOLD_LIBRARY_FOLDERS)
foreach(_entry IN LISTS _folders)
  string(REPLACE "|" ";" _entry "${_entry}")
  list(GET _entry 0 _folder)
  list(GET _entry 1 _name)
  install(DIRECTORY "${_folder}/" DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/headfold/${_name} FILES_MATCHING PATTERN "*.h")
endforeach()

set(_config_cuda ${HEADFOLD_WITH_CUDA})
if(HEADFOLD_WITH_CUDA AND NOT HEADFOLD_WITH_NCCL)
  set(_config_cuda AUTO)  # ON asks for NCCL as well
endif()
configure_package_config_file(cmake/headfoldConfig.cmake.in "${PROJECT_BINARY_DIR}/headfoldConfig.cmake" INSTALL_DESTINATION ${_config_dir})
write_basic_package_version_file("${PROJECT_BINARY_DIR}/headfoldConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/headfoldConfig.cmake" "${PROJECT_BINARY_DIR}/headfoldConfigVersion.cmake"
              cmake/HeadfoldDependencies.cmake DESTINATION ${_config_dir})
