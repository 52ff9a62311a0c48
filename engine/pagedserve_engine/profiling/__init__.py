"""``pagedserve-engine profile``: where a step's time goes, and where a start's went."""
