"""Studies of the known failures of RLHF, each produced, measured and mended where the true reward is known.

study.py says what a study is, ground.py has what one seed of it stands on, running.py runs its seeds, estimates.py and
findings.py say what they come to, page.py writes it down. A study is a module of studies/ and a line of its registry.
"""
