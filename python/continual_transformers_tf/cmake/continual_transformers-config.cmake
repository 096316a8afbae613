# find_package(continual_transformers): the target continual_transformers::continual_transformers,
# the library and its headers, wherever the folder above this one is.
#
#   cmake -Dcontinual_transformers_DIR="$(continual-transformers info --cmake-dir)" ...

get_filename_component(_continual_transformers_package "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)

set(_continual_transformers_library
    "${_continual_transformers_package}/libcontinual_transformers.so")
if(NOT EXISTS "${_continual_transformers_library}")
  set(continual_transformers_FOUND FALSE)
  set(continual_transformers_NOT_FOUND_MESSAGE
      "${_continual_transformers_library} does not exist: continual-transformers-tf is installed without its library. `continual-transformers info` says why.")
  return()
endif()

if(NOT TARGET continual_transformers::continual_transformers)
  add_library(continual_transformers::continual_transformers SHARED IMPORTED)
  set_target_properties(
    continual_transformers::continual_transformers
    PROPERTIES IMPORTED_LOCATION "${_continual_transformers_library}"
               IMPORTED_SONAME "libcontinual_transformers.so"
               INTERFACE_INCLUDE_DIRECTORIES "${_continual_transformers_package}/include")
endif()

unset(_continual_transformers_library)
unset(_continual_transformers_package)
