"""Steps of one position on an NVIDIA GPU: Triton kernels, launched as one CUDA graph."""
