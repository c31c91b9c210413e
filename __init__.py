"""Arriero takes a Llama 4 checkpoint to the machines that serve it."""

__version__ = "0.1.0"
