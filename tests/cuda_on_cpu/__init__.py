"""The CUDA kernels executed by the CPU: a shim, its builds, and the tests that run the kernels under them."""
