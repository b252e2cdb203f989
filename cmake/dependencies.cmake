# Third-party libraries, looked up once. Each becomes an imported target PkgConfig::NAME.
find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)

pkg_check_modules(ZMQ REQUIRED IMPORTED_TARGET libzmq>=4.3)
pkg_check_modules(CZMQ REQUIRED IMPORTED_TARGET libczmq>=4.2)
pkg_check_modules(HIREDIS REQUIRED IMPORTED_TARGET hiredis)
pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(MICROHTTPD REQUIRED IMPORTED_TARGET libmicrohttpd)
pkg_check_modules(OPENBLAS REQUIRED IMPORTED_TARGET openblas)
if(QV_TESTS)
  pkg_check_modules(CRITERION REQUIRED IMPORTED_TARGET criterion)
endif()

# msgpack-c names its pkg-config file differently from release to release.
pkg_search_module(MSGPACK REQUIRED IMPORTED_TARGET msgpack msgpack-c msgpackc)

# QV_PORTABLE: programs that run where little more than libc and a driver is installed. Replace each
# imported target by static libraries and what those need in turn. cuBLASLt stays shared: it has no
# static library everywhere, and comes with whatever CUDA the machine has.
if(QV_PORTABLE)
  add_library(qv_portable_stubs STATIC ${PROJECT_SOURCE_DIR}/cmake/portable_stubs.c)
  function(qv_static target)
    set(files)
    foreach(name ${ARGN})
      find_library(QV_STATIC_${name} lib${name}.a REQUIRED)
      mark_as_advanced(QV_STATIC_${name})
      list(APPEND files ${QV_STATIC_${name}})
    endforeach()
    set_target_properties(PkgConfig::${target} PROPERTIES INTERFACE_LINK_LIBRARIES "${files}"
      INTERFACE_LINK_OPTIONS "")
  endfunction()
  qv_static(CZMQ czmq)
  qv_static(ZMQ zmq sodium pgm norm protokit bsd md)
  qv_static(HIREDIS hiredis)
  qv_static(JANSSON jansson)
  qv_static(PCRE2 pcre2-8)
  qv_static(UTF8PROC utf8proc)
  qv_static(XXHASH xxhash)
  qv_static(MICROHTTPD microhttpd)
  qv_static(OPENBLAS openblas)
  qv_static(MSGPACK msgpackc)
  # libzmq is C++, OpenBLAS Fortran: their run-time libraries by name, in the static form.
  set_property(TARGET PkgConfig::ZMQ APPEND PROPERTY
    INTERFACE_LINK_LIBRARIES qv_portable_stubs -l:libstdc++.a)
  find_library(QV_STATIC_uuid libuuid.a REQUIRED)
  set_property(TARGET PkgConfig::CZMQ APPEND PROPERTY
    INTERFACE_LINK_LIBRARIES PkgConfig::ZMQ ${QV_STATIC_uuid})
  set_property(TARGET PkgConfig::MICROHTTPD APPEND PROPERTY
    INTERFACE_LINK_LIBRARIES qv_portable_stubs)
  set_property(TARGET PkgConfig::OPENBLAS APPEND PROPERTY
    INTERFACE_LINK_LIBRARIES -l:libgfortran.a -l:libquadmath.a)
  add_link_options(-static-libgcc)
endif()
