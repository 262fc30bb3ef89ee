"""Every activation of the table by name, and those with a parameter at another value of it too."""

from triton_gn.activations import TABLE
from triton_gn.reference import activation_function

_OTHER = (f"{name}(1.75)" for name, row in TABLE.items() if row.parameter is not None)
ACTIVATIONS = {name: activation_function(name) for name in (*TABLE, *_OTHER)}
