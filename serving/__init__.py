"""A session behind the interfaces that clients and routers speak."""
