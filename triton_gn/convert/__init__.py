"""Replace the GroupNorm layers of a model by triton_gn's, and back."""

from triton_gn.convert.conversion import Report, convert, unconvert

__all__ = ["Report", "convert", "unconvert"]
