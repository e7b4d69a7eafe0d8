"""The whole way from one config: SFT, rankings of its answers, a reward model, PPO against it and DPO beside it.

Each stage has a folder of its own below the workdir: sft, labels, reward, ppo, dpo. A finished stage is not done
again, one that was stopped goes on, and one whose product is named in `inputs` is left out. What the stages hand to
each other (models, rankings, prompts) the chain fills in; all else is a stage's own `Config`.
"""
