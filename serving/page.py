"""PLACEHOLDER."""


def page() -> bytes:
    return b"<!doctype html>"
