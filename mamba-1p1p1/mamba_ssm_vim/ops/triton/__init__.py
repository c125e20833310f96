"""The published import paths of functions that were written in Triton there.

Here, as everywhere in this package, the backend is chosen per call by the tensors' device and dtype.
"""
