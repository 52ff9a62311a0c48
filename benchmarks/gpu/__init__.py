"""The engine on a GPU against the card's own limits and against its peer, in one run of at most eight minutes."""
