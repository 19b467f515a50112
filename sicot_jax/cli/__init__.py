"""The `sicot` command, one module per group of sub-commands."""
