# What every target shares: warnings, sanitizers, the include root.
add_library(qv_flags INTERFACE)
target_include_directories(qv_flags INTERFACE ${PROJECT_SOURCE_DIR})
target_compile_definitions(qv_flags INTERFACE _GNU_SOURCE QV_VERSION="${PROJECT_VERSION}")
target_compile_options(qv_flags INTERFACE
  $<$<COMPILE_LANGUAGE:C>:-Wall -Wextra -Wshadow -Wstrict-prototypes -Wvla -Wmissing-prototypes>
  $<$<AND:$<COMPILE_LANGUAGE:C>,$<BOOL:${QV_WERROR}>>:-Werror>)
target_link_libraries(qv_flags INTERFACE Threads::Threads m)
if(QV_SANITIZE)
  target_compile_options(qv_flags INTERFACE
    $<$<COMPILE_LANGUAGE:C>:-fsanitize=${QV_SANITIZE} -fno-omit-frame-pointer>)
  target_link_options(qv_flags INTERFACE -fsanitize=${QV_SANITIZE})
endif()

# qv_library(NAME SOURCES... [LINK targets...]): a static library of one folder.
function(qv_library name)
  cmake_parse_arguments(ARG "" "" "LINK" ${ARGN})
  add_library(${name} STATIC ${ARG_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PUBLIC qv_flags ${ARG_LINK})
endfunction()

# qv_program(NAME SOURCES... [LINK targets...]): an executable in <build>/bin.
function(qv_program name)
  cmake_parse_arguments(ARG "" "" "LINK" ${ARGN})
  add_executable(${name} ${ARG_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE qv_flags ${ARG_LINK})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bin)
endfunction()

# qv_test(test_UNIT SOURCES... LABEL cpu|gpu [THREADS] [LINK targets...] [TIMEOUT s]): a Criterion program
# and a test named LAYER_UNIT after its folder, because units of several layers share names.
function(qv_test name)
  cmake_parse_arguments(ARG "THREADS" "LABEL;TIMEOUT" "LINK" ${ARGN})
  get_filename_component(layer ${CMAKE_CURRENT_SOURCE_DIR} NAME)
  string(REGEX REPLACE "^test_" "${layer}_" name ${name})
  add_executable(${name} ${ARG_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE qv_flags ${ARG_LINK})
  if(QV_SANITIZE) # compiles in half the time, and a test spends its own in what it tests
    target_compile_options(${name} PRIVATE -O1)
  endif()
  # The library does not run under the thread sanitizer, nor on a bare machine: tests/tsan_runner.c
  if(QV_SANITIZE MATCHES "thread" OR QV_PORTABLE)
    target_sources(${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests/tsan_runner.c)
    target_include_directories(${name} SYSTEM PRIVATE ${CRITERION_INCLUDE_DIRS})
  else()
    target_link_libraries(${name} PRIVATE PkgConfig::CRITERION)
  endif()
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
  add_test(NAME ${name} COMMAND ${name} --jobs 2 WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
  if(ARG_THREADS) # has threads of its own: also run under the thread sanitizer
    list(APPEND ARG_LABEL threads)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  foreach(label ${ARG_LABEL}) # gpu_programs, threads_programs: to be built without the others
    if(NOT TARGET ${label}_programs)
      add_custom_target(${label}_programs)
    endif()
    add_dependencies(${label}_programs ${name})
  endforeach()
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABEL}" TIMEOUT ${ARG_TIMEOUT}
    ENVIRONMENT "QV_SOURCE_DIR=${PROJECT_SOURCE_DIR};QV_BUILD_DIR=${PROJECT_BINARY_DIR}")
endfunction()
