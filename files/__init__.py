"""Safetensors files read without trust, and folders written whole, read and resumed. Standard library only."""
