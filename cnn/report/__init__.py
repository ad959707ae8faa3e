"""Reports on runs: what their files say, how they compare, and HTML pages."""
