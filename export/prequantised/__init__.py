"""Checkpoints that are quantised already: their scheme, their tensors, and what is written anew."""
