"""Triton kernels of a GPU: an op's in the file named like its contract, and what they share.

Importing these files needs neither Triton nor a GPU.
"""
