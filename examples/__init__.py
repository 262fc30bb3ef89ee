"""Examples, as a regular package, so that no other package named ``examples`` shadows it."""
