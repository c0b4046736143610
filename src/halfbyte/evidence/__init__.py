"""Evidence: one model against its float original (`halfbyte eval`), or a table of recipes from a YAML file (`halfbyte table`)."""
