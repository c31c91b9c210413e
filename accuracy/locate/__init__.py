"""The first fault of a candidate: its layer, its op, and the tensor or attribute to blame."""
