"""Fuse the operations around each group norm of any model, under torch.compile and torch.fx.

``torch.compile(model, backend="triton_gn")`` needs no import. docs/fusion.md has the details.
"""

from triton_gn.fuse.compiler import GraphPass, backend, compile_fused
from triton_gn.fuse.rewrite import graph

__all__ = ["GraphPass", "backend", "compile_fused", "graph"]
