"""One op a file: its contract, torch reference and `Op`. Its kernels are in `cpu` and `gpu`, in files of that name."""
