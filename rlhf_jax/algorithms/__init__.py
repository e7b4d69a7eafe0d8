"""What learns: each algorithm is a module with an objective and a make_prepare, and one line here.

Its contract: `LOSSES`, the losses it can run; `READS`, what a row is for the columns that a loss takes;
`make_objective(model, loss, reads, options)`; `make_prepare(model, reads, reference)`.
"""

from rlhf_jax.algorithms import preference, sft

ALGORITHMS = {"sft": sft, "preference": preference}
