"""Adapters in PEFT's files: read as ours, and ours written so that PEFT loads them.

Theirs is one pair a module, lora_A [r, in] and lora_B [out, r], named after the module. Where their module joins
several of our maps (query, key and value in one), ours is written as one pair of the summed rank, the A stacked and
the B in blocks, which is the same product; a pair of theirs that isn't of that form is read as one A for all parts.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rlhf_jax.errors import UserError
from rlhf_jax.models.decoder import Model, Params
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.families.maps import Weight
from rlhf_jax.models.linear import Lora
from rlhf_jax.models.lora import MAPS, maps

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
# What else an adapter of theirs may hold; each must be unset, since it would change the numbers.
UNREAD = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config",
)  # fmt: skip
STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the others begin from changed base weights


class Part(NamedTuple):
    """One of our maps in a module of theirs: where its inputs and outputs, flattened, are among the module's."""

    name: str
    inputs: np.ndarray
    outputs: np.ndarray


class Module(NamedTuple):
    """A module of theirs, one in each layer, that holds one or several of our maps."""

    weight: Weight
    parts: tuple[Part, ...]
    size: tuple[int, int]  # inputs, outputs
    turned: bool  # kept as [in, out]: PEFT's fan_in_fan_out

    def path(self, layer: int) -> str:
        """Its name in the model of theirs."""
        return self.weight.name((layer,)).removesuffix(".weight")

    @property
    def suffix(self) -> str:
        """The end of its name that is the same in every layer and no other module's."""
        return self.weight.theirs.split("{i}.")[1].removesuffix(".weight")


def modules(model: Model) -> list[Module]:
    """Their modules of linear maps that may carry an adapter."""
    shapes = maps(model)
    table = FAMILIES[json.loads(model.source)["model_type"]].weights(model.shape)
    adaptable = lambda path: path[0] == "layers" and path[-1] == "kernel" and len(path) == 3 and path[1] in shapes
    return [_module(weight, model, shapes) for weight in table if all(map(adaptable, weight.ours))]


def _module(weight: Weight, model: Model, shapes: dict[str, tuple[int, ...]]) -> Module:
    """Finds each part's place by sending every element's number through the weight's map."""
    ours = tuple(np.empty(shapes[path[1]][1:], np.int8) for path in weight.ours)
    theirs = weight.map.save(ours, model.shape).shape
    numbers = np.arange(math.prod(theirs), dtype=np.int32 if math.prod(theirs) < 2**31 else np.int64)
    parts, turned = [], False
    for path, found in zip(weight.ours, weight.map.load(numbers.reshape(theirs), model.shape), strict=True):
        flat = found.reshape(math.prod(found.shape[: MAPS[path[1]]]), -1)
        rows, columns = np.divmod(flat, theirs[1])
        turned = bool((rows == rows[:, :1]).all() and (columns == columns[:1]).all())
        inputs, outputs = (rows[:, 0], columns[0]) if turned else (columns[:, 0], rows[0])
        again = inputs[:, None] * theirs[1] + outputs[None] if turned else outputs[None] * theirs[1] + inputs[:, None]
        assert (again == flat).all(), f"{weight.theirs} is not a rearrangement of inputs and of outputs"
        parts.append(Part(path[1], inputs, outputs))
    return Module(weight, tuple(parts), theirs if turned else theirs[::-1], turned)


# ---- out


