"""Triton kernels, one file an op. Contract and reference stand in the file of the same name one room up, which names
the launcher here as its "cuda" kernel. Importing this room needs no Triton and no GPU."""
