"""Drafting methods, one a file. `base` is the contract; nothing outside this package names a method."""
