"""``benchmarks/gpu.sh``: online stages on one CUDA device, in ten minutes."""
