"""From a parsed network to a serialized engine."""
