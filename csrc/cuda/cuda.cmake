# libllmopt_cuda.so: the CUDA C++ kernels, compiled for every architecture and embedded, and their launchers. It is
# opened when a GPU is first used, and opens the driver itself: building it needs nvcc, loading it needs nothing.
set(LLMOPT_CUDA_ARCHITECTURES "80;89;90a;100;120" CACHE STRING "GPU architectures to compile for, as in sm_80")
set(LLMOPT_CUDA_FILES linear_w8a8_gemv linear_w8a8_gemm linear_w4a16_gemv attention_decode)

find_program(LLMOPT_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin NO_CMAKE_SYSTEM_PATH)
set(wanted "LLMOPT_CUDA=ON needs nvcc of CUDA 12.8 or newer, in PATH or CUDA_HOME/bin, or LLMOPT_NVCC=<its path>")
if(NOT LLMOPT_NVCC)
  message(FATAL_ERROR "${wanted}: there is none. Without LLMOPT_CUDA the build is for CPUs.")
endif()
execute_process(COMMAND ${LLMOPT_NVCC} --version OUTPUT_VARIABLE nvcc_says ERROR_VARIABLE nvcc_says RESULT_VARIABLE failed)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" release "${nvcc_says}")
if(failed OR NOT release OR CMAKE_MATCH_1 VERSION_LESS 12.8)
  message(FATAL_ERROR "${wanted}: ${LLMOPT_NVCC} --version says: ${nvcc_says} (${failed})")
endif()

file(GLOB cuda_headers CONFIGURE_DEPENDS csrc/cuda/*.h)
set(cubins "")
set(embedded "")
set(table "")
set(count 0)
foreach(file IN LISTS LLMOPT_CUDA_FILES)
  foreach(architecture IN LISTS LLMOPT_CUDA_ARCHITECTURES)
    set(cubin ${CMAKE_CURRENT_BINARY_DIR}/cuda/${file}.sm_${architecture}.cubin)
    add_custom_command(
      OUTPUT ${cubin}
      COMMAND ${LLMOPT_NVCC} -cubin -arch=sm_${architecture} -std=c++17 -O3 --expt-relaxed-constexpr
              -I${CMAKE_CURRENT_SOURCE_DIR}/csrc ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/${file}.cu -o ${cubin}
      DEPENDS csrc/cuda/${file}.cu ${cuda_headers} csrc/runtime/tensor.h
      VERBATIM)
    list(APPEND cubins ${cubin})
    string(REGEX REPLACE "[a-z]" "" number ${architecture})
    string(APPEND embedded "asm(\".section .rodata\\n.balign 64\\nllmopt_cubin_${count}: .incbin \\\"${cubin}\\\"\\n.previous\");\n"
                           "extern \"C\" __attribute__((visibility(\"hidden\"))) const char llmopt_cubin_${count}[];\n")
    string(APPEND table "    {\"${file}\", ${number}, llmopt_cubin_${count}},\n")
    math(EXPR count "${count} + 1")
  endforeach()
endforeach()
file(CONFIGURE OUTPUT cubins.cpp CONTENT "#include \"cuda/driver.h\"
${embedded}const llmopt::cuda::Cubin llmopt::cuda::kCubins[] = {
${table}};
const int llmopt::cuda::kCubinCount = ${count};
")
set_source_files_properties(${CMAKE_CURRENT_BINARY_DIR}/cubins.cpp PROPERTIES OBJECT_DEPENDS "${cubins}")
file(MAKE_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/cuda)

add_library(llmopt_cuda SHARED csrc/cuda/driver.cpp csrc/cuda/launch.cpp ${CMAKE_CURRENT_BINARY_DIR}/cubins.cpp)
target_link_libraries(llmopt_cuda PRIVATE llmopt_flags ${CMAKE_DL_LIBS})
install(TARGETS llmopt_cuda LIBRARY DESTINATION llmopt)
