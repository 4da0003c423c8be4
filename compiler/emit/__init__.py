"""Code for kernels: LLVM text for the CPU, CUDA C for loop kernels."""
