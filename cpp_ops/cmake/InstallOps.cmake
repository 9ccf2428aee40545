# scm_install_ops(<target> OPSET <version> ORT_API <version>)
#
# Installs the library and scm_ops.json, which describes the library to scm_runtime/ort/native_ops.py before it is loaded. Call it after the CUDA language has
# been enabled, if at all: scm_ops.json then contains the CUDA version and the architectures.

include_guard(GLOBAL)

function(scm_install_ops target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "OPSET;ORT_API" "")
  file(STRINGS "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../../scm_runtime/_version.py" line REGEX "^__version__ = ")
  string(REGEX MATCH "[0-9][^\"]*" _ops_version "${line}")
  set(_ops_cuda null)
  get_property(languages GLOBAL PROPERTY ENABLED_LANGUAGES)
  if(CUDA IN_LIST languages)
    string(REGEX MATCH "^[0-9]+\\.[0-9]+" version "${CMAKE_CUDA_COMPILER_VERSION}")
    get_target_property(architectures ${target} CUDA_ARCHITECTURES)
    # 90-real is machine code, 90-virtual is PTX, and 90 is both.
    set(ptx "${architectures}")
    list(FILTER architectures EXCLUDE REGEX "-virtual$")
    list(FILTER ptx EXCLUDE REGEX "-real$")
    foreach(list architectures ptx)
      string(REGEX REPLACE "-(real|virtual)" "" ${list} "${${list}}")
      list(TRANSFORM ${list} REPLACE "(.+)" "\"\\1\"")
      list(JOIN ${list} ", " ${list})
    endforeach()
    set(_ops_cuda "{\"version\": \"${version}\", \"architectures\": [${architectures}], \"ptx\": [${ptx}]}")
  endif()
  configure_file("${CMAKE_CURRENT_FUNCTION_LIST_DIR}/scm_ops.json.in" "${CMAKE_CURRENT_BINARY_DIR}/scm_ops.json" @ONLY)
  # A DLL is a RUNTIME artifact; a shared object or dylib is a LIBRARY.
  install(TARGETS ${target} LIBRARY DESTINATION scm_runtime/_native RUNTIME DESTINATION scm_runtime/_native)
  install(FILES "${CMAKE_CURRENT_BINARY_DIR}/scm_ops.json" DESTINATION scm_runtime/_native)
endfunction()
