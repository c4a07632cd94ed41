"""The tests, and their run-time type checker: annotations as PEP 484 reads them, so an int passes for a float."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
