"""Network definitions, and finding the one that a name means."""
