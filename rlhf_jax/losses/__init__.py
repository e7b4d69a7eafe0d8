"""What is minimised: per-row losses as pure functions of log-probabilities or of scores.

A new loss is one function and one line in the dict at the end of its file. Its keyword-only arguments are
its hyper-parameters: they become flags by themselves.
"""

from rlhf_jax.losses.distillation import DISTILLATION
from rlhf_jax.losses.policy import POLICY
from rlhf_jax.losses.preference import PREFERENCE
from rlhf_jax.losses.ranked import RANKED
from rlhf_jax.losses.reward import REWARD
from rlhf_jax.losses.supervised import SUPERVISED
from rlhf_jax.losses.unpaired import UNPAIRED

LOSSES = {**SUPERVISED, **PREFERENCE, **RANKED, **UNPAIRED, **REWARD, **POLICY, **DISTILLATION}

# Weighted sums of losses, each averaged over what it is a loss of: rows of pairs, and for nll the tokens of the
# chosen completions.
SUMS: dict[str, dict[str, float]] = {
    "rpo": {"dpo": 1.0, "nll": 1.0},  # Pang et al. 2024, arXiv:2404.19733
    "mpo": {"dpo": 0.8, "bco_pair": 0.2, "nll": 1.0},  # Wang et al. 2024, arXiv:2411.10442
}
