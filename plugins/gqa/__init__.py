"""Grouped-query attention with RoPE, QK norm, temperature, chunks and a KV cache of fixed capacity."""
