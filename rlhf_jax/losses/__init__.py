"""What is minimised: per-row losses as pure functions of log-probabilities.

A new loss is one function and one line in the dict at the end of its file. Its keyword-only arguments are
its hyper-parameters: they become flags by themselves.
"""

from rlhf_jax.losses.preference import PREFERENCE
from rlhf_jax.losses.ranked import RANKED
from rlhf_jax.losses.supervised import SUPERVISED
from rlhf_jax.losses.unpaired import UNPAIRED

LOSSES = {**SUPERVISED, **PREFERENCE, **RANKED, **UNPAIRED}
