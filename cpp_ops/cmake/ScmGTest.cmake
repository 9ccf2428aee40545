# include(ScmGTest): GoogleTest as GTest::gtest and GTest::gtest_main, from the system or from Debian's package unpacked into the build folder.

include_guard(GLOBAL)
include("${CMAKE_CURRENT_LIST_DIR}/DebianPackage.cmake")

find_package(Threads REQUIRED)
find_package(GTest QUIET)
if(NOT GTest_FOUND)
  scm_debian_package(_gtest_root _gtest_problem libgtest-dev)
  if(NOT _gtest_root)
    message(FATAL_ERROR "GoogleTest was not found on the system, and Debian's package libgtest-dev cannot be had: ${_gtest_problem}.\n"
      "Install it (apt-get install libgtest-dev), or name its prefix: cmake -DCMAKE_PREFIX_PATH=/path …")
  endif()
  # Its CMake package finds its files from where it lies itself.
  file(GLOB _gtest_config "${_gtest_root}/usr/lib/*/cmake/GTest" "${_gtest_root}/usr/lib/cmake/GTest")
  find_package(GTest REQUIRED CONFIG PATHS ${_gtest_config} NO_DEFAULT_PATH)
endif()
