"""Running an engine: contexts, memory, streams and captured graphs."""
