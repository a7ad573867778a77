"""What an engine folder is: export writes it, runtime reads it."""
