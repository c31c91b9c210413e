"""Continuations that follow a grammar, a JSON schema or a regular expression."""
