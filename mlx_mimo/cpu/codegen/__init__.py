"""What generates the kernels' code: LLVM instructions for each format, and the numba functions around them."""
