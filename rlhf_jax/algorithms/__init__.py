"""What learns: each algorithm is a module with an objective and a make_prepare, and one line here.

Its contract: `LOSSES`, the losses it can run; `READS`, what a row is for the columns that a loss takes; `BESIDE`,
kinds of losses of others that it adds up with its own; `HEAD`, that of its models (`Shape.head`);
`make_objective(model, parts, config)`; `make_judge(model, parts, config)`, what is said of single held-out rows;
`make_prepare(model, parts, config, reference, compiled)`; `make_carry(parts, config, params)` and
`make_advance(parts, config)`, a small state of its own and how it moves, or None. `config` is the section of the
algorithm's name, if there is one.
"""

from rlhf_jax.algorithms import preference, reward, sft

ALGORITHMS = {"sft": sft, "preference": preference, "reward": reward}
