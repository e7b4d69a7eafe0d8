"""Hugging Face folders: read onto the mesh leaf by leaf, and written back.

Only the header of each file is read before everything is known to fit; then each device's piece of each leaf
is read from the files by itself, so neither a device nor the host ever holds the whole model.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import safe_open
from safetensors.numpy import save_file

from rlhf_jax.errors import UserError
from rlhf_jax.models.decoder import Model, Numerics, Params
from rlhf_jax.models.families import FAMILIES, score
from rlhf_jax.models.families.maps import Family, Weight
from rlhf_jax.ops.layout import Layout

# Frequencies and masks, which once were saved too.
IGNORED = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
SHARD_BYTES = 5 * 2**30
Place = Callable[[tuple[str, ...], jax.ShapeDtypeStruct], jax.sharding.Sharding]
Change = Callable[[tuple[str, ...], jax.Array], Any]


def folder(name: str, flag: str = "--config.model.path") -> epath.Path:
    """The local folder of a path, or of a Hub name after its files were fetched; `flag`, for messages, gave it.

    Errors: UserError where there is neither.
    """
    path = epath.Path(os.path.expanduser(name))
    try:
        if path.is_dir():
            return path
    except ImportError as error:  # gs:// needs a package of its own
        raise UserError(f"{name} can't be read here ({error}); install it or change {flag}.") from error
    if path.exists():
        raise UserError(f"{name!r} is a file; give {flag} the folder that holds it.")
    if name.startswith(("/", ".", "~", "gs:")) or name.count("/") != 1:
        raise UserError(f"model folder {name!r} doesn't exist; give {flag} a folder or a Hub name.")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return epath.Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the Hub's client has no base class of its own errors
        reason = str(error).split("\n")[0]
        raise UserError(
            f"model {name!r} is neither a folder here nor to be had from the Hub ({reason}); check {flag}."
        ) from error


def _json(file: epath.Path) -> Any:
    """What a JSON file says. Errors: UserError naming a file that isn't whole."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not whole JSON ({error}); fetch it again.") from error


def describe(path: str | epath.Path, numerics: Numerics = Numerics(), layout: Layout = Layout()) -> Model:
    """The model that a folder's config.json tells of, without its weights; a classifier's has a score as its head."""
    file = epath.Path(path) / "config.json"
    if not file.exists():
        raise UserError(f"model folder {str(path)!r} holds no config.json; give a Hugging Face model folder.")
    config = _json(file)
    if not isinstance(config, dict):
        raise UserError(f"{file} is not the config of a model; fetch it again.")
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"model family {kind!r} of {file} is not supported; supported are {', '.join(FAMILIES)}.")
    try:
        shape = FAMILIES[kind].shape(config)
        if score.kind_of(config) is not None:
            score.check(config)
            shape = dataclasses.replace(shape, head="score")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except KeyError as error:
        raise UserError(f"{file} lacks the field {error}, which a {kind} config must have.") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{file} has a field of a type that no {kind} config has ({error}); fetch it again.") from error
    return Model(shape, numerics, layout, source=file.read_text())


def _family(model: Model) -> Family:
    return FAMILIES[json.loads(model.source)["model_type"]]


def _table(model: Model, config: dict[str, Any]) -> tuple[Weight, ...]:
    """The tensors of this model in a folder of this config."""
    own = score.weights(config, _family(model)) if model.shape.head == "score" else ()
    return (*_family(model).weights(model.shape), *own)


def _expected(model: Model, table: tuple[Weight, ...]) -> dict[str, tuple[int, ...]]:
    """Their tensor names and shapes for this model."""
    shapes = _leaves(model.shapes())
    expected = {}
    for weight in table:
        ones = tuple(np.empty(shapes[path].shape[len(weight.axes) :], np.int8) for path in weight.ours)
        saved = weight.map.save(ones, model.shape).shape
        expected |= {weight.name(index): saved for index in weight.indices(model.shape)}
    return expected


