"""The types that a plan's layers are shown to run in: by the inspector, or by what the plan lists."""
