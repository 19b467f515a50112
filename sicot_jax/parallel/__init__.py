"""The device mesh, several processes as one run, and what devices exchange."""
