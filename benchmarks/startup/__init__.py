"""The first seconds of a run: from the command to the first line and to the first step."""
