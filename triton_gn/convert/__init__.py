"""Convert a model's GroupNorm layers to triton_gn's, and back."""

from triton_gn.convert.conversion import convert, unconvert

__all__ = ["convert", "unconvert"]
