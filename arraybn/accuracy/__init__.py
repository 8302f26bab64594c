"""The accuracy of batch norms: the table and the picture of ``python -m arraybn check``."""
