# The version is the header's. Before 1.0 a minor version may change the interface.

file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/../include/continual_transformers.h" _version_lines
     REGEX "#define CT_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
foreach(_part MAJOR MINOR PATCH)
  string(REGEX REPLACE ".*CT_VERSION_${_part} ([0-9]+).*" "\\1" _${_part} "${_version_lines}")
endforeach()
set(PACKAGE_VERSION "${_MAJOR}.${_MINOR}.${_PATCH}")

set(PACKAGE_VERSION_COMPATIBLE FALSE)
if(NOT PACKAGE_FIND_VERSION VERSION_GREATER PACKAGE_VERSION
   AND PACKAGE_FIND_VERSION_MAJOR EQUAL _MAJOR
   AND (_MAJOR GREATER 0 OR PACKAGE_FIND_VERSION_MINOR EQUAL _MINOR))
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
endif()
if(PACKAGE_FIND_VERSION VERSION_EQUAL PACKAGE_VERSION)
  set(PACKAGE_VERSION_EXACT TRUE)
endif()
