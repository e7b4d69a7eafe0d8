"""How fast the sampler is: new tokens a second, and how many programs it compiled for that.

    python -m benchmarks.sampler
    python -m benchmarks.sampler --model=FOLDER

8 prompts of 384 random tokens, 128 new tokens each, temperature 1, nothing filtered and no token that ends a
completion; FOLDER holds a Hugging Face checkpoint, and without one the model is random: 5.05 million parameters, a
vocabulary of 8,192. The time is that of one `generate`: prompts in, completions on the host. The first one compiles and
doesn't count; the figure is the median of the rounds after it, each with another key. The last line of the output is
JSON.

Beside another library, take turns with it on a machine that does nothing else and compare the medians: both drift with
the machine.
"""

import argparse
import json
import os
import statistics
import time

import jax
import numpy as np

from rlhf_jax.models import checkpoint as hf
from rlhf_jax.models.decoder import Model, Params
from rlhf_jax.models.shape import Shape
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Sampler

SHAPE = Shape(
    vocab=8192, width=256, layers=4, heads=4, groups=2, head_dim=64, mlp_width=704, length=2048, norm_eps=1e-6,
    tied=True, qkv_bias=True,
)  # fmt: skip


def load(folder: str) -> tuple[Model, Params]:
    """The folder's model, or a random one if that is empty."""
    if folder:
        return hf.read(folder)
    model = Model(SHAPE)
    return model, jax.jit(model.init)(jax.random.key(0))


def main() -> None:
    """Measures and prints."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="", help="folder of a Hugging Face checkpoint; none: a random model")
    flags.add_argument("--batch", type=int, default=8, help="prompts, all decoded at a time")
    flags.add_argument("--prompt", type=int, default=384, help="tokens of each prompt")
    flags.add_argument("--new", type=int, default=128, help="tokens of each completion")
    flags.add_argument("--rounds", type=int, default=3, help="measured calls")
    args = flags.parse_args()
    model, params = load(args.model)
    sampler = Sampler(model, slots=args.batch)
    sampling = Sampling(temperature=1.0, max_new_tokens=args.new)
    prompts = list(np.random.default_rng(0).integers(0, model.shape.vocab, (args.batch, args.prompt), np.int32))
    seconds = []
    for number in range(args.rounds + 1):
        start = time.perf_counter()
        done = sampler.generate(params, prompts, sampling, jax.random.PRNGKey(number))
        seconds.append(time.perf_counter() - start)
        assert all(len(completion.tokens) == args.new for (completion,) in done)
    new = args.batch * args.new
    rates = [round(new / taken, 1) for taken in seconds[1:]]
    result = {
        "params": sum(leaf.size for leaf in jax.tree.leaves(params)), "device": jax.devices()[0].device_kind,
        "first_s": round(seconds[0], 2), "tokens_per_s": statistics.median(rates), "rounds": rates,
        "compiles": sampler.compiles, "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
