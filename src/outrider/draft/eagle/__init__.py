"""Draft heads of the EAGLE family: their checkpoints, their network, and the methods that run them."""
