"""Registries: a name or a function from outside, and only the hyper-parameters that it reads."""

import math
from typing import Annotated, Any

import pytest

from rlhf_jax import fields, registry
from rlhf_jax.errors import UserError
from tests.toy import LOSSES, Loss, bare, dpo, ipo


def test_a_loss_is_found_by_name_or_from_outside():
    assert registry.resolve(LOSSES, "ipo", "loss") is ipo
    assert registry.resolve(LOSSES, "math:sqrt", "loss") is math.sqrt
    for name, message in {
        "ipp": "there is no loss 'ipp'; the nearest is 'ipo'. Choose one of dpo, ipo, bare, or "
        "my_pkg.module:function from outside.",
        "no_such_pkg.losses:mine": "loss 'no_such_pkg.losses:mine': there is no module 'no_such_pkg' on",
        "math:sqr": "loss 'math:sqr': the module 'math' has no function 'sqr'; the nearest is 'sqrt'.",
        "math:pi": "loss 'math:pi': the module 'math' has no function 'pi'; the nearest is",
        "math:": "there is no loss 'math:'; the nearest is",
    }.items():
        with pytest.raises(UserError) as caught:
            registry.resolve(LOSSES, name, "loss")
        assert str(caught.value).startswith(message)


def test_a_fault_inside_an_outside_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "outside_losses.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        registry.resolve(LOSSES, "outside_losses:mine", "loss")


def test_arguments_are_the_defaults_and_then_the_fields_set():
    assert registry.arguments("loss", dpo, Loss()) == {"beta": 0.1, "label_smoothing": 0.0}
    assert registry.arguments("loss", ipo, Loss(name="ipo", beta=0.3, length_normalised=False)) == {
        "beta": 0.3,
        "length_normalised": False,
        "form": "a",
    }
    assert registry.arguments("loss", bare, Loss(name="bare", scale=0)) == {"scale": 0}


def test_a_hyper_parameter_that_the_loss_does_not_read_is_refused():
    with pytest.raises(UserError) as caught:
        registry.arguments("loss", ipo, Loss(name="ipo", label_smoothing=0.1))
    assert str(caught.value) == (
        "loss 'ipo' would ignore label_smoothing; it takes beta, length_normalised, form. "
        "Drop --config.loss.label_smoothing or choose another --config.loss.name."
    )
    with pytest.raises(UserError, match=r"^loss 'bare' needs scale; pass --config.loss.scale.$"):
        registry.arguments("loss", bare, Loss(name="bare"))


def test_a_registry_that_no_config_can_describe_is_an_error_at_import():
    def other(pair: Any, *, beta: int = 1) -> Any: ...
    def untyped(pair: Any, *, beta=1) -> Any: ...
    def unflagged(pair: Any, *, beta: Any = 1) -> Any: ...

    with pytest.raises(TypeError, match="beta is .*int.* in other, but .*float.* in dpo"):
        registry.generated({"dpo": dpo, "other": other})
    for function in (untyped, unflagged):
        with pytest.raises(TypeError, match="beta of mine"):
            registry.generated({"mine": function})
    with pytest.raises(TypeError, match="must default to one of dpo"):
        registry.generated({"dpo": dpo})(type("Loss", (), {"name": "ipo"}))


def test_a_generated_section_may_have_fields_of_its_own():
    def adamw(rate: float, *, b1: float = 0.9) -> Any: ...

    @registry.generated({"adamw": adamw})
    class Optimizer:
        name: str = "adamw"
        rate: Annotated[float, "per update"] = 1e-3

    assert registry.arguments("optimizer", adamw, Optimizer(rate=1.0)) == {"b1": 0.9}
    assert [leaf.path for leaf in fields.leaves(Optimizer())] == ["name", "rate", "b1"]
