"""The published import paths of functions that the original wrote in Triton.

As everywhere in this package, the backend is chosen for each call by the tensors' device and dtype.
"""
