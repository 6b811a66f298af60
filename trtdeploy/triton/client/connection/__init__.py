"""A connection to one server: its endpoint, options, certificates, attempts and limits."""
