# include(ScmGTest): defines GTest::gtest and GTest::gtest_main, from the system or from the Debian package, unpacked into the build folder.

include_guard(GLOBAL)
include("${CMAKE_CURRENT_LIST_DIR}/DebianPackage.cmake")

find_package(Threads REQUIRED)
find_package(GTest QUIET)
if(NOT GTest_FOUND)
  scm_debian_package(_gtest_root _gtest_problem libgtest-dev)
  if(NOT _gtest_root)
    message(FATAL_ERROR "GoogleTest was not found on the system, and the Debian package libgtest-dev is not available: ${_gtest_problem}.\n"
      "Install it (apt-get install libgtest-dev), or set its prefix: cmake -DCMAKE_PREFIX_PATH=/path …")
  endif()
  # The CMake package is relocatable: it finds its files relative to its own folder.
  file(GLOB _gtest_config "${_gtest_root}/usr/lib/*/cmake/GTest" "${_gtest_root}/usr/lib/cmake/GTest")
  find_package(GTest REQUIRED CONFIG PATHS ${_gtest_config} NO_DEFAULT_PATH)
endif()
