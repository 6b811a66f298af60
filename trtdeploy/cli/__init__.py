"""The commands: they parse options, call the functions of the same names and print. No logic lives here."""
