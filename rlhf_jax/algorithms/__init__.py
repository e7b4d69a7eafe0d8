"""What learns: each algorithm is a module with an objective and a make_prepare, and one line here.

Its contract: `LOSSES`, the losses it can run; `READS`, what a row is for the columns that a loss takes;
`make_objective(model, parts, config)`; `make_judge(model, parts, config)`, what is said of single held-out rows;
`make_prepare(model, parts, config, reference, compiled)`; `make_carry(parts, config, params)` and
`make_advance(parts, config)`, a small state of its own and how it moves, or None.
"""

from rlhf_jax.algorithms import preference, sft

ALGORITHMS = {"sft": sft, "preference": preference}
