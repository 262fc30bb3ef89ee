"""Fuse the operations around each group norm of any model, under torch.compile and torch.fx."""

from triton_gn.fuse.rewrite import graph

__all__ = ["graph"]
