"""`sicot import`: reads a shop's manifest or folders and writes a catalogue."""