def _leaves(tree: Params) -> dict[tuple[str, ...], Any]:
    return {
        tuple(str(getattr(key, "key", key)) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


class _Files:
    """The tensors of a folder's safetensors files, opened once; their names are those of the whole model.

    A checkpoint of the bare decoder lacks the `prefix` of its family's names.
    """

    def __init__(self, path: epath.Path, family: Family):
        files = sorted(path.glob("*.safetensors"))
        index = path / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(_json(index)["weight_map"].values()))
            files = [path / name for name in names]
        if not files:
            raise UserError(
                f"model folder {str(path)!r} holds no *.safetensors weights; give a folder with them, "
                "or start from random ones with --config.model.init=random."
            )
        self._prefix, self.handles = "", {}
        for file in files:
            if not file.exists():
                raise UserError(f"{index} names {file.name}, which is missing; fetch the whole model folder.")
            with file.open("rb") as stream:
                if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise UserError(
                        f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository."
                    )
            try:
                handle = safe_open(os.fspath(file), framework="numpy")
            except Exception as error:  # SafetensorError has no public home in every release
                raise UserError(f"{file} is not a whole safetensors file ({error}); fetch it again.") from error
            self.handles |= dict.fromkeys(handle.keys(), handle)
        if not any(name.startswith(family.prefix) for name in self.handles):
            self._prefix = family.prefix
            whole = lambda name: name if name == family.head else self._prefix + name
            self.handles = {whole(name): handle for name, handle in self.handles.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.handles[name].get_slice(name.removeprefix(self._prefix)).get_shape())

    def read(self, name: str) -> np.ndarray:
        return self.handles[name].get_tensor(name.removeprefix(self._prefix))


def _check(model: Model, files: _Files, path: epath.Path) -> None:
    """Refuses files that don't hold exactly this model, naming the first thing that doesn't fit."""
    expected = _expected(model, _table(model, json.loads(model.source)))
    for name, shape in expected.items():
        if name not in files.handles:
            raise UserError(f"{path} lacks the tensor {name}, which its config.json calls for.")
        if files.shape(name) != shape:
            raise UserError(f"{path}: tensor {name} is {files.shape(name)}, but its config.json calls for {shape}.")
    known = {*expected, *(() if model.shape.own_head else (_family(model).head,))}
    for name in files.handles:
        if name not in known and not name.endswith(IGNORED):
            raise UserError(f"{path} holds the tensor {name}, which a model of its config.json doesn't have.")


def check(path: epath.Path, model: Model) -> None:
    """Reads the headers alone. Errors: UserError naming the first tensor that is missing or doesn't fit."""
    _check(model, _Files(path, _family(model)), path)


def load(path: epath.Path, model: Model, place: Place | None = None, change: Change | None = None) -> Params:
    """The parameters of `model` from a folder, each leaf put where `place` says, in `param_dtype`.

    A score that a language model's folder doesn't hold is 0.

    Args:
      place: gives the sharding of a leaf from its path and shape; None: the first device.
      change: what stands in the place of a leaf, from its path and itself, before the next one is read.
    Errors: UserError naming the first tensor that is missing, unknown or of another shape.
    """
    files = _Files(path, _family(model))
    _check(model, files, path)
    dtype = jnp.dtype(model.numerics.param_dtype)
    shapes = model.shapes()
    config = json.loads(model.source)
    weights = {ours: (weight, part) for weight in _table(model, config) for part, ours in enumerate(weight.ours)}
    constants = score.constants(config)

    def leaf(keys: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> Any:
        ours = tuple(key.key for key in keys)

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            if ours not in weights:
                return np.asarray(np.full(shape.shape, constants[ours], dtype)[index])
            weight, part = weights[ours]
            lead = len(weight.axes)
            spans = [range(*cut.indices(size)) for cut, size in zip(index[:lead], shape.shape, strict=False)]
            tensors = (files.read(weight.name(at)) for at in itertools.product(*spans))
            ones = (weight.map.load(tensor, model.shape)[part] for tensor in tensors)
            pieces = np.stack([one[index[lead:]].astype(dtype) for one in ones])
            return pieces.reshape((*map(len, spans), *pieces.shape[1:]))

        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if place is None else place(ours, shape)
        whole = jax.make_array_from_callback(shape.shape, sharding, piece)  # pyright: ignore[reportArgumentType]
        return whole if change is None else change(ours, whole)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def read(path: str, numerics: Numerics = Numerics(), layout: Layout = Layout()) -> tuple[Model, Params]:
    """A folder's model and its parameters on the first device: for notebooks and tests."""
    where = folder(path)
    model = describe(where, numerics, layout)
    return model, load(where, model)


def write(
    path: str | epath.Path,
    model: Model,
    params: Params,
    *,
    fetch: Callable[[jax.Array], np.ndarray] = np.asarray,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    kind: score.Kind | None = None,
) -> None:
    """Writes config.json and safetensors (sharded with an index above `shard_bytes`) that transformers loads.

    One file's tensors are in memory at a time. `fetch` brings a leaf, or a layer of it, to the host. A model
    that was written here before is replaced.

    Args: kind: of a model with a score, what transformers is to load it as: a sequence classifier of one label,
      which is also what None means, or a token classifier of two, wrong and right, whose logits are 0 and the score.
    Errors: UserError if transformers has no such class; ValueError for a kind of a model of words.
    """
    config = _config_of(model, params, kind, fetch)
    path = epath.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"):
        for older in path.glob(name):  # of another number of files, it would be read in the new one's place
            older.unlink()
    leaves = _leaves(params)
    stored = np.dtype(dtype or model.numerics.param_dtype)
    table = _table(model, config)
    expected = _expected(model, table)
    files: list[list[str]] = [[]]
    room = shard_bytes
    for name, shape in expected.items():
        size = int(np.prod(shape)) * stored.itemsize
        if size > room and files[-1]:
            files.append([])
            room = shard_bytes
        files[-1].append(name)
        room -= size
    tensors = {}
    for weight in table:
        parts = [leaves[path] for path in weight.ours]
        for index in weight.indices(model.shape):
            tensors[weight.name(index)] = functools.partial(_tensor, weight, model, parts, index, fetch, stored)
    total = len(files)
    where = {}
    for number, names in enumerate(files, start=1):
        file = "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        save_file({name: tensors[name]() for name in names}, os.fspath(path / file), metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    if total > 1:
        size = sum(int(np.prod(shape)) for shape in expected.values()) * stored.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config |= {"dtype": stored.name}
    config.pop("torch_dtype", None)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _config_of(model: Model, params: Params, kind: score.Kind | None, fetch: Callable) -> dict[str, Any]:
    """The config that a model is written with."""
    config = json.loads(model.source)
    if model.shape.head == "words":
        if kind is not None:
            raise ValueError(f"a model of words is not written as {kind} classification")
        return config
    config = score.as_classifier(config, _family(model), kind or "sequence")
    bias = {"score_bias": float(fetch(params["score_bias"]))} if kind != "token" else {}
    return config | bias


def _tensor(
    weight: Weight, model: Model, leaves: list[jax.Array], index: tuple[int, ...], fetch: Callable, kind: np.dtype
) -> np.ndarray:
    ours = tuple(fetch(leaf[index] if index else leaf) for leaf in leaves)
    return np.ascontiguousarray(weight.map.save(ours, model.shape).astype(kind))


def identity(path: epath.Path) -> str:
    """A hash of config.json and of every weight byte, hex: the name of a checkpoint's contents."""
    import hashlib

    digest = hashlib.blake2b(digest_size=16)
    for file in [path / "config.json", *sorted(path.glob("*.safetensors"))]:
        if not file.exists():
            continue
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while part := stream.read(2**24):
                digest.update(part)
    return digest.hexdigest()
