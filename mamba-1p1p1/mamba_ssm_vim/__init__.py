"""Kernels and modules of Mamba-1, bidirectional included."""
