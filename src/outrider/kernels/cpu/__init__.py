"""Kernels of a CPU: an op's in the file named like its contract, and what they share."""
