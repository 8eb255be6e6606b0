"""Training of draft heads: the frozen target's features in, a head in the speculators format out."""
