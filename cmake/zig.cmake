# Toolchain: the C++ compiler of the PyPI package ziglang, for another system or an older libc than the one that builds.
#
# VIM_ZIG_TARGET, e.g. x86_64-linux-gnu.2.28, aarch64-linux-gnu.2.28, aarch64-macos.11.0, x86_64-windows-gnu.
# VIM_ZIG_PYTHON: the Python that has ziglang installed.
set(VIM_ZIG_TARGET "" CACHE STRING "Target of the zig compiler")
set(VIM_ZIG_PYTHON "python3" CACHE STRING "Python with the package ziglang")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES VIM_ZIG_TARGET VIM_ZIG_PYTHON)

string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR "${VIM_ZIG_TARGET}")
if(VIM_ZIG_TARGET MATCHES "-linux-")
  set(CMAKE_SYSTEM_NAME Linux)
elseif(VIM_ZIG_TARGET MATCHES "-macos")
  set(CMAKE_SYSTEM_NAME Darwin)
elseif(VIM_ZIG_TARGET MATCHES "-windows-")
  set(CMAKE_SYSTEM_NAME Windows)
else()
  message(FATAL_ERROR "VIM_ZIG_TARGET is '${VIM_ZIG_TARGET}', expected a target of Linux, macOS or Windows")
endif()
set(CMAKE_CXX_COMPILER ${VIM_ZIG_PYTHON} -m ziglang c++ -target ${VIM_ZIG_TARGET})
set(CMAKE_C_COMPILER ${VIM_ZIG_PYTHON} -m ziglang cc -target ${VIM_ZIG_TARGET})
# Symbols of the compiler's libraries are most of a file that is not stripped, and the host's strip knows one format only.
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-s")
