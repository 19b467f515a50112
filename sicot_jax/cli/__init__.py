"""The `sicot` command."""
