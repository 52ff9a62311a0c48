"""Which model runs, and its words."""
