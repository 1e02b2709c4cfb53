"""What the authors' own scores say: read out of their repository, tables and a page of them."""
