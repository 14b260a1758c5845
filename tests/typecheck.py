"""The type checker that pytest applies to both packages (an int may stand for a float).

A module of its own, because `--jaxtyping-packages` takes one package only beside a checker with
parentheses (jaxtyping 0.3.11).
"""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
