"""The layer, the op, and the tensor or attribute where a candidate goes wrong first."""
