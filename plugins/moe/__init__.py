"""Mixture-of-experts dispatch: top-k routing, sigmoid-scaled expert input, SwiGLU experts, and their sum."""
