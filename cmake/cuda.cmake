# The CUDA backend: QV_CUDA ON, OFF, EMULATED (tests/emulate: for the CPU, with the toolkit's headers
# and nothing else of it), or AUTO (the default), which is ON where nvcc is found: on the
# PATH, under CUDA_HOME or /usr/local/cuda, or in the environment that tools/install_deps.sh --cuda
# makes. Decides, and enables the language. Architectures: machine code for 8.0 (which later 8.x
# run), for 9.0 with its own instructions, and PTX of 8.0 that the driver compiles for anything later.
set(QV_CUDA AUTO CACHE STRING "Build the CUDA backend: ON, OFF, EMULATED or AUTO (when nvcc is found)")
set(QV_CUDA_ROOT "" CACHE PATH "A CUDA toolkit, to be used before any other")

find_program(QV_NVCC nvcc
  HINTS ${QV_CUDA_ROOT}/bin $ENV{CUDA_HOME}/bin /usr/local/cuda/bin ${PROJECT_SOURCE_DIR}/.cuda/bin
  DOC "CUDA compiler")
set(QV_EMULATED OFF)
if(QV_CUDA STREQUAL "EMULATED")
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
    message(FATAL_ERROR "QV_CUDA is EMULATED, which needs x86-64, but the processor is "
      "${CMAKE_SYSTEM_PROCESSOR}")
  endif()
  get_filename_component(nvcc_bin "${QV_NVCC}" DIRECTORY)
  find_path(QV_CUDA_INCLUDE cublasLt.h HINTS ${nvcc_bin}/../include
    DOC "Headers of a CUDA toolkit" REQUIRED)
  set(QV_EMULATED ON)
  set(QV_WITH_CUDA ON)
  set(QV_CUDART qv_emulate) # what the backend links
  set(QV_CUBLASLT qv_emulate)
  enable_language(CXX)
  message(STATUS "CUDA emulated on the CPU, with headers from ${QV_CUDA_INCLUDE}")
  return()
endif()
set(with_cuda ${QV_CUDA})
if(QV_CUDA STREQUAL "AUTO")
  set(with_cuda OFF)
  if(QV_NVCC)
    set(with_cuda ON)
  endif()
endif()
if(with_cuda AND NOT QV_NVCC)
  message(FATAL_ERROR "QV_CUDA is ON, but there is no nvcc: run tools/install_deps.sh --cuda, or set "
    "QV_CUDA_ROOT to a CUDA toolkit of 12.8 or later")
endif()
set(QV_WITH_CUDA ${with_cuda})
if(NOT QV_WITH_CUDA)
  return()
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80;90a-real" CACHE STRING "GPU architectures" FORCE)
endif()
set(CMAKE_CUDA_COMPILER ${QV_NVCC})
get_filename_component(cuda_bin ${QV_NVCC} DIRECTORY)
get_filename_component(cuda_root ${cuda_bin} DIRECTORY)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
set(CUDAToolkit_ROOT ${cuda_root})
find_package(CUDAToolkit 12.8 REQUIRED)
set(QV_CUDART CUDA::cudart_static)
set(QV_CUBLASLT CUDA::cublasLt)
message(STATUS "CUDA ${CUDAToolkit_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
