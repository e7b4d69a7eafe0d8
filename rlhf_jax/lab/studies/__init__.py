"""The studies by name, each a module of this folder."""

from rlhf_jax.lab.studies import (
    direct,
    hedging,
    kwise,
    length,
    noise,
    overoptimisation,
    process,
    safety,
    shift,
    sycophancy,
    tastes,
    tax,
)
from rlhf_jax.lab.study import Study

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        direct.STUDY,
        hedging.STUDY,
        kwise.STUDY,
        length.STUDY,
        noise.STUDY,
        overoptimisation.STUDY,
        process.STUDY,
        safety.STUDY,
        shift.STUDY,
        sycophancy.STUDY,
        tastes.STUDY,
        tax.STUDY,
    )
}
