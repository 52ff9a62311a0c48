"""How queries meet the paged cache."""
