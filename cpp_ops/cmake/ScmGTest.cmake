# include(ScmGTest): defines GTest::gtest and GTest::gtest_main, from the system or from the Debian package, unpacked into the build folder. For another
# processor they are compiled from the package's sources.

include_guard(GLOBAL)
include("${CMAKE_CURRENT_LIST_DIR}/DebianPackage.cmake")

find_package(Threads REQUIRED)
if(CMAKE_CROSSCOMPILING)
  set(_gtest_root "")
  if(NOT EXISTS /usr/src/googletest/googletest/src/gtest-all.cc)
    scm_debian_package(_gtest_root _gtest_problem googletest)
    if(NOT _gtest_root)
      message(FATAL_ERROR "The sources of GoogleTest were not found in /usr/src/googletest, and the Debian package googletest is not available: ${_gtest_problem}.\n"
        "Install it (apt-get install googletest).")
    endif()
  endif()
  set(_gtest_sources "${_gtest_root}/usr/src/googletest/googletest")
  add_library(scm_gtest STATIC EXCLUDE_FROM_ALL "${_gtest_sources}/src/gtest-all.cc")
  target_include_directories(scm_gtest SYSTEM PUBLIC "${_gtest_sources}/include" PRIVATE "${_gtest_sources}")
  target_link_libraries(scm_gtest PUBLIC Threads::Threads)
  add_library(scm_gtest_main STATIC EXCLUDE_FROM_ALL "${_gtest_sources}/src/gtest_main.cc")
  target_link_libraries(scm_gtest_main PUBLIC scm_gtest)
  add_library(GTest::gtest ALIAS scm_gtest)
  add_library(GTest::gtest_main ALIAS scm_gtest_main)
  return()
endif()
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
