"""Reports on runs: what their files say, the statistics that compare them, and HTML pages."""
