"""The likeliest tokens of each row of logits, found on a GPU: what drawing a token needs in place of all of them."""
