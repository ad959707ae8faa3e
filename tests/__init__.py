"""`typecheck` checks shapes and types of functions while tests run: see pyproject.toml."""

from beartype import BeartypeConf, beartype

# An int is fine where a float is annotated.
typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
