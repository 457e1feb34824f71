# Read by CMake right after llama.cpp's own project() call: one more tool in its build, its source left as it is.
add_executable(twintune-logits "${CMAKE_CURRENT_LIST_DIR}/logits.cpp")
target_compile_features(twintune-logits PRIVATE cxx_std_17)
target_link_libraries(twintune-logits PRIVATE llama)
set_target_properties(twintune-logits PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
