"""The custom ops of Arriero's graphs, one folder an op: attributes, meaning, and every implementation of it."""
