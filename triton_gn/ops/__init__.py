"""The torch side: which path a call takes, autograd, and launches of the kernels."""
