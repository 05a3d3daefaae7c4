# headfold::headfold: all libraries behind one name.
get_property(_libraries GLOBAL PROPERTY HEADFOLD_LIBRARIES)
add_library(headfold_all INTERFACE)
add_library(headfold::headfold ALIAS headfold_all)
set_target_properties(headfold_all PROPERTIES EXPORT_NAME headfold)
target_link_libraries(headfold_all INTERFACE ${_libraries})
