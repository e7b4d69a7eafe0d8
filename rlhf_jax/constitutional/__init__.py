"""Constitutional AI from one config: critique and revision, preferences of a model, then DPO or a reward model and PPO.

Each stage has a folder of its own below the workdir, named as in `config.STAGES`. As in a chain a finished stage is not
done again, one that was stopped goes on, and one whose product is named in `inputs` is left out.

References: Bai et al. 2022, arXiv:2212.08073.
"""
