"""Model families: the dense decoder, its config, and a file for each family."""
