"""Draft heads computed the plainest way there is, to hold the engine against. Nothing here imports outrider."""
