"""Examples; a regular package, so that none of another project's takes its name."""
