"""Which GPU an engine gets: a table of products, what node labels say, and the choice between them."""
