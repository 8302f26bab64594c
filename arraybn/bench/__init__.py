"""Measuring: how fast batch norms are, on the CPU, on a GPU and over MPI ranks."""
