"""Decoder layers as data, their parameters, and the backends that run them."""
