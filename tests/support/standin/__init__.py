"""A CUDA GPU that is not there: Triton's own driver and launcher, their kernels' PTX on the CPU."""
