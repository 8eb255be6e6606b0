"""One op a file: its contract, a torch reference, kernels for the devices that have one, and its `Op` record."""
