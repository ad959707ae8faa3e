"""The contenders, a module each; only the worker process of a contender imports its framework."""
