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

from uhl import store
from uhl.adapter import UHLAdapter
from uhl.config import NAME, UHLConfig
from uhl.errors import UHLError
from uhl.frame import Frame
from uhl.host import find_slots
from uhl.layer import Attached, UHLLinear, not_mergeable


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

    def _prepare_adapter_config(self, peft_config: UHLConfig, model_config: dict[str, Any]) -> UHLConfig:  # type: ignore[override]
        return peft_config

    def _prepare_model(self, peft_config: UHLConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Find the weights of known types where the configuration names none; this is never stored."""
        if peft_config.target_modules is None:
            peft_config._found = {s.path for s in find_slots(model, peft_config.sizes().types)}  # type: ignore[attr-defined]

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        if peft_config.target_modules is None:
            peft_config = copy.copy(peft_config)
            peft_config.target_modules = peft_config._found
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
        if hasattr(config, "_file"):
            LOG.info("%s", self.report(name))
        weight = next(iter(layers.values())).base.weight
        if weight.device.type != "meta" and adapter.device.type != "meta":
            adapter.to(weight.device)
        self._hook()

    def set_frame(self, name: str, frame: Frame | None, scale: float = 1.0) -> None:
        """Give an adapter the frame that :func:`uhl.port.port` found for this host."""
        self._attached[name].set_frame(frame, scale)
        LOG.info("%s", self.report(name))

    def report(self, name: str = "default") -> str:
        """What an adapter does in this host: how many weights, at which depths, by which projectors, from where."""
        attached = self._attached[name]
        adapter, slots = attached.adapter, attached.slots
        layers = len({s.layer for s in slots})
        depths = sorted({round(s.depth, 3) for s in slots})
        source = adapter.info.get("source", "an unnamed model")
        arm = "a ported frame" if attached.ported else f"the `{adapter.config.projector}` projector"
        return (
            f"adapter {name!r}, trained on {source} {adapter.info.get('shape', '')}: {len(slots)} weights in {layers} "
            f"layers at depths {depths[0]:g} to {depths[-1]:g}, by {arm}"
        )

    def _hook(self) -> None:
        """Hooks at the host's input and at the input of each layer that carries atoms."""
        for handle in self._handles:
            handle.remove()
        self._handles = [
            self.model.register_forward_pre_hook(self._before_host, with_kwargs=True),
            self.model.register_forward_hook(self._after_host, always_call=True),
        ]
        layers = {(s.layer_path, s.layer) for a in self._attached.values() for s in a.slots if s.shared}
        for path, number in sorted(layers):
            hook = partial(self._before_layer, number)
            self._handles.append(self.model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))

    def _working(self) -> list[Attached]:
        """The active adapters, none where they are disabled or merged."""
        layer = next((m for m in self.model.modules() if isinstance(m, UHLLinear)), None)
        if layer is None or layer.disable_adapters or layer.merged:
            return []
        return [self._attached[name] for name in self.active_adapters if name in self._attached]

    def _before_host(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        for attached in self._working():
            attached.before_host(kwargs)

    def _after_host(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        for attached in self._attached.values():
            attached.after_host()

    def _before_layer(self, number: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            for attached in self._working():
                attached.before_layer(number, hidden)

    # --- what PEFT does to layers, done to the shared state ----------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter with all its state."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.uhl_adapters:
            del self.uhl_adapters[adapter_name]
        self._attached.pop(adapter_name, None)
        self._hook()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are float32; with ``autocast_adapter_dtype=False`` they take the host's dtype."""
        if adapter_name in self.uhl_adapters:
            layer = next(m for m in self.model.modules() if isinstance(m, UHLLinear) and adapter_name in m.slots)
            dtype = torch.float32 if autocast_adapter_dtype else layer.base.weight.dtype
            self.uhl_adapters[adapter_name].to(dtype if dtype.is_floating_point else torch.float32)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name in self.active_adapters:
            if name in self._attached and self._attached[name].adapter.config.router == "token":
                raise not_mergeable(name)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for handle in self._handles:
            handle.remove()
        self._handles = []
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
        adapter = _tuner(model).uhl_adapters[adapter_name]
        assert isinstance(adapter, UHLAdapter)
        config._complete = partial(_complete_file, weakref.ref(adapter))  # type: ignore[attr-defined]
        return store.pack_values(adapter, dict(adapter.named_parameters()) | values)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Names of stored tensors hold no adapter name."""
        if store.is_stored(key):
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
        """Stored tensors as the adapter's parameters; anything else passes through."""
        tuner = _tuner(model)
        adapter = tuner.uhl_adapters[adapter_name]
        assert isinstance(adapter, UHLAdapter)
        prefix = next(
            (n.split("uhl_adapters.")[0] for n, _ in model.named_parameters() if f"uhl_adapters.{adapter_name}." in n),
            "base_model.",
        )
        out = {k: v for k, v in state_dict.items() if not store.is_stored(k)}
        stored = {k: v for k, v in state_dict.items() if store.is_stored(k)}
        device = next((v.device for v in stored.values()), torch.device("cpu"))
        for name, value in store.unpack_values(adapter, {k: v.cpu() for k, v in stored.items()}).items():
            out[f"{prefix}uhl_adapters.{adapter_name}.{name}"] = value.to(device)
        return out


def _tuner(model: nn.Module) -> UHLModel:
    found = next((m for m in model.modules() if isinstance(m, UHLModel)), None)
    if found is None:
        raise UHLError("the model carries no UniHyperLoRA adapter; wrap it with get_peft_model first")
    return found


def _complete_file(adapter: weakref.ref[UHLAdapter], folder: Path) -> None:
    """Header and anchors for the file that PEFT has just written into ``folder``, where it wrote one."""
    path, alive = folder / SAFETENSORS_WEIGHTS_NAME, adapter()
    if alive is not None and path.is_file():
        store.complete(alive, path)


def _adapter_of(config: UHLConfig) -> UHLAdapter:
    """The adapter that a configuration stands for: the given one, its file's, or a new one with the task's parts."""
    given: UHLAdapter | None = getattr(config, "_adapter", None)
    if given is not None:
        return given
    file: Path | None = getattr(config, "_file", None)
    if file is not None:
        adapter = store.load(file)
        wanted = config.sizes().model_copy(update={"seed": adapter.config.seed})
        if adapter.config != wanted:
            raise UHLError(
                f"{file} has sizes {adapter.config}, adapter_config.json beside it {wanted}; copy both again"
            )
        adapter.task(config.task)
        return adapter
    seed = int(torch.randint(1 << 31, (), device="cpu")) if config.seed is None else config.seed
    adapter = UHLAdapter(config.sizes().model_copy(update={"seed": seed}))
    adapter.add_task(config.task, (), "sentence")
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
    ``scale`` in [0, 1] says how much of the ported atoms to use. ``path`` names one way to compute the update (see
    :mod:`uhl.ops`); by default it is chosen. What trains is left as it is. Raises :class:`UHLError` for a host without
    weights of a known type and for a host that carries an adapter already.
    """
    adapter.task(task)
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise UHLError("the host already carries an adapter; detach it first")
    config = UHLConfig(**adapter.config.model_dump() | {"types": list(adapter.config.types)}, task=task)
    config._adapter, config._given = adapter, {"frame": frame, "scale": scale, "path": path}  # type: ignore[attr-defined]
    trains = [(p, p.requires_grad) for m in (model, adapter) for p in m.parameters()]
    tuner = UHLModel(model, {"default": config}, "default")
    for parameter, wanted in trains:
        parameter.requires_grad_(wanted)
    attached = tuner._attached["default"]
    attached.detach = partial(_detach, tuner)
    try:
        attached.refold()
    except UHLError:
        attached.detach()
        raise
    return attached


def _detach(tuner: UHLModel) -> None:
    """Put the host's own modules back. Calling it twice does no harm."""
    if any(isinstance(m, UHLLinear) for m in tuner.model.modules()):
        tuner.unload()


LOG = logging.getLogger("uhl")
UHLConfig()  # adds the method to PEFT's enumeration
if NAME not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=NAME.lower(), config_cls=UHLConfig, model_cls=UHLModel, prefix="uhl_")
