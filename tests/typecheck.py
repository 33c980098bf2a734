"""The run-time type checker of the tests."""

import beartype

# As for every static checker (PEP 484), an int will do where a float is asked for.
check_types = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
