"""What learns: each algorithm is a module with an objective and a make_prepare, and one line here.

Its contract: `LOSSES`, the losses it can run; `READS`, what a row is for the columns that a loss takes; `BESIDE`,
kinds of losses of others that it adds up with its own; `HEAD`, that of its models (`Shape.head`);
`make_objective(model, parts, config)`; `make_judge(model, parts, config)`, what is said of single held-out rows;
`make_prepare(model, parts, config, reference, compiled)`; `make_carry(parts, config, params, hyper)` and
`make_advance(parts, config)`, a small state of its own and how it moves, or None; `make_skip(parts, config)`, whether a
step is left out, or None. `config` is the section of the algorithm's name, if there is one.

One that learns from rollouts (its losses read prompts) is given `rollouts.Models` for the model and `rollouts.Around`
as the last argument of make_prepare; it also has `refers(config)`, whether it holds the policy against a fixed
reference, `check(config, rollout)`, `POLICY`, the key of its parameters under which the policy lies, or None, and
`ROW`, what a row of its prepared batches stands for, one completion or a prompt with all of its completions. Where
there is a teacher, `frozen` is a `step.Taught`. `SCORED = False` says that it learns without scores, which are then
told if there are some.
"""

from rlhf_jax.algorithms import distill, group, nash, online, ppo, preference, rejection, reward, sft

ALGORITHMS = {
    "sft": sft, "preference": preference, "reward": reward, "ppo": ppo, "group": group, "online": online,
    "rejection": rejection, "distill": distill, "nash": nash,
}  # fmt: skip
