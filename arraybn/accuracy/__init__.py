"""How accurate batch norms are: the table and the picture of ``python -m arraybn check``."""
