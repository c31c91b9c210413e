"""Whether this machine, and a bundle on it, are as they must be: each thing looked at alone, and said in a line."""
