"""Kernels of the transforms: rotation and sparsity."""