def write_peft(
    folder: str | os.PathLike[str],
    model: Model,
    adapter: Params,
    *,
    base: str | None = None,
    fetch: Callable[[jax.Array], np.ndarray] = np.asarray,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors that `PeftModel.from_pretrained` loads.

    Args:
      base: what base_model_name_or_path says: a folder or Hub name of the weights under the adapter.
      fetch: brings a leaf to the host.
    Errors: UserError for a reward model.
    """
    lora = model.adapter
    assert lora is not None, "the model has no adapter"
    if model.shape.head == "score":
        raise UserError(
            "the score of a reward model can't be written into an adapter's files; drop --adapter to export the merged "
            "model."
        )
    leaves = {name: jax.tree.map(fetch, part) for name, part in adapter["layers"].items()}
    tensors, ranks, alphas, turned = {}, {}, {}, False
    for module in modules(model):
        parts = [part for part in module.parts if part.name in leaves]
        if not parts:
            continue
        turned = turned or module.turned
        rank = ranks[module.suffix] = lora.rank * len(parts)
        alphas[module.suffix] = lora.resolved_alpha * (_divisor(rank, lora.rslora) / _divisor(lora.rank, lora.rslora))
        for layer in range(model.shape.layers):
            a, b = _joined(module, parts, leaves, layer, lora.rank)
            tensors[f"{PREFIX}{module.path(layer)}{A}"], tensors[f"{PREFIX}{module.path(layer)}{B}"] = a, b
    first = next(iter(ranks))
    differ = lambda values: {name: value for name, value in values.items() if value != values[first]}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": ranks[first], "lora_alpha": alphas[first], "rank_pattern": differ(ranks), "alpha_pattern": differ(alphas),
        "use_rslora": lora.rslora, "target_modules": list(ranks), "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": turned, "init_lora_weights": True, "modules_to_save": None, "use_dora": False,
    }  # fmt: skip
    folder = epath.Path(os.fspath(folder))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _joined(module: Module, parts: list[Part], leaves: Params, layer: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The pair of one of their modules: A [k r, in] stacked, B [out, k r] in blocks."""
    kind = leaves[parts[0].name]["lora_a"].dtype
    a = np.zeros((len(parts) * rank, module.size[0]), kind)
    b = np.zeros((module.size[1], len(parts) * rank), kind)
    for number, part in enumerate(parts):
        own = slice(number * rank, (number + 1) * rank)
        a[own, part.inputs] = leaves[part.name]["lora_a"][layer].reshape(-1, rank).T
        b[part.outputs, own] = leaves[part.name]["lora_b"][layer].reshape(rank, -1).T
    return a, b


def _divisor(rank: int, rslora: bool) -> float:
    return math.sqrt(rank) if rslora else rank


def _clean(x: float) -> float:
    """Without the last digits, which are rounding: an alpha that was multiplied and divided is itself again."""
    return float(f"{x:.12g}")


# ---- in


class Factors(NamedTuple):
    """A map's pair in all layers, flattened: a [L, r, in], b [L, out, r], and what their product is multiplied by."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def read_peft(folder: str | os.PathLike[str], model: Model) -> tuple[Lora, Params]:
    """An adapter for `model` from PEFT's files: what it is, to be put in `Model.adapter`, and its leaves, numpy.

    Modules of several ranks or alphas are brought to the largest rank, with zeros, and to one alpha; a layer
    without an adapter gets zeros, which stay zero in training.
    Errors: UserError, in a sentence, for files that are not whole, and for what an adapter can't be here.
    """
    folder = epath.Path(os.fspath(folder))
    config, tensors = _config(folder), _tensors(folder)
    found: dict[str, Factors] = {}
    for module in modules(model):
        whole = _pairs(module, model.shape.layers, config, tensors, folder / WEIGHTS)
        if whole is not None:
            found |= dict(_parts(module, whole))
    if tensors:
        raise UserError(
            f"{folder} adapts {next(iter(tensors))}, which is no linear map that can carry an adapter here."
        )
    if not found:
        raise UserError(f"{folder} holds no adapter: {WEIGHTS} is empty.")
    rank, scale = max(part.a.shape[1] for part in found.values()), next(iter(found.values())).scale
    alpha = _clean(scale * _divisor(rank, config["use_rslora"]))
    targets = tuple(name for name in MAPS if name in found)
    lora = Lora(rank=rank, alpha=alpha, targets=targets, rslora=config["use_rslora"])
    shapes, dtype = maps(model), jnp.dtype(model.numerics.param_dtype)
    return lora, {"layers": {name: _ours(found[name], shapes[name], name, lora, dtype) for name in targets}}


def _config(folder: epath.Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.exists():
        raise UserError(f"{folder} holds no {CONFIG}; give the folder of a PEFT adapter.")
    try:
        config = {"use_rslora": False, **json.loads(file.read_text())}
        rank, alpha = config["r"], config["lora_alpha"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is not the config of a LoRA adapter ({error!r}); fetch it again.") from error
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file} is of peft_type {config.get('peft_type')!r}; only LORA can be read.")
    if not all(isinstance(x, int | float) and x > 0 for x in (rank, alpha)):
        raise UserError(f"{file} has r={rank!r} and lora_alpha={alpha!r}; both must be numbers above 0.")
    for name in UNREAD:
        if config.get(name):
            raise UserError(f"{file} sets {name}, which cannot be read here: only plain LoRA can.")
    if config.get("bias", "none") != "none":
        raise UserError(f"{file} trains biases (bias={config['bias']!r}), which cannot be read here.")
    if config.get("init_lora_weights", True) not in STARTS:
        raise UserError(
            f"{file} has init_lora_weights={config['init_lora_weights']!r}, which changes the base's weights; "
            "save it from PEFT as a plain LoRA adapter first."
        )
    return config


def _tensors(folder: epath.Path) -> dict[str, np.ndarray]:
    """What the file holds, by name without the prefix."""
    file = folder / WEIGHTS
    if not file.exists():
        raise UserError(f"{folder} holds no {WEIGHTS}; save the adapter from PEFT with safetensors.")
    try:
        with safe_open(os.fspath(file), framework="numpy") as held:
            tensors = {name: held.get_tensor(name) for name in held.keys()}
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}); fetch it again.") from error
    return {name.removeprefix(PREFIX): x for name, x in tensors.items()}


def _pairs(
    module: Module, layers: int, config: dict[str, Any], tensors: dict[str, np.ndarray], file: epath.Path
) -> Factors | None:
    """Takes the module's pairs out of `tensors`; a layer that has none, or fewer ranks, gets zeros."""
    pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    scales: dict[int, float] = {}
    for layer in range(layers):
        path = module.path(layer)
        a, b = (tensors.pop(path + end, None) for end in (A, B))
        if a is None and b is None:
            continue
        if a is None or b is None:
            raise UserError(f"{file} lacks {path}{A if a is None else B}, half of its pair.")
        rank = a.shape[0]
        for x, shape, end in ((a, (rank, module.size[0]), A), (b, (module.size[1], rank), B)):
            if x.shape != shape:
                raise UserError(f"{file}: {path}{end} is {x.shape}, but the model calls for {shape}.")
        pairs[layer] = a, b
        scales[layer] = _alpha(config, path) / _divisor(rank, config["use_rslora"])
    if not pairs:
        return None
    rank, kind = max(len(a) for a, _ in pairs.values()), next(iter(pairs.values()))[0].dtype
    scale = next(iter(scales.values()))
    whole = Factors(
        np.zeros((layers, rank, module.size[0]), kind), np.zeros((layers, module.size[1], rank), kind), scale
    )
    for layer, (a, b) in pairs.items():
        whole.a[layer, : len(a)], whole.b[layer, :, : len(a)] = a, _scaled(b, scales[layer] / scale)
    return whole


def _alpha(config: dict[str, Any], path: str) -> float:
    """As PEFT finds it: the first pattern that the end of the module's name matches, else lora_alpha."""
    patterns = config.get("alpha_pattern") or {}
    matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
    return next(matching, config["lora_alpha"])


def _scaled(b: np.ndarray, ratio: float) -> np.ndarray:
    """Exactly `b` if the ratio is 1 but for rounding."""
    return b if math.isclose(ratio, 1, rel_tol=1e-9) else (b.astype(np.float32) * np.float32(ratio)).astype(b.dtype)


def _parts(module: Module, whole: Factors) -> Iterator[tuple[str, Factors]]:
    """Each of our maps in a module and its pair; those whose B is 0 while others' is not are left out."""
    a, b, scale = whole
    used = [part for part in module.parts if b[:, part.outputs].any()] or list(module.parts)
    rank = a.shape[1] // len(used)
    blocks = np.zeros_like(b, bool)
    for number, part in enumerate(used):
        blocks[:, part.outputs, number * rank : (number + 1) * rank] = True
    apart = rank * len(used) == a.shape[1] and not b[~blocks].any()
    for number, part in enumerate(used):
        own = slice(number * rank, (number + 1) * rank) if apart else slice(None)
        yield part.name, Factors(a[:, own][:, :, part.inputs], b[:, part.outputs][:, :, own], scale)


def _ours(factors: Factors, kernel: tuple[int, ...], name: str, lora: Lora, dtype: Any) -> Params:
    """A map's leaves, padded to the adapter's rank, the ratio of the scales in B."""
    missing, split = lora.rank - factors.a.shape[1], 1 + MAPS[name]
    b = _scaled(factors.b, factors.scale / lora.scale)
    a = np.pad(factors.a, ((0, 0), (0, missing), (0, 0))).swapaxes(1, 2)
    b = np.pad(b, ((0, 0), (0, 0), (0, missing))).swapaxes(1, 2)
    return {
        "lora_a": np.ascontiguousarray(a.reshape(*kernel[:split], lora.rank).astype(dtype)),
        "lora_b": np.ascontiguousarray(b.reshape(kernel[0], lora.rank, *kernel[split:]).astype(dtype)),
    }
