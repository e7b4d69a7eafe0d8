"""The studies by name, each a module of this folder."""

from rlhf_jax.lab.studies import direct, length, noise, overoptimisation, shift, sycophancy
from rlhf_jax.lab.study import Study

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        direct.STUDY,
        length.STUDY,
        noise.STUDY,
        overoptimisation.STUDY,
        shift.STUDY,
        sycophancy.STUDY,
    )
}
