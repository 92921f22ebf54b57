"""The layer between the public losses and the compiled kernels: autograd, drivers, argument checks."""
