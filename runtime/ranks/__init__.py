"""Ranks: one model run by several processes behind one decoder. The leader has rank 0, followers the others."""
