# scm_debian_package(<result> <problem> <package> [SUITE <suite>])
#
# Downloads a Debian package and unpacks it into the build folder. Does not install it and does not modify the system's apt state: package lists, cache and
# configuration are private; only the mirror is taken from the system. Sets <result> to the folder that contains the package's files as if it were /, or, on
# failure, sets <result> to the empty string and <problem> to the reason. Without SUITE the package is taken from the system's own release, so that C++
# libraries match the system's compiler. An unpacked package is reused.

include_guard(GLOBAL)

set(SCM_APT_TIMEOUT 120 CACHE STRING "Seconds that each call of apt-get may take")
mark_as_advanced(SCM_APT_TIMEOUT)

function(scm_debian_package result problem package)
  cmake_parse_arguments(PARSE_ARGV 3 arg "" "SUITE" "")
  set(${result} "" PARENT_SCOPE)
  set(${problem} "" PARENT_SCOPE)

  set(release "")
  if(EXISTS /etc/os-release)
    file(STRINGS /etc/os-release release)
  endif()
  set(id "")
  set(codename "")
  foreach(line IN LISTS release)
    if(line MATCHES "^ID=\"?([a-z0-9._-]+)\"?$")
      set(id "${CMAKE_MATCH_1}")
    elseif(line MATCHES "^VERSION_CODENAME=\"?([a-z0-9._-]+)\"?$")
      set(codename "${CMAKE_MATCH_1}")
    endif()
  endforeach()
  # Mirrors of derivatives do not have Debian's suites.
  if(NOT id STREQUAL "debian" AND NOT (id STREQUAL "ubuntu" AND NOT arg_SUITE))
    set(${problem} "this is not Debian (ID in /etc/os-release: '${id}')" PARENT_SCOPE)
    return()
  endif()
  set(suite "${arg_SUITE}")
  if(NOT suite)
    set(suite "${codename}")
  endif()
  if(NOT suite)
    set(${problem} "/etc/os-release has no VERSION_CODENAME" PARENT_SCOPE)
    return()
  endif()

  set(apt "${CMAKE_BINARY_DIR}/_apt/${suite}")
  set(root "${apt}/root/${package}")
  if(EXISTS "${root}/.unpacked")
    set(${result} "${root}" PARENT_SCOPE)
    return()
  endif()

  find_program(SCM_APT_GET apt-get)
  find_program(SCM_APT_CONFIG apt-config)
  find_program(SCM_DPKG dpkg)
  mark_as_advanced(SCM_APT_GET SCM_APT_CONFIG SCM_DPKG)
  if(NOT SCM_APT_GET OR NOT SCM_APT_CONFIG OR NOT SCM_DPKG)
    set(${problem} "apt-get, apt-config or dpkg is missing" PARENT_SCOPE)
    return()
  endif()
  _scm_debian_mirror(mirror options "${codename}")
  if(NOT mirror)
    set(${problem} "the system's apt sources contain no mirror for ${codename}" PARENT_SCOPE)
    return()
  endif()

  set(components "main")
  if(id STREQUAL "ubuntu")
    set(components "main universe")
  endif()
  file(REMOVE_RECURSE "${apt}/state" "${root}" "${root}.deb")
  file(MAKE_DIRECTORY "${apt}/state/lists/partial" "${apt}/cache/archives/partial" "${root}.deb")
  file(WRITE "${apt}/state/status" "")
  file(WRITE "${apt}/sources.list" "deb ${options}${mirror} ${suite} ${components}\n")
  # Keep the system's proxies and certificates, but not its hooks, pins and default release.
  execute_process(COMMAND "${SCM_APT_CONFIG}" dump --format "%f \"%v\";%n" Acquire OUTPUT_VARIABLE acquire ERROR_QUIET TIMEOUT 20)
  file(WRITE "${apt}/apt.conf" "${acquire}
Dir::Etc::Main \"/dev/null\";
Dir::Etc::Parts \"/dev/null\";
Dir::Etc::SourceList \"${apt}/sources.list\";
Dir::Etc::SourceParts \"/dev/null\";
Dir::Etc::Preferences \"/dev/null\";
Dir::Etc::PreferencesParts \"/dev/null\";
Dir::State \"${apt}/state\";
Dir::State::Status \"${apt}/state/status\";
Dir::Cache \"${apt}/cache\";
Acquire::Languages \"none\";
Acquire::Retries \"1\";
Acquire::http::Timeout \"20\";
Acquire::https::Timeout \"20\";
APT::Sandbox::User \"\";
APT::Update::Error-Mode \"any\";
")
  message(STATUS "Fetching the Debian package ${package} of ${suite}")
  foreach(command "${SCM_APT_GET};--quiet;update" "${SCM_APT_GET};--quiet;download;${package}")
    execute_process(
      COMMAND "${CMAKE_COMMAND}" -E env "APT_CONFIG=${apt}/apt.conf" LC_ALL=C ${command}
      WORKING_DIRECTORY "${root}.deb"
      RESULT_VARIABLE status
      OUTPUT_VARIABLE output
      ERROR_VARIABLE output
      TIMEOUT "${SCM_APT_TIMEOUT}"
    )
    if(NOT status EQUAL 0)
      string(REGEX MATCH "E: [^\n]*" reason "${output}")
      list(JOIN command " " command)
      set(${problem} "'${command}' failed with ${status} (${reason})" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  file(GLOB archive "${root}.deb/*.deb")
  execute_process(
    COMMAND "${SCM_DPKG}" -x ${archive} "${root}"
    RESULT_VARIABLE status ERROR_VARIABLE output OUTPUT_QUIET TIMEOUT "${SCM_APT_TIMEOUT}"
  )
  if(NOT status EQUAL 0)
    set(${problem} "'dpkg -x' failed with ${status} (${output})" PARENT_SCOPE)
    return()
  endif()
  file(REMOVE_RECURSE "${root}.deb" "${apt}/state" "${apt}/cache")
  file(TOUCH "${root}/.unpacked")
  set(${result} "${root}" PARENT_SCOPE)
endfunction()

# Finds the system's mirror: the first package source for the system's own release, in either of apt's formats, and its options.
function(_scm_debian_mirror mirror options codename)
  set(${mirror} "" PARENT_SCOPE)
  set(${options} "" PARENT_SCOPE)
  set(own " (${codename}|stable|oldstable|testing|unstable|sid) ")

  file(GLOB stanzas "/etc/apt/sources.list.d/*.sources")
  foreach(path IN LISTS stanzas)
    file(READ "${path}" text)
    string(REGEX REPLACE "(^|\n)#[^\n]*" "" text "${text}")
    string(REPLACE ";" "\\;" text "${text}")
    string(REGEX REPLACE "\n[ \t]*\n+" ";" text "${text}")
    foreach(stanza IN LISTS text)
      set(stanza "\n${stanza}\n")
      if(stanza MATCHES "\nEnabled:[ \t]*(no|false|off|0)" OR NOT stanza MATCHES "\nTypes:[ \t]*([^\n]* )?deb[ \t\n]")
        continue()
      endif()
      string(REGEX MATCH "\nSuites:[ \t]*([^\n]+)" _ "${stanza}")
      if(NOT " ${CMAKE_MATCH_1} " MATCHES "${own}" OR NOT stanza MATCHES "\nURIs:[ \t]*((http|https|file|mirror)[^ \t\n]*)")
        continue()
      endif()
      set(${mirror} "${CMAKE_MATCH_1}" PARENT_SCOPE)
      if(stanza MATCHES "\nSigned-By:[ \t]*(/[^ \t\n]+)")
        set(${options} "[signed-by=${CMAKE_MATCH_1}] " PARENT_SCOPE)
      endif()
      return()
    endforeach()
  endforeach()

  file(GLOB lists "/etc/apt/sources.list" "/etc/apt/sources.list.d/*.list")
  foreach(path IN LISTS lists)
    # CMake does not split lists inside of square brackets.
    file(READ "${path}" text)
    string(REPLACE "[" "<" text "${text}")
    string(REPLACE "]" ">" text "${text}")
    string(REPLACE "\n" ";" text "${text}")
    foreach(line IN LISTS text)
      if(line MATCHES "^[ \t]*deb[ \t]+(<([^>]*)>[ \t]+)?((http|https|file|mirror)[^ \t]*)[ \t]+([^ \t]+)[ \t]")
        set(uri "${CMAKE_MATCH_3}")
        set(given "${CMAKE_MATCH_2}")
        if(" ${CMAKE_MATCH_5} " MATCHES "${own}")
          set(${mirror} "${uri}" PARENT_SCOPE)
          if(given MATCHES "(signed-by=/[^ \t]+)")
            set(${options} "[${CMAKE_MATCH_1}] " PARENT_SCOPE)
          endif()
          return()
        endif()
      endif()
    endforeach()
  endforeach()
endfunction()
