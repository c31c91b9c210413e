"""A model as numbers: decoder and tower walked layer by layer in float32 over windows of tokens."""
