"""UniHyperLoRA as a PEFT method: `import uhl` registers `UNIHYPERLORA`, then everything PEFT does works on it.

    model = get_peft_model(host, UHLConfig(router="token"))
    model.save_pretrained(folder)             # adapter_model.safetensors is an adapter file like any other
    PeftModel.from_pretrained(other, folder)  # another width, depth or family

All learned state is on the tuner (``uhl_adapters``), shared by its layers and stored once. :func:`attach` puts an
adapter that exists already into a host in the same way.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME, register_peft_method
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from uhl import card, fileformat, store
from uhl.adapter import UHLAdapter
from uhl.checkpointing import Rerouted
from uhl.config import NAME, Sizes, UHLConfig
from uhl.errors import UHLError
from uhl.fileformat import Content, Header
from uhl.folding import HALF
from uhl.frame import Frame
from uhl.host import find_slots, stream_width
from uhl.layer import Attached, UHLLinear
from uhl.models import public_name

CHECKPOINT = "_gradient_checkpointing_func"  # where transformers' layers keep their checkpointing function


class UHLModel(BaseTuner):
    """PEFT's tuner: puts :class:`UHLLinear` around the weights, and folds and routes through hooks."""

    uses_shared_state = True
    prefix = "uhl_"
    tuner_layer_cls = UHLLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # weights are found by type, see uhl.host

    # --- putting adapters in -----------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.uhl_adapters = nn.ModuleDict()
        self._attached: dict[str, Attached] = {}
        self._handles: list[Any] = []
        self._layers: list[UHLLinear] = []
        self._arms: dict[str, str] = {}  # how the given frames were found

    def _prepare_adapter_config(self, peft_config: UHLConfig, model_config: dict[str, Any]) -> UHLConfig:  # type: ignore[override]
        return peft_config

    def _prepare_model(self, peft_config: UHLConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Find the weights of known types where the configuration names none; this is never stored."""
        if peft_config.target_modules is None or peft_config.types is not None:
            peft_config._found = {s.path for s in find_slots(model, peft_config.sizes().types)}  # type: ignore[attr-defined]
        file = peft_config._file
        peft_config._content = fileformat.read(file) if file is not None and file.is_file() else None
        if peft_config._content is not None:
            _keep_own_head(peft_config, peft_config._content, model)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        found: set[str] | None = getattr(peft_config, "_found", None)
        if peft_config.target_modules is None:
            peft_config = copy.copy(peft_config)
            peft_config.target_modules = found
        elif found is not None and key not in found:  # of another type than the wanted ones
            return False
        return check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)):
            raise UHLError(
                f"Target module {current_key} is a {type(base).__name__}, which is not supported; expected nn.Linear "
                f"or transformers' Conv1D. Name others in target_modules"
            )
        if adapter_name not in self.uhl_adapters:
            self.uhl_adapters[adapter_name] = _adapter_of(peft_config)
        layer = target
        if not isinstance(target, UHLLinear):
            layer = UHLLinear(target, self.uhl_adapters, self._attached)
            self._replace_module(parent, target_name, layer, target)
        layer.slots[adapter_name] = None  # type: ignore[index,union-attr,operator,assignment]  # complete below

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection, then what needs to know all of an adapter's weights: their depths, and the hooks."""
        there = [(p, p.requires_grad) for p in self.uhl_adapters.parameters()]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for parameter, wanted in there:  # a further adapter leaves what trains as it is
            parameter.requires_grad_(wanted)
        if adapter_name in self.uhl_adapters:
            self._complete(adapter_name)

    def _complete(self, name: str) -> None:
        layers = {p: m for p, m in self.model.named_modules() if isinstance(m, UHLLinear) and name in m.slots}
        adapter, config = self.uhl_adapters[name], self.peft_config[name]
        assert isinstance(adapter, UHLAdapter)
        slots = find_slots(self.model, adapter.config.types, set(layers))
        for slot in slots:
            layers[slot.path].slots[name] = slot
        given: dict[str, Any] = getattr(config, "_given", {})
        self._attached[name] = Attached(self.model, adapter, config.task, slots, **given)  # type: ignore[attr-defined]
        if not adapter.info:
            adapter.info = _source_of(self.model)
        weight = next(iter(layers.values())).base.weight
        if weight.device.type != "meta" and adapter.device.type != "meta":
            adapter.to(weight.device)
        self._hook()

    def attached(self, name: str = "default") -> Attached:
        """An adapter at work in this host: its routes, frame and folds."""
        return self._attached[name]

    def set_frame(self, name: str, frame: Frame | None, scale: float = 1.0, arm: str = "given") -> None:
        """Give an adapter the frame that a port (by ``arm``) found for this host; see :func:`uhl.port_model`."""
        self._attached[name].set_frame(frame, scale)
        self._arms[name] = f"the `{arm}` arm at scale {scale:g}"
        LOG.info("%s", self.report(name))

    @contextmanager
    def bare(self) -> Iterator[None]:
        """The host as it is without any adapter, for the length of a block: another may be attached to it there."""
        configs = self.model.__dict__.pop("peft_config", None)
        places = [
            (path, layer, layer.disable_adapters)
            for path, layer in self.model.named_modules()
            if isinstance(layer, UHLLinear)
        ]
        for path, layer, _ in places:
            layer._disable_adapters = True
            self.model.set_submodule(path, layer.base_layer)
        try:
            yield
        finally:
            for path, layer, disabled in places:
                self.model.set_submodule(path, layer)
                layer._disable_adapters = disabled
            if configs is not None:
                self.model.peft_config = configs  # type: ignore[assignment]

    def report(self, name: str = "default") -> str:
        """What an adapter does in this host: how many weights, at which depths, by which projectors, from where."""
        attached = self._attached[name]
        adapter, slots = attached.adapter, attached.slots
        layers = len({s.layer for s in slots})
        depths = sorted({round(s.depth, 3) for s in slots})
        config = self.peft_config[name]
        left = ", ".join(config._left)  # type: ignore[attr-defined]
        head = f"; the file's head ({left}) is of another host, so this host's own stays as it is" if left else ""
        arm = f"by the `{adapter.config.projector}` projector"
        if attached.ported:
            arm = f"by {self._arms.get(name, 'a given frame')}"
        elif adapter.config.projector == "canonical":
            arm = "to be ported to this host before it runs: uhl.port_model(model, tokenizer)"
        return (
            f"adapter {name!r}, trained on {card.source(adapter.info)}: {len(slots)} weights in {layers} "
            f"layers at depths {depths[0]:g} to {depths[-1]:g}, {arm}{head}"
        )

    def _hook(self) -> None:
        """Hooks at the host's input and at the input of each layer that carries atoms."""
        self._unhook()
        self._layers = [m for m in self.model.modules() if isinstance(m, UHLLinear)]
        self._handles = [
            self.model.register_forward_pre_hook(self._before_host, with_kwargs=True),
            self.model.register_forward_hook(self._after_host, always_call=True),
        ]
        layers = {(s.layer_path, s.layer) for a in self._attached.values() for s in a.slots if s.shared}
        for path, number in sorted(layers):
            hook = partial(self._before_layer, number)
            self._handles.append(self.model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module in self.model.modules():
            checkpoint = vars(module).get(CHECKPOINT)
            if isinstance(checkpoint, Rerouted):
                setattr(module, CHECKPOINT, checkpoint.inner)

    def _working(self) -> list[Attached]:
        """The active adapters, none where they are disabled or merged."""
        if all(layer.disable_adapters or layer.merged for layer in self._layers):
            return []
        return [self._attached[name] for name in self.active_adapters if name in self._attached]

    def _before_host(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        working = self._working()
        for attached in self._attached.values():
            attached.before_host(kwargs, any(attached is one for one in working))

    def _after_host(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        for attached in self._attached.values():
            attached.after_host()

    def _before_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        checkpoint = getattr(module, CHECKPOINT, None)
        if checkpoint is not None and not torch.compiler.is_compiling() and not isinstance(checkpoint, Rerouted):
            setattr(module, CHECKPOINT, Rerouted(checkpoint, partial(self._begin_layer, number)))
        self._begin_layer(number, args, kwargs)

    def _begin_layer(
        self, number: int, args: Any, kwargs: dict[str, Any], folds: dict[Attached, Any] | None = None
    ) -> list[Attached]:
        hidden = args[0] if args else kwargs.get("hidden_states")
        working = self._working() if folds is None else list(folds)
        if isinstance(hidden, Tensor):
            for attached in working:
                attached.before_layer(number, hidden, folds[attached] if folds else None)
        return working

    # --- what PEFT does to layers, done to the shared state ----------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter with all its state."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.uhl_adapters:
            del self.uhl_adapters[adapter_name]
        self._attached.pop(adapter_name, None)
        self._arms.pop(adapter_name, None)
        self._hook()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are float32; with ``autocast_adapter_dtype=False`` they take the host's dtype."""
        if adapter_name in self.uhl_adapters:
            layer = next(m for m in self.model.modules() if isinstance(m, UHLLinear) and adapter_name in m.slots)
            dtype = torch.float32 if autocast_adapter_dtype else layer.base.weight.dtype
            self.uhl_adapters[adapter_name].to(dtype if dtype.is_floating_point else torch.float32)

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """All or nothing: the adapters that would be merged, before any weight is changed."""
        for name in adapter_names or self.active_adapters:
            if name in self._attached:
                self._attached[name].check_mergeable(name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's. Raises :class:`UHLError` for a token router, and for packed weights."""
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self._unhook()
        return model

    # --- the file ----------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: UHLConfig,  # type: ignore[override]
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The adapter's stored tensors: quantised, by the file's names."""
        mark = f"uhl_adapters.{adapter_name}."
        values = {key.split(mark, 1)[1]: value for key, value in state_dict.items() if mark in key}
        adapter = tuner_of(model).uhl_adapters[adapter_name]
        assert isinstance(adapter, UHLAdapter)
        live = dict(adapter.named_parameters())
        # in half precision a state dict holds what the file gives back less exactly than the parameters say it
        values = live | {name: value for name, value in values.items() if value.dtype not in HALF or live[name].is_meta}
        store.check_finite(values)
        packed = store.pack_values(adapter, values)
        config._pending = partial(_complete_file, weakref.ref(adapter), fileformat.digest(packed))
        return packed

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Names of stored tensors hold no adapter name."""
        if fileformat.is_stored(key):
            return key
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: UHLConfig,  # type: ignore[override]
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Stored tensors, once checked, as the adapter's parameters; a head that fits the host passes through."""
        tuner = tuner_of(model)
        adapter = tuner.uhl_adapters[adapter_name]
        assert isinstance(adapter, UHLAdapter)
        prefix = next(
            (n.split("uhl_adapters.")[0] for n, _ in model.named_parameters() if f"uhl_adapters.{adapter_name}." in n),
            "base_model.",
        )
        stored = {name: value for name, value in state_dict.items() if fileformat.is_stored(name)}
        out = {k: v for k, v in state_dict.items() if k not in stored and not _part_of(k, config._left)}
        device = next((value.device for value in stored.values()), torch.device("cpu"))
        stored = {name: value.cpu() for name, value in stored.items()}
        store.check_tensors(adapter, stored)
        for name, value in store.unpack_values(adapter, stored).items():
            out[f"{prefix}uhl_adapters.{adapter_name}.{name}"] = value.to(device)
        content, config._content = config._content, None
        if content and fileformat.digest(content.tensors) == fileformat.digest(stored):  # not other values
            whole = store.build(content)
            adapter.anchors, adapter.info = whole.anchors, whole.info
            LOG.info("%s", tuner.report(adapter_name))
        return out


def tuner_of(model: nn.Module) -> UHLModel:
    """The tuner inside a PEFT model. Raises :class:`UHLError` where there is none."""
    found = next((m for m in model.modules() if isinstance(m, UHLModel)), None)
    if found is None:
        raise UHLError("the model carries no UniHyperLoRA adapter; wrap it with get_peft_model first")
    return found


def _complete_file(adapter: weakref.ref[UHLAdapter], digest: str, folder: Path) -> None:
    """Header, anchors and model card for the file that PEFT has just written into ``folder``, where it wrote one."""
    path, alive = folder / SAFETENSORS_WEIGHTS_NAME, adapter()
    if alive is not None and path.is_file() and store.complete(alive, path, digest):
        card.write(folder)


def _source_of(model: nn.Module) -> dict[str, object]:
    """What a new adapter says of the host that it is trained on; of a local folder its name alone."""
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or type(model).__name__
    layers, width = getattr(config, "num_hidden_layers", None), stream_width(model)
    told: dict[str, object] = {"source": public_name(name)}
    return told | ({"shape": f"{layers} x {width}"} if layers and width else {})


def _part_of(key: str, modules: Sequence[str]) -> bool:
    return any(f".{name}." in f".{key}." for name in modules)


def _keep_own_head(config: UHLConfig, content: Content[Header], model: nn.Module) -> None:
    """Take out of `modules_to_save` what the file holds for another host: this host's own modules stay as they are."""
    own = {
        n.replace(".original_module", "").replace(".base_layer", ""): tuple(p.shape)
        for n, p in model.named_parameters()
        if ".modules_to_save." not in n  # another adapter's copy
    }
    config._left, kept = [], []
    for name in dict.fromkeys(config.modules_to_save or ()):
        theirs = {n.removeprefix("base_model.model."): s for n, s in content.extra.items() if _part_of(n, [name])}
        mine = {n: s for n, s in own.items() if _part_of(n, [name])}
        if theirs != mine:
            config._left.append(name)
        if theirs == mine or not mine:  # PEFT passes over names that a host does not have
            kept.append(name)
    if config.modules_to_save:
        config.modules_to_save = kept


def _adapter_of(config: UHLConfig) -> UHLAdapter:
    """The adapter that a configuration stands for: a given one, or a new one with the tasks of its file, if any.

    A file's values come later, from PEFT; a configuration alone, loaded from a folder, starts a new adapter.
    """
    given: UHLAdapter | None = getattr(config, "_adapter", None)
    if given is not None:
        return given
    tasks: dict[str, fileformat.TaskEntry] = {}
    if config._content is not None:
        header = config._content.header
        stored, wanted = Sizes(**header.config), config.sizes()
        if stored != wanted.model_copy(update={"seed": stored.seed}):
            raise UHLError(
                f"{config._file} has sizes {stored}, adapter_config.json beside it {wanted}; copy both again"
            )
        tasks = header.tasks
        if config.task not in tasks:
            raise UHLError(f"{config._file} has no task {config.task!r}; it has {', '.join(tasks) or 'none'}")
    seed = int(torch.randint(1 << 31, (), device="cpu")) if config.seed is None else config.seed
    adapter = UHLAdapter(config.sizes().model_copy(update={"seed": seed}))
    for name, task in (tasks or {config.task: fileformat.TaskEntry(labels=[], kind="sentence")}).items():
        adapter.add_task(name, task.labels, task.kind, task.own_head, task.length)
    if not config.init_weights:
        with torch.no_grad():
            u = torch.randn(adapter.dictionary.u.shape, generator=torch.Generator().manual_seed(seed + 1))
            adapter.dictionary.u.copy_(u)
    return adapter


def attach(
    model: nn.Module,
    adapter: UHLAdapter,
    task: str,
    frame: Frame | None = None,
    scale: float = 1.0,
    path: str | None = None,
) -> Attached:
    """Attach ``adapter`` to every weight of a known type in ``model``, for one of the adapter's tasks.

    ``frame`` is what a port returned; without one the adapter's own projector gives it (the `dimension` arm).
    ``scale``, 0 or more, says how much of the ported atoms to use. ``path`` names one way to compute the update (see
    :mod:`uhl.ops`); by default it is chosen. What trains is left as it is. Raises :class:`UHLError` for a host without
    weights of a known type, for a host that carries an adapter already, and for another host's frame; after any error
    the host is as it was.
    """
    if not isinstance(model, nn.Module):
        raise UHLError(f"attach() got {model!r:.60} for a model; of an uhl.models.Encoder give its .model")
    adapter.task(task)
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise UHLError("the host already carries an adapter; detach it first")
    config = UHLConfig(**adapter.config.model_dump() | {"types": list(adapter.config.types)}, task=task)
    config._adapter, config._given = adapter, {"frame": frame, "scale": scale, "path": path}  # type: ignore[attr-defined]
    trains = [(p, p.requires_grad) for m in (model, adapter) for p in m.parameters()]
    try:
        tuner = UHLModel(model, {"default": config}, "default")
        attached = tuner._attached["default"]
        attached._detach = partial(_detach, tuner)
    except BaseException:
        for place, layer in [(p, m) for p, m in model.named_modules() if isinstance(m, UHLLinear)]:
            model.set_submodule(place, layer.base_layer)
        raise
    finally:
        for parameter, wanted in trains:
            parameter.requires_grad_(wanted)
    try:
        attached.folded  # noqa: B018  # a frame that is missing is found now
    except BaseException:
        attached.detach()
        raise
    return attached


def _detach(tuner: UHLModel) -> None:
    """Put the host's own modules back. Calling it twice does no harm."""
    if any(isinstance(m, UHLLinear) for m in tuner.model.modules()):
        tuner.unload()


class _Shown(logging.StreamHandler):  # type: ignore[type-arg]
    """Shows the package's messages on stderr where the program has set up no logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def _is_wanted(record: logging.LogRecord) -> bool:
    """Whether a program that has set up logging, and no level for this package, wants so unimportant a message."""
    program = logging.getLogger()
    return LOG.level != UNASKED or not program.handlers or record.levelno >= program.level


LOG = logging.getLogger("uhl")
UNASKED = logging.INFO - 1  # the level that no program has set
if not LOG.handlers:
    LOG.addHandler(_Shown())
    LOG.addFilter(_is_wanted)
    LOG.setLevel(UNASKED)
UHLConfig()  # adds the method to PEFT's enumeration
if NAME not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=NAME.lower(), config_cls=UHLConfig, model_cls=UHLModel, prefix="uhl_")
