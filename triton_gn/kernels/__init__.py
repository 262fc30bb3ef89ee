"""Device code. Imports triton and nothing else."""
